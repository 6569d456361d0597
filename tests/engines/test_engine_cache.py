"""What is kept of a build: timings per GPU and version, and engines by what went into them."""

import dataclasses
import json
import os

from fake_driver import H100

from hstu_trt.contract.manifest import read_manifest
from hstu_trt.engines.builders import BuiltStage
from hstu_trt.engines.plan_store import PlanStore
from hstu_trt.engines.timing_cache import TimingCache


def test_the_timing_cache_is_kept_per_gpu_and_version(build_golden, module, tmp_path, gpu):
    assert build_golden("--stages", "mlp_head") == 0
    (file,) = (tmp_path / "cache/timing").iterdir()
    assert file.name == "nvidia-h100-80gb-hbm3-tensorrt-11.4.0.106.timing"
    learnt = file.read_bytes()
    assert learnt.startswith(b"tactics-of-")
    assert build_golden("--stages", "mlp_head,hstu") == 0
    assert file.read_bytes() != learnt
    assert set(learnt.split()) < set(file.read_bytes().split())


def test_a_damaged_timing_cache_counts_as_empty(module, tmp_path):
    cache = TimingCache.of(tmp_path, "GPU", "1")
    cache.path.write_bytes(b"damaged")
    config = module.Builder(None).create_builder_config()
    cache.attach(config)
    config.cache.data.add("new")
    cache.keep(config)
    assert cache.path.read_bytes() == b"new"


def test_another_plugin_library_builds_again(build_golden, library, tmp_path, capsys):
    assert build_golden() == 0
    assert build_golden() == 0
    assert "up to date" in capsys.readouterr().out
    library.plugin_library().write_bytes(b"other plugins")
    assert build_golden() == 0
    assert ": built" in capsys.readouterr().out


def built(module):
    """How many engines were built so far."""
    return len(module.configs)


def test_options_there_and_back_and_another_folder_build_nothing(build_golden, module, tmp_path, capsys):
    """A, B, A in one folder, and A in another one, which then holds the same files."""
    assert build_golden("--stages", "hstu,mlp_head") == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "e").glob("*.plan")}
    manifest = json.loads((tmp_path / "e/manifest.json").read_text())
    assert build_golden("--stages", "hstu,mlp_head", "--tf32") == 0
    assert built(module) == 4
    assert build_golden("--stages", "hstu,mlp_head") == 0
    assert build_golden("--stages", "mlp_head,hstu", "--out", str(tmp_path / "f")) == 0
    assert built(module) == 4
    assert "kept" in capsys.readouterr().out
    for folder in ("e", "f"):
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).glob("*.plan")} == first
        facts = read_manifest(tmp_path / folder, kind="engines", regenerate="")
        assert [{**s, "seconds": 0} for s in facts["stages"]] == [{**s, "seconds": 0} for s in manifest["stages"]]
    assert build_golden("--stages", "hstu,mlp_head", "--force") == 0
    assert built(module) == 6


def test_a_damaged_engine_in_the_cache_is_built_again(build_golden, module, tmp_path):
    """As is one that was changed in place in a folder of engines, which may share its bytes with the cache."""
    assert build_golden("--stages", "mlp_head") == 0
    (tmp_path / "e/mlp_head.plan").write_bytes(b"?")
    assert build_golden("--stages", "mlp_head") == 0
    assert built(module) == 2
    (entry,) = (tmp_path / "cache/plans").iterdir()
    (entry / "stage.json").write_text("{")
    assert build_golden("--stages", "mlp_head", "--out", str(tmp_path / "f")) == 0
    assert built(module) == 3
    read_manifest(tmp_path / "f", kind="engines", regenerate="")


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path):
    store = PlanStore(folder=tmp_path / "plans", most_bytes=2500)
    for number, key in enumerate("abcd"):
        engine = tmp_path / f"{key}.plan"
        engine.write_bytes(bytes(800))
        store.keep(engine, BuiltStage(stage="s", file=engine.name, bytes=800, seconds=1.0, key=key))
        os.utime(tmp_path / "plans" / key, (number, number))
        assert key != "b" or store.find("a")
    assert [key for key in "abcd" if store.find(key)] == ["a", "d"]


def test_another_driver_does_not(build_golden, gpu, capsys):
    assert build_golden() == 0
    gpu(dataclasses.replace(H100, driver="590.2"))
    assert build_golden() == 0
    assert "up to date" in capsys.readouterr().out
