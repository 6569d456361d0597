"""Damaged checkpoints, models, deployments, engines, configs and inputs, to all that loads them.

    python tests/fuzz/fuzz_loaders.py --seconds 60

As ``fuzz_tables.py``: a case is a number, ``--target NAME --only NUMBER`` repeats it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from harness import Target, files_in, main
from safetensors.numpy import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests/support"))

from release_folders import write_model  # noqa: E402 - beside the tests, not installed

from hstu_trt.bench.files import read_tensors  # noqa: E402
from hstu_trt.bench.score import pack_file  # noqa: E402
from hstu_trt.bench.workloads.workload import _DTYPES as DTYPES  # noqa: E402
from hstu_trt.bench.workloads.workload import Workload  # noqa: E402
from hstu_trt.contract.config_json import load_config  # noqa: E402
from hstu_trt.contract.fp8_plan import Fp8Plan, fp8_sites, read_plan  # noqa: E402
from hstu_trt.contract.manifest import write_manifest  # noqa: E402
from hstu_trt.contract.model_folder import ModelFolder, read_model_folder, require_whole  # noqa: E402
from hstu_trt.contract.ops import EMBEDDING_LOOKUP, OP_DOMAIN  # noqa: E402
from hstu_trt.engines.build import ENGINES_KIND  # noqa: E402
from hstu_trt.engines.engine_folder import read_engine_file  # noqa: E402
from hstu_trt.engines.graphs import prepare, read_graph  # noqa: E402
from hstu_trt.export.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from hstu_trt.export.onnx_functions import embedding_function  # noqa: E402
from hstu_trt.serving.assemble import Options, assemble  # noqa: E402
from hstu_trt.serving.deployment import read_deployment  # noqa: E402
from hstu_trt.serving.lint import lint  # noqa: E402
from hstu_trt.tables.sources import open_matrix  # noqa: E402

CHECKPOINT, CASE = ROOT / "tests/golden/ckptA", ROOT / "tests/golden/caseA"


def read_all(checkpoint: Checkpoint) -> None:
    """Every row of every table."""
    for table in checkpoint.tables.values():
        for block in table.blocks():
            assert block.shape[1] == table.dim


def read_with_torch(file: str) -> Callable[[Path], None]:
    """What ``hstu-trt export --weights`` reads."""
    return lambda folder: read_all(load_checkpoint(folder / file))


def read_sources(file: str, table: str | None) -> Callable[[Path], None]:
    """What ``hstu-trt tables convert --table NAME=FILE`` reads, without PyTorch."""

    def read(folder: Path) -> None:
        source = open_matrix(folder / file, table)
        assert source.rows < 1 << 20
        for block in source.blocks("float32"):
            assert block.shape[1] == source.dim

    return read


def checkpoints(folder: Path) -> list[Target]:
    """A trainer's directory, a state dict by torch.save, new and old, and safetensors."""
    shutil.copytree(CHECKPOINT / "0/sparse", folder / "0/sparse")
    weight = torch.arange(12.0).reshape(4, 3)
    state = {"_a.weight": torch.ones(2), "_embedding_collection.embeddings.items.weight": weight}
    torch.save({"dense_dict": state, "step": 3}, folder / "0/non_sparse.ckpt")
    torch.save(state, folder / "state.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({name: tensor.numpy() for name, tensor in state.items()}, folder / "state.safetensors")
    np.save(folder / "items.npy", weight.numpy())
    trainer = ("0/non_sparse.ckpt", "0/sparse/.metadata", "0/sparse/__0_0.distcp")
    weights = {**dict.fromkeys(trainer, "."), **{name: name for name in ("state.pt", "old.pt", "state.safetensors")}}
    sources = {
        **dict.fromkeys(trainer, (".", "item_id")),
        "0/non_sparse.ckpt": (".", "items"),
        "state.safetensors": ("state.safetensors", "_embedding_collection.embeddings.items.weight"),
        "items.npy": ("items.npy", None),
    }
    return [
        *(Target(f"weights: {file}", folder, file, read_with_torch(path)) for file, path in weights.items()),
        *(Target(f"sources: {file}", folder, file, read_sources(*path)) for file, path in sources.items()),
    ]


def write_graph(path: Path) -> None:
    """One node of ours with its function body."""
    node = onnx.helper.make_node(EMBEDDING_LOOKUP.name, ["table", "ids"], ["rows"], domain=OP_DOMAIN, output_type=1)
    ports = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (("table", 1, [4, 3]), ("ids", 7, ["n"]), ("rows", 1, ["n", 3]))
    ]
    graph = onnx.helper.make_graph([node], "g", ports[:2], ports[2:])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid(OP_DOMAIN, 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[embedding_function()])
    path.write_bytes(model.SerializeToString())


