"""The torch ops without a GPU: registration, schemas, fake implementations, and what is checked before a launch."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from attention_calls import assemble
from attention_inputs import DTYPES, Case, User, make_tokens
from attention_stand_in import StandIn
from torch import Tensor

from hstu_trt.contract.errors import ArtefactError, InputError
from hstu_trt.contract.ops import HSTU_ATTENTION
from hstu_trt.export import torch_ops as export_ops
from hstu_trt.plugins import embedding, torch_ops
from hstu_trt.plugins.attention import AttentionPlan, pack_values, quantise, unsupported
from hstu_trt.plugins.library import AttentionParams, KernelLibrary, UnsupportedError
from hstu_trt.plugins.parameters import AttentionCall, Cache, Offsets, Scales

CASE = Case(seed=1, users=(User(0, 5, 5, 2), User(0, 3, 3, 1)), qk_dim=64, v_dim=32)


def make_call(case: Case = CASE) -> AttentionCall:
    return assemble(case, make_tokens(case, "cpu"), range(len(case.users)), StandIn().pack)


@pytest.mark.parametrize("order", [("export", "plugins"), ("plugins", "export")])
def test_either_room_may_be_imported_first(order: tuple[str, str]) -> None:
    code = (
        "import importlib, torch\n"
        f"for room in {order!r}: importlib.import_module(f'hstu_trt.{{room}}.torch_ops')\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print([has('hstu_trt::attention', key) for key in ('CUDA', 'CPU', 'Meta')])\n"
        "print(has('hstu_trt::attention', 'CompositeExplicitAutograd'))\n"
        "print([has('hstu_trt::embedding_lookup', key) for key in ('CUDA', 'CPU', 'Meta')])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[True, False, True]", "True", "[True, False, True]"]


@pytest.mark.parametrize("name", ["attention", "embedding_lookup"])
def test_the_cuda_kernel_takes_what_the_schema_says(name: str) -> None:
    ours, theirs = getattr(torch_ops, name), getattr(export_ops, name)
    schema = getattr(torch.ops.hstu_trt, name).default._schema
    assert [argument.name for argument in schema.arguments] == list(inspect.signature(ours).parameters)
    assert inspect.signature(ours) == inspect.signature(theirs._init_fn)


IDS, TABLE = torch.tensor([1, 2]), torch.zeros(3, 8)


@pytest.mark.parametrize(
    ("ids", "table", "dtype", "error", "said"),
    [
        (IDS.float(), TABLE, torch.float32, InputError, "ids must be int32 or int64"),
        (IDS[None], TABLE, torch.float32, InputError, "ids must be int32 or int64"),
        (IDS, TABLE[0], torch.float32, InputError, "the table .rows, dim."),
        (IDS.to("meta"), TABLE, torch.float32, InputError, "ids are on meta"),
        (IDS, TABLE.double(), torch.float32, UnsupportedError, "float64 is no type"),
        (IDS, TABLE, torch.int8, UnsupportedError, "the output is fp32, fp16 or bf16"),
        (IDS, TABLE, torch.bfloat16, InputError, "are on cpu: this lookup runs on a CUDA GPU"),
        (IDS, TABLE[:, :0], torch.float32, UnsupportedError, "dim must be at least 1"),
    ],
)
def test_lookups_that_cannot_be_done(
    library: KernelLibrary, ids: Tensor, table: Tensor, dtype: torch.dtype, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        embedding.lookup(ids, table, dtype)


def test_ops_carry_the_specs_names() -> None:
    names = [port.name for port in HSTU_ATTENTION.inputs] + [a.name for a in HSTU_ATTENTION.attributes[:-1]]
    arguments = {argument.name for argument in torch.ops.hstu_trt.cached_attention.default._schema.arguments}
    bias = {"position_bias", "time_bias", "query_timestamps", "key_timestamps"}
    assert set(names) - bias <= arguments


OPTIONS = (0.1, True, 0, 0, 0, 1)


def meta(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def offsets(users: int) -> list[Tensor]:
    return [meta(users + 1, dtype=torch.int32) for _ in range(3)]


def test_fakes_tell_shape_and_type() -> None:
    e4m3, one, ops = torch.float8_e4m3fn, meta(1, dtype=torch.float32), torch.ops.hstu_trt
    q, k, v = meta(9, 2, 64, dtype=e4m3), meta(20, 2, 64, dtype=e4m3), meta(20, 2, 32, dtype=e4m3)
    fp8 = ops.attention(q, k, v, *offsets(3), one, one, one, one, *[None] * 5, *OPTIONS, torch.bfloat16)
    assert (fp8.shape, fp8.dtype) == ((9, 2, 32), torch.bfloat16)
    blocks = ops.pack_values(v, *offsets(3)[:2])
    assert (blocks.shape, blocks.dtype) == ((6, 2, 32, 128), e4m3)
    packed = ops.attention(q, k, blocks, *offsets(3), one, one, one, one, *[None] * 5, *OPTIONS, torch.float16)
    assert packed.shape == (9, 2, 32)
    half = [meta(rows, 2, dim) for rows, dim in ((9, 64), (9, 64), (9, 32), (50, 64), (50, 32))]
    cached_offsets, *rest = meta(4, dtype=torch.int32), *offsets(3)
    cached = ops.cached_attention(
        *half, cached_offsets, None, *rest, one, None, None, None, None, *OPTIONS, torch.float32
    )
    assert (cached.shape, cached.dtype) == ((9, 2, 32), torch.float32)


def test_the_exported_op_traces_on_cuda_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, v = (torch.empty(9, 2, dim, dtype=torch.float16, device="cuda") for dim in (64, 32))
        bounds, one = torch.empty(4, dtype=torch.int32, device="cuda"), torch.empty(1, device="cuda")
        out = torch.ops.hstu_trt.attention(
            q, q, v, bounds, bounds, bounds, one, *[None] * 8, *OPTIONS, torch.float32
        )  # fmt: skip
    assert (out.shape, out.dtype, out.device.type) == ((9, 2, 32), torch.float32, "cuda")


def change(call: AttentionCall, **changes: object) -> AttentionCall:
    return dataclasses.replace(call, **changes)  # type: ignore[arg-type]


WRONG = {
    "int64 offsets": (
        lambda c: change(c, offsets=c.offsets._replace(query=c.offsets.query.long())),
        "query_offsets is",
    ),
    "offsets of other users": (lambda c: change(c, offsets=Offsets(*c.offsets[:2], c.offsets[0][:2])), "shape"),
    "other type of k": (lambda c: change(c, k=c.k.float()), "k is torch.float32"),
    "keys of other heads": (lambda c: change(c, k=c.k[:, :1]), "k has shape"),
    "fewer values": (lambda c: change(c, v=c.v[1:]), "v has shape"),
    "fp16 norm": (lambda c: change(c, norm=c.norm.half()), "norm is"),
    "scale per head": (lambda c: change(c, attn_scale=torch.ones(4)), "attn_scale has shape"),
    "transposed q": (lambda c: change(c, q=c.q.transpose(0, 2).contiguous().transpose(0, 2)), "side by side"),
    "scales of fp16": (lambda c: change(c, scales=Scales(*[torch.ones(1)] * 3)), "belong to float8"),
    "cache of other heads": (lambda c: change(c, cache=Cache(k=c.k[:, :1], v=c.v, offsets=c.offsets[0])), "cached_k"),
    "int8 tokens": (
        lambda c: change(c, q=c.q.to(torch.int8), k=c.k.to(torch.int8), v=c.v.to(torch.int8)),
        "no type of",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_tensors_are_named(wrong: str) -> None:
    spoil, said = WRONG[wrong]
    call = spoil(make_call())
    with pytest.raises(InputError, match=said):
        call.params(call.empty_output(torch.float16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["packed", "padded", "uvqk", "odd"])
@pytest.mark.parametrize("cache", ["none", "contiguous", "paged"])
def test_parameters_point_at_the_views(dtype: str, layout: str, cache: str) -> None:
    """Nothing is copied: strides and addresses are those of the tensors."""
    users = tuple(dataclasses.replace(user, cached=130 if cache != "none" else 0) for user in CASE.users)
    call = make_call(dataclasses.replace(CASE, users=users, dtype=dtype, layout=layout, cache=cache))
    out = call.empty_output(torch.float32)
    params = call.params(out)
    for name, tensor in (("q", call.q), ("k", call.k), ("v", call.v), ("out", out)):
        ours = getattr(params, name)
        assert (ours.data, ours.row_stride, ours.head_stride) == (tensor.data_ptr(), *tensor.stride()[:2])
    assert (params.users, params.heads, params.qk_dim, params.v_dim) == (2, 2, 64, 32)
    assert (params.query_rows, params.key_rows) == (11, 11)
    if call.cache is not None:
        assert params.cached_k.data == call.cache.k.data_ptr()
        assert params.cached_rows == (260 if cache == "contiguous" else 5 * 128)
        assert params.cached_k.row_stride == 128


def plan_params(**changes: object) -> AttentionParams:
    call = make_call()
    params = call.params(call.empty_output(torch.float16))
    for name, value in changes.items():
        setattr(params, name, value)
    return params


def test_a_plan_is_reused_by_calls_like_the_first(library: KernelLibrary) -> None:
    plan, device = AttentionPlan(), torch.device("cpu")
    first, second = plan_params(), plan_params()
    second.query_offsets, second.prefix_offsets, second.candidate_offsets = (
        first.query_offsets, first.prefix_offsets, first.candidate_offsets
    )  # fmt: skip
    plan.fit(first, library, "smxx", device)
    assert plan.fit(second, library, "smxx", device) is not None and not second.reuse_plan, "no launch has built it yet"
    plan.made_by(make_call())
    assert plan.fit(second, library, "smxx", device) is plan.fit(second, library, "smxx", device)
    assert (first.reuse_plan, second.reuse_plan) == (0, 1)
    with pytest.raises(InputError, match="make another one"):
        plan.fit(plan_params(max_attn_len=3), library, "smxx", device)
    with pytest.raises(InputError, match="make another one"):
        plan.fit(second, library, "fp32", device)


def test_pages_that_do_not_follow_each_other_are_refused() -> None:
    call = make_call()
    heads, dim = call.q.shape[1:]
    pool = torch.zeros((3, 2, 64, heads, dim), dtype=call.q.dtype)  # [pages, layers, page size, heads, dim]
    table, cached = torch.zeros((call.users, 2), dtype=torch.int32), torch.zeros(call.users + 1, dtype=torch.int32)
    paged = dataclasses.replace(
        call,
        cache=Cache(
            k=pool[:, 0],
            v=torch.zeros((3, 64, heads, call.v_dim), dtype=call.v.dtype),
            offsets=cached,
            page_table=table,
        ),
    )
    with pytest.raises(InputError, match="cached_k: pages must follow each other"):
        paged.params(paged.empty_output(torch.float16))


def test_a_call_can_be_asked_about_without_a_gpu(library: KernelLibrary) -> None:
    assert unsupported(make_call(), "smxx", capability=90) is None
    assert "smxx" in (unsupported(make_call(), "smxx", capability=75) or "")


def test_quantised_values_are_near() -> None:
    x = torch.randn(50, 3, 16) * torch.tensor([1.0, 100.0, 1e-3])[:, None]
    for per_head in (False, True):
        stored, scale = quantise(x, per_head=per_head)
        assert stored.dtype == torch.float8_e4m3fn and scale.shape == (3 if per_head else 1,)
        real = stored.float() * scale[:, None]
        heads = [0, 1, 2] if per_head else [1]
        assert ((real - x).norm(dim=(0, 2)) / x.norm(dim=(0, 2)))[heads].max() < 0.04
    assert quantise(x[:0])[1].isfinite().all()


UNPACKABLE = {
    "an odd v_dim": lambda v: v[..., :30],
    "odd strides": lambda v: v.view(torch.uint8).as_strided((8, 2, 32), (65, 32, 1)).view(v.dtype),
    "an odd address": lambda v: v.view(torch.uint8).flatten()[2:-62].view(v.dtype).unflatten(0, (-1, 2, 32)),
}


@pytest.mark.parametrize("spoil", UNPACKABLE)
def test_values_that_cannot_be_packed_are_refused(spoil: str) -> None:
    v = UNPACKABLE[spoil](torch.zeros(11, 2, 32, dtype=torch.uint8).view(torch.float8_e4m3fn))
    with pytest.raises(UnsupportedError, match="must be 4-byte aligned, v_dim and their strides multiples of 4; here"):
        pack_values(v, torch.tensor([0, 3]).int(), torch.tensor([0, 2]).int())


def test_a_missing_library_is_said_where_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> KernelLibrary:
        raise ArtefactError("planted")

    monkeypatch.setattr("hstu_trt.plugins.attention.load_library", missing)
    with pytest.raises(ArtefactError, match="planted"):
        unsupported(make_call(), capability=90)
