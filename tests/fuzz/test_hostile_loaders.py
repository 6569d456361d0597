"""What a hostile file must not do to who loads it: run, lead out of its folder, or take memory without bounds."""

import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fuzz_loaders import CHECKPOINT, targets, write_engines
from release_folders import write_model

from hstu_trt.bench.score import pack_file
from hstu_trt.bench.workloads.workload import Workload
from hstu_trt.contract.config_json import config_from_json, load_config
from hstu_trt.contract.errors import ArtefactError, ConfigError, HstuTrtError, InputError
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.ops import EMBEDDING_LOOKUP, OP_DOMAIN
from hstu_trt.contract.presets import debug
from hstu_trt.engines.engine_folder import read_engine_file
from hstu_trt.engines.graphs import read_graph
from hstu_trt.export.checkpoint import load_checkpoint
from hstu_trt.serving import pbtxt
from hstu_trt.tables.sources import open_matrix
from hstu_trt.tables.torch_files import read_archive

BOMB = 512 << 20


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def with_member(content, member, data):
    """A zip archive with another content of one member."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename.endswith(member) else old.read(info))
    return out.getvalue()


def in_a_state_dict(folder, evil):
    torch.save({"a": torch.ones(2)}, folder / "new.pt")
    (folder / "new.pt").write_bytes(with_member((folder / "new.pt").read_bytes(), "data.pkl", evil))
    (folder / "plain.pt").write_bytes(evil)
    return [lambda: load_checkpoint(folder / "new.pt"), lambda: load_checkpoint(folder / "plain.pt")]


def reads_of_trainer(folder):
    def read_all():
        for table in load_checkpoint(folder / "checkpoint").tables.values():
            list(table.blocks())

    return [read_all, lambda: open_matrix(folder / "checkpoint", "item_id")]


def in_dense_weights(folder, evil):
    file = shutil.copytree(CHECKPOINT, folder / "checkpoint") / "0/non_sparse.ckpt"
    file.write_bytes(with_member(file.read_bytes(), "data.pkl", evil))
    return reads_of_trainer(folder)


def in_an_index(folder, evil):
    (shutil.copytree(CHECKPOINT, folder / "checkpoint") / "0/sparse/.metadata").write_bytes(evil)
    return reads_of_trainer(folder)


def in_a_shard(folder, evil):
    file = shutil.copytree(CHECKPOINT, folder / "checkpoint") / "0/sparse/__0_0.distcp"
    file.write_bytes(evil + file.read_bytes()[len(evil) :])
    return reads_of_trainer(folder)


def in_arrays(folder, evil):
    hostile = np.asarray([[Evil(folder / "proof")]])
    np.save(folder / "rows.npy", hostile, allow_pickle=True)
    np.savez(folder / "w.npz", user_id=hostile)
    (folder / "raw.npz").write_bytes(evil)
    names = ("w.npz", "raw.npz")
    return [
        lambda: open_matrix(folder / "rows.npy"),
        *(lambda name=name: Workload.load(folder / name) for name in names),
    ]


@pytest.mark.parametrize("place", [in_a_state_dict, in_dense_weights, in_an_index, in_a_shard, in_arrays])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_never_runs(tmp_path, place, protocol):
    evil = pickle.dumps(Evil(tmp_path / "proof"), protocol)
    for read in place(tmp_path, evil):
        with pytest.raises(HstuTrtError):
            read()
    assert not (tmp_path / "proof").exists()
    pickle.loads(evil)
    assert (tmp_path / "proof").is_dir(), "it would have"


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", 1, "A")


@pytest.fixture
def engines(tmp_path, model):
    return write_engines(tmp_path / "engines", model)


def edit(folder, change):
    path = folder / "manifest.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("file", ["../plan", "/etc/hostname", "other.plan", "a\0b", ["hstu.plan"], None, "x" * 300])
def test_an_engine_is_a_file_that_was_hashed(tmp_path, model, engines, file):
    assert read_engine_file(engines, "hstu", model).path == engines / "hstu.plan"
    for place in (tmp_path / "plan", engines / "other.plan"):
        place.write_bytes(b"another")
    edit(engines, lambda d: d["stages"][0].update(file=file))
    with pytest.raises(ArtefactError, match=r"not among the manifest's files|malformed"):
        read_engine_file(engines, "hstu", model)


@pytest.mark.parametrize(
    "change", [{"builder": {}}, {"builder": ["tensorrt"]}, {"model": []}, {"model": None}], ids=str
)
def test_a_malformed_manifest_of_engines_is_refused(model, engines, change):
    edit(engines, lambda d: d.update(change))
    with pytest.raises(ArtefactError):
        read_engine_file(engines, "hstu", model)


def test_profiles_without_bounds_are_refused(model, engines):
    edit(engines, lambda d: d["stages"][0]["details"]["profiles"][0]["dims"].update(users=[1]))
    with pytest.raises(ArtefactError, match="malformed"):
        read_engine_file(engines, "hstu", model)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "a\0b", "x" * 300, "\ud800", ""])
def test_a_manifest_names_files_of_its_folder_only(model, name):
    edit(model.path, lambda d: d["files"].update({name: {"bytes": 1, "sha256": ""}}))
    with pytest.raises(ArtefactError):
        read_model_folder(model.path)


@pytest.mark.parametrize("config", ["text", None, [], 7, {"num_blocks": []}], ids=str)
def test_a_model_folder_with_another_thing_for_a_config(model, config):
    edit(model.path, lambda d: d.update(config=config))
    with pytest.raises(ArtefactError, match="malformed"):
        read_model_folder(model.path)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"\xff\xfe", b"", b"[]", b'{"num_blocks": 1, "max_sequence_len": {}}'], ids=len
)
def test_a_config_that_is_none(tmp_path, content):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"c\.json"):
        load_config(tmp_path / "c.json")


def test_numbers_beyond_all_integers():
    document = json.loads((CHECKPOINT.parent / "caseA/config.json").read_text())
    with pytest.raises(ConfigError, match="action weight inf is no bit mask"):
        config_from_json({**document, "action_weights": [float("inf")]})


@pytest.mark.parametrize("content", [b"\xff", b'name: "\xc3', b"input {" * 2000], ids=len)
def test_a_config_of_triton_that_is_no_text(tmp_path, content):
    (tmp_path / "config.pbtxt").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"config\.pbtxt"):
        pbtxt.read_config(tmp_path / "config.pbtxt")


def test_a_type_that_triton_does_not_have():
    assert pbtxt.type_name(64) == "unknown type 64"


def test_a_lookup_without_a_table(model):
    node = onnx.helper.make_node(EMBEDDING_LOOKUP.name, [], ["rows"], domain=OP_DOMAIN)
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], []))
    model.onnx("hstu").write_bytes(graph.SerializeToString())
    with pytest.raises(ArtefactError, match="looks up in no table"):
        read_graph(model, "hstu")


def npy(header):
    padded = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded


@pytest.mark.parametrize(
    "header",
    ["{'descr': '<f4', ", "\0", "{]", "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 9)}"],
    ids=["open", "nul", "unmatched", "huge"],
)
def test_headers_of_npy_files(tmp_path, header):
    (tmp_path / "x.npy").write_bytes(npy(header))
    with pytest.raises(ArtefactError, match=r"is not a \.npy file"):
        open_matrix(tmp_path / "x.npy")
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("user_id.npy", npy(header))
    with pytest.raises(InputError, match="is not a workload"):
        Workload.load(tmp_path / "w.npz")


@pytest.fixture
def little_memory():
    """Half of what a bomb unpacks to, more than there is now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BOMB // 2, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def write_bomb(archive, name, begin=b""):
    """A packed member that holds zeros beyond what the memory does."""
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    info._compresslevel = 1
    with archive.open(info, "w", force_zip64=True) as stream:
        stream.write(begin)
        for _ in range(BOMB >> 20):
            stream.write(bytes(1 << 20))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("member", ["byteorder", "data.pkl", "data/0"])
