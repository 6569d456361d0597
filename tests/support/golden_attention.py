"""Golden caseC as calls of the op: tensors by port name in the split layout, options, expected outputs."""

from __future__ import annotations

from dataclasses import dataclass

import golden_cases as golden
import torch
from safetensors.torch import load_file
from torch import Tensor

TENSORS = load_file(golden.GOLDEN / "caseC" / "tensors.safetensors")
README = golden.readme("caseC")
SETTINGS = {case["name"]: case for case in README["cases"]}
DELTA_SETTINGS = {case["name"]: case for case in README["delta_cases"]}


@dataclass(frozen=True)
class GoldenCall:
    """A setting: tensors by port name, the op's attributes, and what the reference made of them in fp32."""

    tensors: dict[str, Tensor]
    case: dict
    expected: Tensor

    @property
    def attributes(self) -> dict[str, float | int]:
        """In the order of the op's spec, without the output's type."""
        return attributes(self.case)


def attributes(case: dict) -> dict[str, float | int]:
    """The op's attributes of a setting as JSON gives it."""
    return {
        "alpha": case["alpha"],
        "causal": int(case.get("causal", True)),
        "max_attn_len": case["max_attn_len"],
        "contextual_seq_len": case["contextual_seq_len"],
        "min_full_attn_seq_len": case.get("min_full_attn_seq_len", 0),
        "candidate_group_size": case.get("candidate_group_size", 1),
    }


def full_call(case: dict) -> GoldenCall:
    """A caseC setting in the split layout, and its expected output."""
    side = case["qkv"]
    bounds = TENSORS[f"{side}.seq_offsets"]
    candidates = TENSORS[case["num_targets"]] if case["num_targets"] else torch.zeros(len(bounds) - 1).long()
    lengths = bounds.diff()

    def split(x: Tensor) -> Tensor:
        return golden.to_split(x, lengths, candidates)

    prefix = golden.offsets(lengths - candidates)
    tensors = {name: split(TENSORS[f"{side}.{name}"]) for name in "qkv"}
    tensors |= {
        "query_offsets": prefix,
        "prefix_offsets": prefix,
        "candidate_offsets": golden.offsets(candidates),
        "norm": torch.tensor([float(case["max_seq_len_N"])]),
    }
    if case["attn_scale"]:
        scale = TENSORS[case["attn_scale"]].reshape(-1)
        tensors["attn_scale"] = split(scale) if scale.numel() > 1 else scale
    return GoldenCall(tensors, case, split(TENSORS[case["out"]]))


def delta_call(case: dict) -> GoldenCall:
    """A caseC delta setting: only the last tokens of each user query; candidates before them are nobody's keys."""
    bounds, delta = TENSORS["d.seq_offsets"], case["delta_size"]
    lengths = bounds.diff()
    candidates = TENSORS[case["num_targets"]] if case["num_targets"] else torch.zeros(len(lengths)).long()
    queried = candidates.clamp(max=delta)
    prefix = lengths - candidates
    keep = torch.cat(
        [(torch.arange(n) < p) | (torch.arange(n) >= n - c) for n, p, c in zip(lengths, prefix, queried, strict=True)]
    )

    def keys(x: Tensor) -> Tensor:
        return golden.to_split(x[keep], prefix + queried, queried)

    def queries(x: Tensor) -> Tensor:
        return golden.to_split(x, torch.full_like(lengths, delta), queried)

    tensors = {
        "q": queries(TENSORS["d.delta_q"]),
        "k": keys(TENSORS["d.k"]),
        "v": keys(TENSORS["d.v"]),
        "query_offsets": golden.offsets(delta - queried),
        "prefix_offsets": golden.offsets(prefix),
        "candidate_offsets": golden.offsets(queried),
        "norm": torch.tensor([float(case["max_seq_len_N"])]),
    }
    return GoldenCall(tensors, case, queries(TENSORS[case["out"]]))
