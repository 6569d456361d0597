"""What the report says of its figures: which models they are of, and where they were measured."""

import dataclasses

from load_rows_made import a_run, later, load_row

from hstu_trt.bench.load.rows import own_steps, sees_queues, steps_table
from hstu_trt.bench.report import page as report_page
from hstu_trt.bench.report.plots import step_times
from hstu_trt.bench.result_rows import RESULTS, read_rows

STEP = load_row("single").details["steps"]["ranking_fused"]
PROBED = {"embedding_lookup": STEP, "hstu": STEP, "mlp_head": STEP, "ranking": STEP, "ranking_fused": STEP}
"""What Triton counts in a run on one model while the server's supervisor probes both."""


def test_steps_are_those_of_the_served_model_alone():
    fused = load_row("single", steps=PROBED)
    assert list(own_steps(fused)) == ["ranking_fused"] == [name for name, _, _ in step_times(fused)]
    ensemble = load_row("single", served="ranking", steps=PROBED)
    stages = ["embedding_lookup", "hstu", "mlp_head"]
    assert list(own_steps(ensemble)) == [*stages, "ranking"] and [name for name, _, _ in step_times(ensemble)] == stages
    assert "hstu" not in steps_table([fused])


def test_queues_that_triton_does_not_see_are_not_drawn():
    counted = {name: {**step, "source": "triton"} for name, step in PROBED.items()}
    row = load_row("single", steps=counted)
    assert sees_queues(load_row("single", steps=PROBED)) and not sees_queues(row)
    assert not sees_queues(load_row("single", steps={}))
    baseline = load_row("single", served="pytorch_eager", steps={"pytorch_eager": counted["hstu"]})
    assert sees_queues(baseline), "it keeps its requests in Triton's queue"
    html = report_page.page([row])
    assert "Where the time goes" not in html and "until our model took the request" in html


def test_every_device_and_commit_of_a_case_is_named():
    other = dataclasses.replace(load_row("offline", "64 in flight"), device="another CPU", commit="def")
    html = report_page.page([*a_run(), *later([other])])
    assert "a CPU, 2026-11-22, commit abc; another CPU, 2026-11-23, commit def" in html


def test_a_comparison_says_what_it_holds_against_what():
    here = later([dataclasses.replace(row, device="another CPU", commit="def") for row in a_run()])
    wrong = dataclasses.replace(here[0], checks={"gates": 5.0, "gates_failed": 1.0})
    html = report_page.page([*a_run(), wrong, *here[1:]])
    assert "different devices, which decides nothing: a CPU and another CPU" in html
    assert "1 gates of its scores are missed" in html and '<p class="soft">A:</p>' in html


def test_kernels_of_two_gpus_do_not_mix():
    kernels = read_rows([RESULTS / "kernels_h100.jsonl"])
    html = report_page.page([*kernels, *(dataclasses.replace(row, device="Another GPU") for row in kernels)])
    assert html.count("Attention kernels, ") == html.count("Roofline of the attention kernels</text>") == 2
