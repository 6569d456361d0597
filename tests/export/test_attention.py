"""The attention op against golden caseC: in PyTorch, and as an ONNX function in ONNX Runtime."""

from __future__ import annotations

import golden_cases as golden
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from golden_attention import DELTA_SETTINGS, SETTINGS, TENSORS, GoldenCall, attributes, delta_call, full_call
from onnx import TensorProto, helper
from torch import Tensor

from hstu_trt.contract.numerics import TOLERANCES, compare
from hstu_trt.contract.ops import HSTU_ATTENTION, OP_DOMAIN
from hstu_trt.export import torch_ops  # noqa: F401
from hstu_trt.export.attention import MaskOptions, reference_attention, valid_pairs
from hstu_trt.export.onnx_functions import OPSET, add_functions


class Call:
    """One call of the op: its tensors by port name, and its attributes."""

    def __init__(self, tensors: dict[str, Tensor], case: dict) -> None:
        self.tensors = tensors
        self.attributes = attributes(case)

    def torch(self, dtype: torch.dtype = torch.float32) -> Tensor:
        ports = [self.tensors.get(port.name) for port in HSTU_ATTENTION.inputs]
        attributes = {**self.attributes, "causal": bool(self.attributes["causal"])}
        return torch.ops.hstu_trt.attention(*ports, *attributes.values(), dtype)

    def onnx(self) -> np.ndarray:
        feed = {name: tensor.numpy() for name, tensor in self.tensors.items()}
        names = [port.name if port.name in feed else "" for port in HSTU_ATTENTION.inputs]
        while names and not names[-1]:
            names.pop()
        node = helper.make_node(
            "HstuAttention", names, ["out"], domain=OP_DOMAIN, output_type=TensorProto.FLOAT, **self.attributes
        )
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim)
            for name, a in feed.items()
        ]
        output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [None] * 3)
        model = helper.make_model(
            helper.make_graph([node], "attention", inputs, [output]),
            opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(OP_DOMAIN, 1)],
            ir_version=10,
        )
        add_functions(model)
        onnx.checker.check_model(model, full_check=True)
        return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def check(actual: np.ndarray, expected: Tensor) -> None:
    report = compare("attention", actual, expected.numpy())
    assert report.passes(TOLERANCES["attention", "fp32"]), report.text()


def check_golden(golden_call: GoldenCall, engine: str) -> None:
    call = Call(golden_call.tensors, golden_call.case)
    check(np.asarray(getattr(call, engine)()), golden_call.expected)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_golden_settings(name: str, engine: str) -> None:
    check_golden(full_call(SETTINGS[name]), engine)


@pytest.mark.parametrize("name", DELTA_SETTINGS)
@pytest.mark.parametrize("engine", ["torch", "onnx"])
def test_golden_delta_settings(name: str, engine: str) -> None:
    check_golden(delta_call(DELTA_SETTINGS[name]), engine)


@pytest.mark.parametrize("name", SETTINGS)
def test_masks_are_the_references(name: str) -> None:
    case = SETTINGS[name]
    packed = np.load(golden.GOLDEN / "caseC" / "masks_packed.npz")[case["mask_key"]]
    reference = np.unpackbits(packed, axis=-1)[..., : case["mask_shape"][-1]].astype(bool)
    bounds = TENSORS[f"{case['qkv']}.seq_offsets"]
    candidates = TENSORS[case["num_targets"]] if case["num_targets"] else torch.zeros(len(bounds) - 1).long()
    options = MaskOptions(
        causal=case["causal"],
        max_attn_len=case["max_attn_len"],
        contextual_seq_len=case["contextual_seq_len"],
        min_full_attn_seq_len=case["min_full_attn_seq_len"],
    )
    for user, (length, count) in enumerate(zip(bounds.diff().tolist(), candidates.tolist(), strict=True)):
        ours = valid_pairs(torch.arange(length), length - count, count, options).numpy()
        theirs = np.broadcast_to(reference, case["mask_shape"])[user, :length, :length]
        np.testing.assert_array_equal(ours, theirs)


def random_call(lengths: list[int], candidates: list[int], queried: list[int], **options: int) -> Call:
    """Seeded inputs for users with these prefix lengths, candidate counts and queried prefix rows."""
    generator = torch.Generator().manual_seed(sum(lengths) + 7 * sum(candidates))
    rows, keys = sum(queried) + sum(candidates), sum(lengths) + sum(candidates)
    case = {"alpha": 0.3, "max_attn_len": 0, "contextual_seq_len": 0, **options}
    tensors = {
        "q": torch.randn(rows, 2, 8, generator=generator),
        "k": torch.randn(keys, 2, 8, generator=generator),
        "v": torch.randn(keys, 2, 12, generator=generator),
        "query_offsets": golden.offsets(torch.tensor(queried)),
        "prefix_offsets": golden.offsets(torch.tensor(lengths)),
        "candidate_offsets": golden.offsets(torch.tensor(candidates)),
        "norm": torch.arange(10.0, 10.0 + len(lengths)),
    }
    return Call(tensors, case)


