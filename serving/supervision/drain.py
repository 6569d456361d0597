"""Waiting for running requests before the server is asked to stop.

On SIGTERM Triton finishes what each model has begun, but its steps take nothing new: a request that is between two
steps of the ensemble fails. So we first wait until the models are quiet.
"""

from __future__ import annotations

import time
from typing import Any

from tritonclient.utils import InferenceServerException

from hstu_trt.serving.tls import ClientTls, connect

QUIET_S = 1.0
"""No model finished anything for so long: nothing runs. A step that takes longer is cut off from the next one."""
GRACE_S = 15.0
"""Not longer than this, since nothing keeps new requests from coming."""
_POLL_S = 0.1


def wait_until_quiet(
    url: str, tls: ClientTls | None = None, *, quiet_s: float = QUIET_S, grace_s: float = GRACE_S
) -> bool:
    """True once no model has finished a request for ``quiet_s``; False after ``grace_s``, or if nobody answers."""
    client = connect(url, tls)
    deadline = time.monotonic() + grace_s
    try:
        last_counts, since = _counts(client), time.monotonic()
        while last_counts is not None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            counts = _counts(client)
            if counts != last_counts:
                last_counts, since = counts, time.monotonic()
            elif time.monotonic() - since >= quiet_s:
                return True
    finally:
        client.close()
    return False


def _counts(client: Any) -> list[int] | None:
    """Finished requests per model, successful and failed."""
    try:
        answer = client.get_inference_statistics(client_timeout=2)
    except InferenceServerException:
        return None
    return [
        count
        for model in answer.model_stats
        for count in (model.inference_stats.success.count, model.inference_stats.fail.count)
    ]
