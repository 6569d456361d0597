"""What `serve` and a fleet tell those who operate them: refreshes, and where the metrics are."""

import pytest

from hstu_trt.serving.fleet.command import _parser
from hstu_trt.serving.fleet.replica import told_by_serve
from hstu_trt.serving.operating import Reporter
from hstu_trt.serving.server import LOOPBACK, LaunchPlan
from hstu_trt.serving.supervision.events import Events


@pytest.mark.parametrize(
    ("log_format", "only_own", "shown"),
    [("text", False, "refresh v3 REFUSED by hstu: of another width"), ("text", True, ""), ("json", False, '"v3"')],
)
def test_serve_shows_what_became_of_a_published_version(tmp_path, capsys, log_format, only_own, shown):
    reporter = Reporter(tmp_path, log_format, only_own=only_own)
    events = Events(tmp_path, "hstu")
    events.write("refresh", version="v3", result="refused", refused="of another width")
    events.write("refresh", version="v2", result="ok")
    events.write("request", status="INVALID_ARGUMENT", message="not for this screen")
    reporter.close()
    said = capsys.readouterr().out
    assert shown in said
    assert bool(said) == bool(shown)
    if log_format == "text" and not only_own:
        assert said.splitlines()[1:] == ["refresh v2 taken by hstu"]


@pytest.mark.parametrize(
    ("address", "flags", "url"),
    [
        (LOOPBACK, ("--metrics-address=127.0.0.1", "--metrics-port=8002"), "http://127.0.0.1:8002/metrics"),
        ("0.0.0.0", ("--metrics-address=0.0.0.0", "--metrics-port=8002"), "http://127.0.0.1:8002/metrics"),
        (LOOPBACK, ("--allow-metrics=false",), None),
    ],
)
def test_where_prometheus_reads(tmp_path, address, flags, url):
    plan = LaunchPlan(command=("tritonserver", *flags), log=tmp_path / "log", regions="r", address=address, grpc_port=1)
    assert plan.metrics_url == url


READY = b'{"url": "127.0.0.1:1", "metrics": "http://127.0.0.1:2/metrics"}'


@pytest.mark.parametrize(
    ("log", "metrics"),
    [(READY + b"\n", "http://127.0.0.1:2/metrics"), (b"note\n" + READY, "http://127.0.0.1:2/metrics")],
)
def test_a_fleet_reads_what_serve_tells(log, metrics):
    assert told_by_serve(log)["metrics"] == metrics


@pytest.mark.parametrize("log", [b"", b"Traceback\n", READY[:-5], READY[5:]])
def test_before_serve_is_ready_it_tells_nothing(log):
    assert told_by_serve(log) is None


@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_fleet_takes_its_port_as_serve_does(option):
    assert _parser().parse_args([option, "9"]).port == 9