ODD_SHAPES = {
    "one token": ([1], [0], [1]),
    "only candidates": ([0], [5], [0]),
    "empty user between": ([3, 0, 4], [2, 0, 1], [3, 0, 4]),
    "candidate queries only": ([7, 2], [3, 4], [0, 0]),
    "some prefix rows": ([7, 2, 9], [3, 0, 4], [2, 2, 0]),
}


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_attn_len": 2, "min_full_attn_seq_len": 1},
        {"contextual_seq_len": 1},
        {"candidate_group_size": 2},
        {"candidate_group_size": 3, "max_attn_len": 1, "contextual_seq_len": 2},
    ],
)
def test_onnx_agrees_on_odd_shapes(shape: str, options: dict[str, int]) -> None:
    call = random_call(*ODD_SHAPES[shape], **options)
    check(call.onnx(), call.torch())


def test_a_candidate_sees_the_earlier_ones_of_its_group() -> None:
    position, options = torch.arange(3, 8), MaskOptions(candidate_group_size=2, max_attn_len=1)
    among_candidates = valid_pairs(position, 3, 5, options)[:, 3:]
    groups = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    assert among_candidates.int().tolist() == groups
    prefix = valid_pairs(position, 3, 5, options)[:, :3]
    assert prefix.equal(valid_pairs(position, 3, 5, MaskOptions(max_attn_len=1))[:, :3])


def test_no_rows_at_all() -> None:
    """In PyTorch only: ONNX Runtime divides by zero there, so the contract asks for a candidate."""
    assert random_call([0, 0], [0, 0], [0, 0]).torch().shape == (0, 2, 12)


def test_norm_per_user_is_each_users_norm() -> None:
    both = random_call([4, 6], [2, 3], [4, 6])
    solo = random_call([4, 6], [2, 3], [4, 6])
    solo.tensors["norm"] = both.tensors["norm"][1:]
    rows = [4, 5, 6, 7, 8, 9, 12, 13, 14]
    torch.testing.assert_close(both.torch()[rows], solo.torch()[rows])
    check(both.onnx(), both.torch())


def test_nodes_of_one_model_must_share_a_form() -> None:
    def node(window: int) -> onnx.NodeProto:
        return helper.make_node(
            "HstuAttention", ["q", "k", "v"], ["o"], domain=OP_DOMAIN,
            alpha=1.0, causal=1, max_attn_len=window, contextual_seq_len=0, min_full_attn_seq_len=0,
            candidate_group_size=1, output_type=1,
        )  # fmt: skip

    graph = helper.make_graph([node(0), node(4)], "two", [], [])
    with pytest.raises(ValueError, match="different options"):
        add_functions(helper.make_model(graph))


def test_e4m3_tokens_and_their_scales_answer_for_real_values() -> None:
    from hstu_trt.export import torch_ops as _  # noqa: F401

    generator = torch.Generator().manual_seed(1)
    stored = [(torch.randn(6, 2, dim, generator=generator) * 3).to(torch.float8_e4m3fn) for dim in (8, 8, 4)]
    scales = [torch.tensor([0.5]), torch.tensor([0.25, 2.0]), torch.tensor([4.0, 0.125])]
    offsets = [torch.tensor([0, 2, 4], dtype=torch.int32)] * 2 + [torch.tensor([0, 1, 2], dtype=torch.int32)]
    norm, rest = torch.tensor([8.0]), (0.3, True, 0, 0, 0, 1, torch.float32)
    real = [tensor.float() * scale.view(-1, 1) for tensor, scale in zip(stored, scales, strict=True)]
    op = torch.ops.hstu_trt.attention
    out = op(*stored, *offsets, norm, *scales, *[None] * 5, *rest)
    expected = reference_attention(
        *real, tuple(offsets), 1 / norm, alpha=0.3, mask=MaskOptions(), weights_dtype=torch.float8_e4m3fn
    )
    torch.testing.assert_close(out, expected)
    exact = op(*real, *offsets, norm, *[None] * 8, *rest)
    assert 0 < (out - exact).norm() <= 2**-4 * exact.norm(), "the weights are rounded to e4m3, as the kernels do"
