"""What a running server counts: its metrics, as Prometheus gets them, and Triton's own statistics."""

import urllib.request

from tritonclient.grpc import InferenceServerClient
from waiting import PATIENCE_S, eventually


def scraped(port):
    """Lines of the text, without comments."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def series(port):
    """Name with labels -> value."""
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in scraped(port))}


def counted(url):
    """Model -> (requests that it answered, that it refused): Triton counts a moment after it has answered."""
    with InferenceServerClient(url) as client:
        statistics = client.get_inference_statistics(client_timeout=PATIENCE_S).model_stats
    return {model.name: (model.inference_stats.success.count, model.inference_stats.fail.count) for model in statistics}


def restarts_told(port):
    """The lines that tell of restarts, once there are any."""
    return eventually(lambda: [line for line in scraped(port) if line.startswith("hstu_trt_restarts_total")])
