"""Another process takes all memory of the GPU that a deployment of the flavour cuda runs on.

What a client sees: requests that need more memory than the server holds fail with UNAVAILABLE and say so; others are
answered. A server that cannot answer at all is restarted, which succeeds once there is memory again.
"""

import re
import subprocess
import sys
import time
from collections import Counter

import pytest
from gpu_hog import gpu_taken
from hammering import BOTH, Hammer
from served import request_of
from supervised import Supervised

from hstu_trt.contract.errors import HstuTrtError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.tensors import ENSEMBLE
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import RankingClient

pytestmark = [pytest.mark.gpu, pytest.mark.triton, pytest.mark.faults]
TAKEN_S = 8.0
CLEAR = re.compile(r"UNAVAILABLE|INTERNAL|CANCELLED")
PROMISED_S = 5.0
# A restart that failed for want of memory is tried again after up to 16 s, and takes as long as the model loads.
ALLOWED_S = 60.0
LITTLE = 300 << 20


@pytest.fixture(scope="module")
def on_gpu(exported, tmp_path_factory):
    model = read_model_folder(exported("fp16"))
    return assemble(model, tmp_path_factory.mktemp("gpu") / "deployment", Options(flavour="cuda"))


def scores_of(url, model, request):
    with RankingClient(url, model) as client:
        return client.ask(request).scores


def sizes_up_to(limits, steps=12):
    """Ever larger requests: none of their sizes has a graph, or memory, yet."""
    return [(limits.history * n // steps, max(1, limits.candidates * n // steps)) for n in range(2, steps + 1)]


def ask_while_taken(deployment, url, until):
    """Requests of new sizes -> their scores, or the text of the error."""
    found, turn, sizes = [], 0, sizes_up_to(deployment.model.limits)
    while time.monotonic() < until:
        model, request = BOTH[turn % 2], request_of(deployment, *sizes[turn % len(sizes)], seed=turn)
        try:
            found.append((model, request, scores_of(url, model, request)))
        except HstuTrtError as error:
            found.append((model, request, str(error)))
            time.sleep(0.05)
        turn += 1
    return found


def check_a_full_gpu(deployment, serve):
    """What must hold of any deployment that is served; prints what was seen."""
    atol = TOLERANCES[ENSEMBLE, deployment.model.tolerances].atol
    requests = [request_of(deployment, *lengths, seed) for seed, lengths in enumerate([(8, 5), (64, 40), (0, 3)])]
    cases = {model: [(request, scores_of(serve.url, model, request)) for request in requests] for model in BOTH}
    with Hammer(serve.url, cases, atol=atol) as clients:
        clients.wait_for_answers(time.monotonic())
        with gpu_taken():
            asked = ask_while_taken(deployment, serve.url, time.monotonic() + TAKEN_S)
        released = time.monotonic()
        back = clients.wait_for_answers(released, timeout_s=ALLOWED_S) - released
    outcome = clients.outcome
    answered = [(model, request, scores) for model, request, scores in asked if not isinstance(scores, str)]
    errors = [text for *_, text in asked if isinstance(text, str)] + [text for *_, text in outcome.failed]
    kinds = Counter(re.sub(r"\d+|\[request \w+\]", "", text)[-120:] for text in errors)
    right = sum(map(len, outcome.right.values()))
    print(f"new sizes: {len(asked)} asked, {len(answered)} answered; {right} right answers to known ones")
    print(f"back after {back:.2f} s, {len(serve.events)} events, errors: {dict(kinds)}")
    assert outcome.wrong == []
    assert all(CLEAR.search(text) for text in errors), kinds
    assert back <= (PROMISED_S if not serve.events else ALLOWED_S)
    for model, request, scores in answered:
        assert abs(scores_of(serve.url, model, request) - scores).max() <= atol


def check_a_start_without_memory(deployment, leave):
    """Refused in words, soon, and a start with memory succeeds afterwards; returns what was said."""
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment.path), "--grpc-port", "0"]
    with gpu_taken(leave):
        refused = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    print(refused.stderr)
    assert refused.returncode not in (0, None) and "Traceback" not in refused.stderr
    assert re.search(r"GiB of GPU memory|memory free for a CUDA context|out of memory", refused.stderr)
    return refused.stderr


def test_all_memory_is_taken_while_requests_flow(on_gpu):
    serve = Supervised(on_gpu)
    try:
        check_a_full_gpu(on_gpu, serve)
    finally:
        assert serve.stop() == 0


def test_a_start_without_memory_is_refused_in_words(on_gpu):
    check_a_start_without_memory(on_gpu, LITTLE)