def test_a_checkpoint_that_is_packed(tmp_path, member):
    torch.save({"a": torch.ones(2)}, tmp_path / "state.pt")
    with zipfile.ZipFile(tmp_path / "state.pt") as old, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as new:
        for info in old.infolist():
            if info.filename.endswith(member):
                write_bomb(new, info.filename)
            else:
                new.writestr(info.filename, old.read(info))
    for read in (read_archive, load_checkpoint):
        with pytest.raises(ArtefactError, match="is compressed"):
            read(tmp_path / "bomb.pt")


@pytest.mark.usefixtures("little_memory")
def test_a_workload_that_is_packed(tmp_path):
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({BOMB},)}}"
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        write_bomb(archive, "user_id.npy", npy(header))
    with pytest.raises(InputError, match="compressed"):
        Workload.load(tmp_path / "w.npz")


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("shape", [[1 << 40], [1 << 62, 4], [-1], [0, 1 << 62]], ids=str)
def test_tensors_that_say_that_they_are_huge(tmp_path, shape):
    header = json.dumps({"uih.item_id.values": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}).encode()
    (tmp_path / "in.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(InputError):
        pack_file(debug(), tmp_path / "in.safetensors")
    with pytest.raises(HstuTrtError):
        load_checkpoint(tmp_path / "in.safetensors")


def test_all_targets_take_what_is_whole(tmp_path):
    found = targets(tmp_path)
    assert len({target.name for target in found}) == len(found)
    for target in found:
        target.read(target.folder)
