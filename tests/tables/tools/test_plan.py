"""`tables plan`: which tier fits, and how often it answers."""

import json

import numpy as np
import pytest
from table_tools import COUNTS, run

from hstu_trt.bench.workloads.popularity import zipf_ranks
from hstu_trt.contract.errors import ConfigError
from hstu_trt.tables.plan import GPUS, TableSize, cluster_bytes
from hstu_trt.tables.popularity import Popularity, zipf_share


@pytest.mark.parametrize("exponent", [0.0, 0.8, 1.0, 1.05])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.7, 1.0])
def test_the_hit_rate_is_that_of_drawn_lookups(exponent, share):
    rows, hot = 5_000, int(5_000 * share)
    ranks = zipf_ranks(np.random.default_rng(3).random(200_000), rows=rows, exponent=exponent)
    assert zipf_share(hot, rows, exponent) == pytest.approx((ranks < hot).mean(), abs=0.004)


def test_a_histogram_gives_its_own_hit_rate(folder):
    popularity = Popularity(str(folder / "counts.npy"))
    assert popularity.hit_rate(1, 40) == 390 / COUNTS.sum()
    assert popularity.hit_rate(40, 40) == 1.0
    assert popularity.hit_rate(0, 40) == 0.0


@pytest.mark.parametrize("text", ["zipf", "zipf:x", "zipf:-1", "zipf:nan", "gauss"])
def test_unknown_popularities_are_refused(text):
    with pytest.raises(ConfigError, match=text):
        Popularity(text)


def plan(capsys, *arguments):
    capsys.readouterr()
    assert run("plan", *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_terabyte_table(capsys):
    """DLRMv3's item table on an H100 with 80 GB: figures worked out by hand."""
    sizes = ["--table", "item_id=1e9x512", "--table", "kinds=128x512", "--host-memory", 1100]
    found = plan(capsys, *sizes, "--gpu-share", "0.75", "--popularity", "uniform", "--popularity", "zipf:1.05")
    kinds, item, _, item8 = found["placements"]
    assert (kinds["tier"], kinds["hit_rates"]["uniform"], kinds["link_bytes_per_s"]["uniform"]) == ("gpu", 1.0, 0.0)
    assert (item["tier"], item["bytes"]) == ("hot set", 1_024_000_000_000)
    assert item["hit_rates"]["uniform"] == pytest.approx(60e9 / 1024 / 1e9, rel=1e-3)
    assert item["hit_rates"]["zipf:1.05"] > 0.85
    assert item["link_bytes_per_s"]["uniform"] == pytest.approx(9048 * 1024 * 1450 * (1 - 0.0586), rel=1e-3)
    assert item["request_us"]["uniform"] == pytest.approx(9048 * 1024 / 55e3 * 0.9414, rel=0.06)
    assert item["pin_seconds"] == pytest.approx(1024e9 / 0.25e9)
    assert (item8["bytes"], item8["tier"]) == (516_000_000_000, "hot set")
    assert item8["hit_rates"]["uniform"] == pytest.approx((60e9 - 4e9) / 512 / 1e9, rel=1e-3)
    assert any("0.25 GB/s" in line for line in found["assumptions"])


@pytest.mark.parametrize(
    ("more", "tier"),
    [
        (["--gpu-memory", "1000"], "gpu"),
        (["--gpu-memory", "80"], "hot set"),
        (["--gpu-memory", "0.0000001"], "host"),
        (["--host-memory", "1"], "disk"),
    ],
)
def test_tiers(capsys, more, tier):
    found = plan(capsys, "--table=t=1e9x64", "--dtype=float16", *more)
    assert [row["tier"] for row in found["placements"]] == [tier]


def test_tables_share_the_memory(capsys):
    sizes = ["--table=a=1e6x512", "--table=b=1.1e6x512"]
    found = plan(capsys, *sizes, "--dtype=float16", "--gpu-memory=2", "--gpu-share=0.9")
    assert [(row["table"], row["tier"]) for row in found["placements"]] == [("a", "gpu"), ("b", "hot set")]


def test_a_folder_is_planned_as_stored_and_in_int8(folder, capsys):
    found = plan(capsys, folder / "v1")
    assert [(row["table"], row["dtype"], row["bytes"]) for row in found["placements"]] == [
        ("kinds", "as stored", 80), ("items", "as stored", 1280), ("kinds", "int8", 60), ("items", "int8", 480),
    ]  # fmt: skip
    assert run("plan", folder / "v1") == 0
    assert "Assumed, not measured:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a tables folder"),
        (["--table", "a=5"], "expected ROWSxDIM"),
        (["--table", "a=0x5"], "rows and dim must be >= 1"),
        (["--table", "a=1e400x5"], "expected ROWSxDIM"),
        (["--table", "a=5x5", "--gpu-share", "0"], "--gpu-share must be > 0"),
        (["--table", "a=5x5", "--link", "-1"], "must be > 0"),
    ],
)
def test_wrong_plans_are_refused(capsys, arguments, message):
    assert run("plan", *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dtype", "dim", "measured"), [("float16", 512, 1340.2), ("int8", 512, 698.9), ("float16", 64, 218.8)]
)
def test_bytes_in_a_cluster_are_those_of_redis(dtype, dim, measured):
    """measured: used_memory of Redis 7.0.15 after a push of 200,000 rows, per row."""
    table = TableSize(name="t", rows=200_000, dim=dim, dtype=dtype)
    assert cluster_bytes(table) / table.rows == pytest.approx(measured, rel=0.01)


def test_all_gpus_side_by_side(capsys):
    sizes = ["--table=item_id=1e9x512", "--table=user_id=1e7x512", "--gpu=all", "--dtype=int8", "--host-memory=600"]
    found = plan(capsys, *sizes)
    assert {placement["gpu"] for placement in found["placements"]} == set(GPUS)
    by_gpu = {p["gpu"]: p for p in found["placements"] if p["table"] == "item_id"}
    assert by_gpu["h200"]["hit_rates"]["uniform"] > by_gpu["h100"]["hit_rates"]["uniform"] > 0
    assert by_gpu["l4"]["cluster_bytes"] == pytest.approx(0.7e12, rel=0.01)
    assert run("plan", *sizes) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("l4 ", "h100 ")) for line in lines) == 4
