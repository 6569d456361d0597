"""What operators see of a real server: events, request ids, traces, and metrics that dashboard and alerts ask for."""

import ast
import dataclasses
import json
import secrets
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from promql import exposed, selectors
from scraping import scraped
from served import Serve, events_of, request_of
from trace_collector import TraceCollector
from waiting import PATIENCE_S, eventually

from hstu_trt.contract.cli import main
from hstu_trt.contract.errors import ConfigError, InputError
from hstu_trt.contract.table_versions import CURRENT_NAME
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.client import Call, RankingClient
from hstu_trt.serving.operating import trace_flags
from hstu_trt.serving.refresh.settings import RefreshSettings
from hstu_trt.serving.server import choose_port

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("embedding_lookup", "hstu", "mlp_head")
MODELS = ("ranking", "ranking_fused")
LOOKUPS = ("embedding_lookup", "ranking_fused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Told:
    """All that a server told that has ranked, refused requests, and taken and refused tables."""

    answered: dict[str, tuple[str, str]]
    """model -> (trace id, the client's span)"""
    errors: dict[str, str]
    """request id -> the client's error"""
    spans: list[dict]
    metrics: dict
    lines: list[dict]
    output: list[dict]


class JsonServe(Serve):
    """``hstu-trt serve --log-format json``; ``output`` is what it said, the rest once it has been stopped."""

    report = ("--log-format", "json")

    def _facts(self):
        self.output = [self._next_line()]
        while self.output[-1]["event"] != "ready":
            self.output.append(self._next_line())
        return self.output[-1]["server"]

    def stop(self):
        code = super().stop()
        self.output += map(json.loads, self.process.stdout)
        return code


@pytest.fixture(scope="module")
def told(deployment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("told")
    versions, run, port = folder / "tables", folder / "run", choose_port("127.0.0.1", 0)
    shutil.copytree(deployment.model.tables, versions / "v1")
    refresh = RefreshSettings(tables=versions, poll_s=0.1)
    watching = assemble(deployment.model, folder / "deployment", Options(refresh=refresh))
    with TraceCollector() as collector:
        options = ["--trace-otlp", collector.url, "--trace-rate", "1000000", "--metrics-port", str(port)]
        serve = JsonServe(watching, *options, "--run", str(run))
        try:
            answered, errors = rank_and_be_refused(watching, serve.url)
            assert main(["tables", "publish", str(versions / "v1")]) == 0
            wait_for_refreshes(run, "ok")
            (versions / CURRENT_NAME).write_text("nothing\n")
            wait_for_refreshes(run, "refused")
            metrics = metrics_once_told(port)
            spans = collector.wait_for(lambda spans: are_whole(spans, answered), PATIENCE_S)
        finally:
            code = serve.stop()
    assert code == 0
    assert not list((run / "live").rglob("*")), "what a server held goes with it"
    told = {"spans": spans, "metrics": metrics, "lines": events_of(run), "output": serve.output}
    return Told(answered=answered, errors=errors, **told)


def rank_and_be_refused(deployment, url):
    request = request_of(deployment, 8, 5)
    bad_ids = {"item_candidate_id": np.full(5, 10**9)}
    bad = dataclasses.replace(request, candidates={**request.candidates, **bad_ids})
    answered, errors = {}, {}
    for model in MODELS:
        with RankingClient(url, model, timeout_s=20) as client:
            trace, span = secrets.token_hex(16), secrets.token_hex(8)
            client.ask(request, Call(request_id=f"good-{model}", traceparent=f"00-{trace}-{span}-01"))
            client.ask(request, Call(request_id=f"unsampled-{model}"))
            answered[model] = trace, span
            with pytest.raises(InputError) as caught:
                client.ask(bad, Call(request_id=f"bad-{model}"))
            errors[f"bad-{model}"] = str(caught.value)
    return answered, errors


def wait_for_refreshes(run, result):
    """Both models that hold tables have taken, or refused, what is published."""
    wanted = {("refresh", model, result) for model in LOOKUPS}
    eventually(
        lambda: wanted <= {(line["event"], line["source"], line.get("result")) for line in events_of(run)}, str(wanted)
    )


def metrics_once_told(port):
    """What is exposed once the models have told of all that they count."""
    wanted = {name for name in families() if not name.startswith(REMOTE)}

    def complete():
        found = exposed("\n".join(scraped(port)))
        return found if wanted <= found.keys() else None

    return eventually(complete, f"not all of {sorted(wanted)}")


def are_whole(spans, answered):
    """Whether every span of the traces is there: of those that end at the same time, each may be sent first."""
    traces = [span["traceId"] for span in spans]
    ensemble, fused = (traces.count(answered[model][0]) for model in MODELS)
    return ensemble >= 2 + 2 * len(STEPS) and fused >= 3


@pytest.mark.triton
@pytest.mark.faults
def test_errors_and_events_name_the_request(told):
    refused = [line for line in told.lines if line["event"] == "request"]
    assert sorted((line["request_id"], line["source"]) for line in refused) == [
        ("bad-ranking", "embedding_lookup"),
        ("bad-ranking_fused", "ranking_fused"),
    ]
    for line in refused:
        error = told.errors[line["request_id"]]
        assert line["status"] == "INVALID_ARGUMENT" and "item_candidate_id" in line["message"]
        assert line["message"] in error and f"[request {line['request_id']}]" in error


@pytest.mark.triton
@pytest.mark.faults
def test_a_server_s_life_is_told(told):
    own = [line["event"] for line in told.lines if line["source"] == "serve"]
    assert own == ["starting", "ready", "draining", "stopped"]
    results = {(line["source"], line["result"]) for line in told.lines if line["event"] == "refresh"}
    assert {(model, result) for model in LOOKUPS for result in ("ok", "refused")} <= results
    assert all(line["refused"] for line in told.lines if line.get("result") == "refused")
    assert all(line["time"].endswith("Z") and line["pid"] > 0 for line in told.lines)


@pytest.mark.triton
@pytest.mark.faults
def test_standard_output_is_the_events(told):
    assert told.output == told.lines


@pytest.mark.triton
@pytest.mark.faults
def test_a_trace_has_every_step_below_the_client_s_span(told):
    assert {span["traceId"] for span in told.spans} == {trace for trace, _ in told.answered.values()}
    assert {span["service"] for span in told.spans} == {"hstu-trt"}
    trace, client_span = told.answered["ranking"]
    spans = {span["name"]: span for span in told.spans if span["traceId"] == trace and span["name"] != "compute"}
    assert set(spans) == {"InferRequest", "ranking", *STEPS}
    assert spans["InferRequest"]["parentSpanId"] == client_span
    assert spans["ranking"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    for step in STEPS:
        assert spans[step]["parentSpanId"] == spans["ranking"]["spanId"]
        assert {"key": "triton.request_id", "value": {"stringValue": "good-ranking"}} in spans[step]["attributes"]
        compute = [span for span in told.spans if span["parentSpanId"] == spans[step]["spanId"]]
        assert [span["name"] for span in compute] == ["compute"]
    # A step's span ends when Triton has put it away, which may be after the next one began.
    begins = [int(spans[step]["startTimeUnixNano"]) for step in ("InferRequest", "ranking", *STEPS)]
    assert begins == sorted(begins)


@pytest.mark.triton
@pytest.mark.faults
def test_a_trace_of_the_fused_model(told):
    trace, client_span = told.answered["ranking_fused"]
    spans = {span["name"]: span for span in told.spans if span["traceId"] == trace}
    assert set(spans) == {"InferRequest", "ranking_fused", "compute"}
    assert spans["InferRequest"]["parentSpanId"] == client_span


def families():
    """Our metrics by the source: its module is for inside of Triton alone."""
    tree = ast.parse((ROOT / "serving/models/live_metrics.py").read_text())
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and "_FAMILIES" in ast.unparse(n.targets[0])]
    return {f"hstu_trt_{key.value}" for key in found[0].keys}


# What the server of these tests cannot show: clusters (tests of the remote tier do), GPUs, and Prometheus's own.
REMOTE = "hstu_trt_remote_"
ELSEWHERE = {"nv_gpu_utilization", "nv_gpu_memory_used_bytes", "up"}
ADDED_BY_PROMETHEUS = {"instance", "job"}


def expressions():
    dashboard = json.loads((ROOT / "ops/grafana/hstu-trt.json").read_text())
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    for group in yaml.safe_load((ROOT / "ops/prometheus/alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])


def unknown(expression, metrics, elsewhere):
    """What an expression asks for that no server exposes: metrics and labels."""
    for metric, labels in selectors(expression):
        if metric in elsewhere:
            continue
        if metric not in metrics:
            yield metric
        else:
            yield from (
                f"{metric}{{{label}}}" for label in labels if label not in ADDED_BY_PROMETHEUS | set(metrics[metric])
            )


@pytest.mark.triton
@pytest.mark.faults
def test_dashboard_and_alerts_ask_for_what_a_server_exposes(told):
    elsewhere = ELSEWHERE | {name for name in families() if name.startswith(REMOTE)}
    asked = list(expressions())
    assert len(asked) > 25
    assert {
        expression: found for expression in asked if (found := list(unknown(expression, told.metrics, elsewhere)))
    } == {}
    named = {metric for expression in asked for metric, _ in selectors(expression)}
    assert families() <= named, "each of our metrics is on the dashboard or in an alert"


def test_an_unknown_metric_or_label_is_found():
    metrics = {"a": {"model": {"x"}}}
    assert list(unknown('sum(rate(a{model="x", instance="y"}[5m])) / b > time()', metrics, set())) == ["b"]
    assert list(unknown('a{mode="x"}', metrics, {"b"})) == ["a{mode}"]
    with pytest.raises(ValueError, match="parenthesis"):
        list(unknown("sum(a", metrics, set()))


def test_alerts_say_what_to_do():
    for group in yaml.safe_load((ROOT / "ops/prometheus/alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
            assert rule["labels"]["severity"] in ("page", "ticket") and set(rule["annotations"]) == {
                "summary",
                "action",
            }


def test_a_dashboard_has_no_panel_twice_or_without_place():
    panels = json.loads((ROOT / "ops/grafana/hstu-trt.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == len({panel["title"] for panel in panels})
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len(places)
    assert all(panel["description"] for panel in panels if panel["type"] != "row")


@pytest.mark.parametrize(
    ("url", "rate", "said"),
    [
        ("https://host/v1/traces", 1, "a collector beside it"),
        ("host:4318", 1, "takes http://host:4318/v1/traces"),
        ("http:///v1/traces", 1, "takes http://"),
        ("http://me:secret@host/v1/traces", 1, "without a user, not 'http://...@host/v1/traces'"),
        ("http://host/v1/traces", 0, "--trace-rate 0"),
    ],
)
def test_where_traces_cannot_go(url, rate, said):
    with pytest.raises(ConfigError, match=said.replace(".", "[.]")):
        trace_flags(url, rate)
