"""A running server's metrics, as Prometheus gets them."""

import urllib.request

from waiting import eventually


def scraped(port):
    """Lines of the text, without comments."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return [line for line in answer.read().decode().splitlines() if not line.startswith("#")]


def series(port):
    """Name with labels -> value."""
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in scraped(port))}


def restarts_told(port):
    """The lines that tell of restarts, once there are any."""
    return eventually(lambda: [line for line in scraped(port) if line.startswith("hstu_trt_restarts_total")])
