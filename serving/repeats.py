"""After which errors a client sends the same request again, how often and how soon.

It may, since scoring changes nothing.
"""

from hstu_trt.serving.signature import DRAINING, REPLICA_LOST

# A connection can be closed, by a gateway that reloads or whose worker died say, in the moment in which a request sets
# out on it; gRPC names that in these words only.
_TRANSPORT_LOST = ("GOAWAY", "Socket closed", "Stream removed", "onnection reset", "Broken pipe")
_LOST_PAUSES_S = (0.0, 0.1)
"""Before the second and the third sending: gRPC may not know yet that a connection is closed, and take it again."""
_DRAINING_PAUSES_S = (0.5, 0.5)
"""The gateway takes a replica that stops off its list within the first one."""


def pause_before_repeat(message: str, times: int) -> float | None:
    """Seconds after which a request is sent again whose ``times``-th sending (from 1) ended so; None: it is not."""
    if any(words in message for words in DRAINING):
        pauses_s = _DRAINING_PAUSES_S
    elif any(words in message for words in (REPLICA_LOST, *_TRANSPORT_LOST)):
        pauses_s = _LOST_PAUSES_S
    else:
        return None
    return pauses_s[times - 1] if times <= len(pauses_s) else None
