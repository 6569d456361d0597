"""A deployment behind a real ``hstu-trt serve``, requests for it, and the scores that it must answer."""

import atexit
import json
import signal
import subprocess
import sys

import numpy as np

from hstu_trt.engines.onnx_runtime import OnnxRuntimeRunner
from hstu_trt.serving.models.stages import FusedStage, RunnerStage
from hstu_trt.serving.requests import RankRequest, one_user, pack, sample
from hstu_trt.serving.supervision.events import EVENTS_FILE
from hstu_trt.tables.lookup_stage import HostLookup


class Serve:
    """``hstu-trt serve`` as a child process, ready when constructed."""

    report = ("--json",)
    """How it tells what it serves, and what happens."""

    def __init__(self, deployment, *options):
        command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment.path)]
        command += ["--grpc-port", "0", *self.report, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)  # of a test that failed before it came to the end
        self.facts = self._facts()
        self.url = self.facts["url"]

    def _facts(self):
        """What it says once it is ready."""
        return self._next_line()

    def _next_line(self):
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return json.loads(line)

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(120)  # it waits up to 15 s for quiet, and 40 s for what runs


def events_of(run):
    """The events in a run folder; the last line may be on its way, and is left out then."""
    whole, _, _ = (run / EVENTS_FILE).read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def request_of(deployment, events, items, seed=0):
    """A request with that many events and candidates, cut from a long sample."""
    config = deployment.model.ranking_config
    random = np.random.default_rng(seed)
    base = sample(config, deployment.model.limits, seed=seed)

    def lengthen(features, count):
        return {name: values[random.integers(0, len(values), count)] for name, values in features.items()}

    return RankRequest(
        user=base.user, history=lengthen(base.history, events), candidates=lengthen(base.candidates, items)
    )


def in_process(deployment, model, request):
    """The scores of one user without Triton."""
    folder = deployment.model
    packed = pack(folder.ranking_config, [request])
    norm = float(deployment.attention_norm.partition(":")[2])
    if model == "ranking_fused":
        with OnnxRuntimeRunner(folder, "ranking_fused") as runner:
            return FusedStage(folder, runner, norm, "reject").infer_many([one_user(packed)])[0][0]
    ids = {name: array for name, array in packed.items() if name.endswith("_ids")}
    rows = HostLookup(folder, "reject").infer(ids)
    payload = {name: array for name, array in packed.items() if name not in ids}
    with OnnxRuntimeRunner(folder, "hstu") as hstu, OnnxRuntimeRunner(folder, "mlp_head") as head:
        vectors = RunnerStage(hstu, norm).infer(rows | payload)
        return RunnerStage(head, None).infer(vectors | {"candidate_embeddings": rows["candidate_embeddings"]})["preds"]
