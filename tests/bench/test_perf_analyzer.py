"""perf_analyzer: its command line, its files, and a stand-in of the program."""

import json
import stat
import sys

import numpy as np
import pytest

from hstu_trt.bench.load.stats import summarise
from hstu_trt.bench.serving import perf_analyzer
from hstu_trt.bench.serving.perf_analyzer import PerfAnalyzer, Setting
from hstu_trt.contract.errors import ArtefactError, HstuTrtError

CSV = (
    "Concurrency,Inferences/Second,Client Send,Network+Server Send/Recv,Server Queue,Server Compute Input,"
    "Server Compute Infer,Server Compute Output,Client Recv,p50 latency,p90 latency,p95 latency,p99 latency\n"
    "4,292.651,13,3151,2526,87,6187,573,3,11815,18230,20774,27770\n"
)


def export_text(sent_ms, latency_ms, windows_ms):
    """A profile export as 2.45 writes it: times in ns, raw bytes within strings."""
    requests = [
        f'{{"timestamp":{int(at * 1e6)},"request_inputs":{{"uih_ids":null}},'
        f'"response_timestamps":[{int((at + ms) * 1e6)}],'
        '"response_outputs":[{"preds":"3C#?\x02\ufffd"}]}'
        for at, ms in zip(sent_ms, latency_ms, strict=True)
    ]
    bounds = ",".join(str(int(bound * 1e6)) for bound in windows_ms)
    return (
        f'{{"experiments":[{{"requests":[{",".join(requests)}],"window_boundaries":[{bounds}]}}],"version":"2.45.0"}}'
    )


def test_its_table_is_read():
    table = perf_analyzer.read_table(CSV)
    assert table["Inferences/Second"] == 292.651 and table["p99 latency"] == 27770
    with pytest.raises(HstuTrtError, match="without a row"):
        perf_analyzer.read_table(CSV.splitlines()[0])


def test_the_last_three_windows_of_its_export_count():
    sent = np.arange(1000) * 5.0
    text = export_text(sent, np.where(sent < 1000, 100.0, 4.0), [0, 1000, 2000, 3000, 4000, 5100])
    records = perf_analyzer.read_export(text)
    result = summarise(records)
    assert len(records) == 600 and records.sent[0] == 0
    assert result.latency_ms["max"] == pytest.approx(4) and result.per_s == pytest.approx(200, rel=0.01)


WRONG = ["{}", '{"timestamp":1}', '"timestamp":5 "response_timestamps":[9] "window_boundaries":[1,2]']


@pytest.mark.parametrize("text", WRONG)
def test_an_export_without_requests_is_an_error(text):
    with pytest.raises(HstuTrtError, match="export holds"):
        perf_analyzer.read_export(text)


def test_inputs_have_the_shape_of_one_request(tmp_path):
    request = {
        "uih_ids": np.arange(6).reshape(3, 2),
        "uih_timestamps": np.arange(3),
        "contextual_ids": np.array([[7]]),
        "uih_offsets": np.array([0, 3], np.int32),
    }
    for served, shapes in (
        ("ranking", {"uih_ids": [3, 2], "uih_timestamps": [3], "contextual_ids": [1, 1], "uih_offsets": [2]}),
        ("ranking_fused", {"uih_ids": [6], "uih_timestamps": [3], "contextual_ids": [1]}),
    ):
        path = perf_analyzer.input_file(tmp_path, served)
        perf_analyzer.write_input_data(path, served, [request, request])
        data = json.loads(path.read_text())["data"]
        assert len(data) == 2 and {name: entry["shape"] for name, entry in data[0].items()} == shapes
        assert data[0]["uih_ids"]["content"] == [0, 1, 2, 3, 4, 5]


STAND_IN = """#!{python}
import pathlib, sys
if "--version" in sys.argv:
    print("Perf Analyzer Version 9.9 (stand-in)"); sys.exit(1)
stable = [word for word in sys.argv if word.startswith("--stability")][0]
if {fails!r} == "always" or ({fails!r} == "strict" and "=30" in stable):
    print({said!r}); sys.exit(99)
target = pathlib.Path(sys.argv[sys.argv.index("-f") + 1])
target.write_text({csv!r})
target.with_name("perf.json").write_text({export!r})
"""


def stand_in(folder, *, fails="never", said="Failed to obtain stable measurement"):
    sent = np.arange(400) * 5.0
    text = STAND_IN.format(
        python=sys.executable, fails=fails, said=said, csv=CSV, export=export_text(sent, np.full(400, 4.0), [0, 2100])
    )
    path = folder / "perf_analyzer"
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return PerfAnalyzer(binary=path)


def run(tool, folder):
    setting = Setting(rate=200.0)
    return perf_analyzer.run(tool, "host:1", "ranking", setting, folder, window=100, timeout_s=30)


@pytest.mark.parametrize(("fails", "stable"), [("never", True), ("strict", False)])
def test_windows_that_disagree_are_measured_but_not_called_stable(tmp_path, fails, stable):
    found = run(stand_in(tmp_path, fails=fails), tmp_path)
    assert found.stable == stable and len(found.records) == 400 and found.table["p99 latency"] == 27770


def test_its_failure_is_shown(tmp_path):
    with pytest.raises(HstuTrtError, match=r"failed with code 99:\n.*planted cause"):
        run(stand_in(tmp_path, fails="always", said="planted cause"), tmp_path)


def test_settings_become_options(tmp_path):
    tool = stand_in(tmp_path)
    line = perf_analyzer.command(tool, "h:1", "ranking", Setting(in_flight=4), tmp_path, window=50, stability=30)
    assert "--concurrency-range=4:4" in line and "--measurement-mode=count_windows" in line and "grpc" in line
    assert Setting(rate=60).flags() == ["--request-rate-range=60:60", "--request-distribution=poisson"]
    assert tool.version() == "9.9"


def test_where_none_is_found_the_error_says_how_to_get_one(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ArtefactError, match="make perf"):
        perf_analyzer.find_perf_analyzer(folder=tmp_path)
