"""A served deployment with requests for it and the scores that it should give: what every load run begins with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hstu_trt.bench.load.rows import Subject, workload_facts
from hstu_trt.bench.load.serve_accuracy import Checks, judge, reference_scores
from hstu_trt.bench.load.target import TritonAddress, ask_all
from hstu_trt.bench.result_rows import Provenance
from hstu_trt.bench.workloads.requests_source import Requests
from hstu_trt.contract.attention_norm import parse_fixed_norm
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.features import Tensors
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving.deployment import Deployment
from hstu_trt.serving.server import Listen, find_tritonserver, plan_launch, tensorrt_flags
from hstu_trt.serving.starting import check, start


@dataclass(frozen=True, kw_only=True)
class Workbench:
    """A served deployment, requests for it, and what its scores are held against."""

    deployment: Deployment
    url: str
    server_version: str
    requests: Requests
    packed: Sequence[Tensors]
    checked: int
    """The first so many requests are held against the reference."""
    expected: Sequence[Any]

    @property
    def case(self) -> str:
        """As in ``demo fp32 cpu, profile ci, seed 1001``."""
        model = self.deployment.model
        return f"{model.name} {model.precision} {self.deployment.kind_text}, {self.requests.source}"

    def check_scores(self, served: str) -> Checks:
        """The served model's scores against PyTorch's."""
        target = TritonAddress(url=self.url, model=served).open()
        try:
            scores = ask_all(target, self.packed[: self.checked])
        finally:
            target.close()
        return judge(self.deployment.model, scores, self.expected)

    def subject(self, served: str, provenance: Provenance) -> Subject:
        """What rows of a served model say about it."""
        deployment = self.deployment
        facts = {
            "model": deployment.model.name,
            "digest": deployment.model.digest[:16],
            "precision": deployment.model.precision,
            "flavour": deployment.flavour,
            "served": list(deployment.served),
            "attention_norm": deployment.attention_norm,
            "tritonserver": self.server_version,
        }
        return Subject(
            case=self.case,
            served=served,
            provenance=provenance,
            checks=self.check_scores(served),
            workload=workload_facts(self.requests),
            deployment=facts,
        )


@contextlib.contextmanager
def running(
    deployment: Deployment, url: str | None = None, metrics_port: int | None = None
) -> Iterator[tuple[str, str, int | None]]:
    """The deployment's server: a running one, or one that is started and drained.

    Yields its url, its version, and its process id, None for one that ran before.
    """
    if url is not None:
        import tritonclient.grpc as grpc_client
        from tritonclient.utils import InferenceServerException

        with grpc_client.InferenceServerClient(url) as client:
            try:
                version = str(client.get_server_metadata().version)
            except InferenceServerException as error:
                raise ConfigError(
                    f"--url {url}: no Triton server answers there ({error}); without --url one is started"
                ) from None
        yield url, version, None
        return
    check(deployment)
    server = find_tritonserver()
    flags = tensorrt_flags(server) if deployment.flavour == "tensorrt" else ()
    plan = plan_launch(server, deployment, Listen(grpc_port=0, metrics_port=metrics_port), flags)
    process, ready = start(deployment, plan)
    try:
        yield process.plan.url, ready.version, process.pid
    finally:
        process.drain()


def open_workbench(
    deployment: Deployment,
    requests: Requests,
    url: str,
    version: str,
    *,
    checked: int,
    reference: ModelFolder,
    device: str,
) -> Workbench:
    """Packs the requests and scores the first ``checked`` of them, or all, with the reference on ``device``."""
    checked = min(checked, len(requests))
    packed = [requests.pack([row]) for row in range(len(requests))]
    norm = parse_fixed_norm(deployment.attention_norm)
    expected = reference_scores(reference, packed[:checked], norm, device=device)
    return Workbench(
        deployment=deployment,
        url=url,
        server_version=version,
        requests=requests,
        packed=packed,
        checked=checked,
        expected=expected,
    )