def write_engines(folder: Path, model: ModelFolder) -> Path:
    """An engine that is none, under a manifest as a builder writes it."""
    folder.mkdir()
    (folder / "hstu.plan").write_bytes(b"plan")
    bounds = [[1], [2], [3]]
    profile = {"name": "single", "dims": {"users": [1, 1, 1]}, "shapes": {"x": bounds}}
    details = {"plugin_layers": 1, "profiles": [profile]}
    facts = {
        "builder": "tensorrt", "model": {"digest": model.digest}, "versions": {"tensorrt": "10.15.1"}, "options": {},
        "compute_capabilities": [90], "stages": [{"stage": "hstu", "file": "hstu.plan", "details": details}],
    }  # fmt: skip
    write_manifest(folder, kind=ENGINES_KIND, made_by="fuzz", files=["hstu.plan"], facts=facts)
    return folder


def read_engine(folder: Path, model: ModelFolder) -> None:
    """An engine's file is among those that were hashed."""
    found = read_engine_file(folder, "hstu", model)
    assert found.path.read_bytes() == b"plan", found.path


def models(folder: Path) -> list[Target]:
    """An exported model, a graph in it, a deployment and engines of it."""
    model = write_model(folder / "model", 1, "A")
    graphs = write_model(folder / "graphs", 1, "A")
    write_graph(graphs.onnx("hstu"))
    engines = write_engines(folder / "engines", model)
    deployment = assemble(model, folder / "deployment", Options())

    def read_model(path: Path) -> None:
        require_whole(read_model_folder(path))

    def read_onnx(path: Path) -> None:
        graph = read_graph(graphs, "hstu")
        for plugins in (True, False):
            prepare(graph, path, plugins=plugins)

    def read_configs(path: Path) -> None:
        read_deployment(path)
        lint(path / "models", model)

    def read_unverified(path: Path) -> None:
        lint(path / "models", model)

    configs = [file for file in files_in(deployment.path) if file.endswith("config.pbtxt")]
    return [
        Target("model folder", model.path, "manifest.json", read_model),
        Target("graph", graphs.path, "hstu.onnx", read_onnx),
        Target("engines", engines, "manifest.json", lambda path: read_engine(path, model)),
        Target("deployment", deployment.path, "manifest.json", read_configs),
        *(Target(f"lint: {file}", deployment.path, file, read_unverified) for file in configs),
    ]


def inputs(folder: Path) -> list[Target]:
    """Configs, plans of precision, and what is scored."""
    folder.mkdir()
    for name in ("config.json", "inputs.safetensors"):
        shutil.copy(CASE / name, folder)
    config = load_config(folder / "config.json")
    Fp8Plan(model="m", fp8=fp8_sites(config)[:2]).save(folder / "plan.json", "fuzz")
    one = {name: np.zeros(0, dtype) for name, dtype in DTYPES.items()}
    two = {"uih_off": np.asarray([0, 2]), "cand_off": np.asarray([0, 1]), "key": np.zeros((1, 2), np.int32)}
    lengths = {"user_id": 1, "query_time": 1, "uih_item": 2, "uih_weight": 2, "uih_ts": 2, "cand_item": 1}
    Workload(**one | two | {n: np.ones(count, DTYPES[n]) for n, count in lengths.items()}).save(folder / "w.npz")
    encoder = {"num_blocks": 2, "num_heads": 2, "attention_dim": 8, "linear_dim": 8, "embedding_dim": 16}
    (folder / "research.json").write_text(json.dumps({**encoder, "max_sequence_len": 5}))
    readers: dict[str, tuple[str, Callable[[Path], object]]] = {
        "config": ("config.json", load_config),
        "research config": ("research.json", load_config),
        "precision plan": ("plan.json", lambda path: read_plan(path, config)),
        "inputs of score": ("inputs.safetensors", lambda path: pack_file(config, path)),
        "tensors": ("inputs.safetensors", read_tensors),
        "workload": ("w.npz", Workload.load),
    }
    return [Target(name, folder, file, reading(file, read)) for name, (file, read) in readers.items()]


def reading(file: str, read: Callable[[Path], object]) -> Callable[[Path], None]:
    """Reads a file of a folder, and does nothing more with it."""

    def run(folder: Path) -> None:
        read(folder / file)

    return run


def targets(folder: Path) -> list[Target]:
    """All targets, their files below ``folder``."""
    return [*checkpoints(folder / "checkpoints"), *models(folder / "models"), *inputs(folder / "inputs")]


if __name__ == "__main__":
    sys.exit(main(__doc__, targets))
