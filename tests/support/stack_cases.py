"""Golden caseD: a stack of two layers with its inputs, its cache and its outputs."""

from __future__ import annotations

import dataclasses

from golden_cases import GOLDEN, load_case, readme
from safetensors.torch import load_file
from torch import Tensor

from hstu_trt.contract.model import AttentionOptions
from hstu_trt.export.layers import StuStack
from hstu_trt.export.weights import load_dense

STACK_CASES = readme("caseD")["cases"]


def stack_case(name: str) -> tuple[StuStack, dict[str, Tensor], dict]:
    tensors = {
        k.removeprefix(f"{name}."): v
        for k, v in load_file(GOLDEN / "caseD/tensors.safetensors").items()
        if k.startswith(f"{name}.")
    }
    facts = STACK_CASES[name]
    config = dataclasses.replace(
        load_case("caseA").config,
        layers=2, heads=2, qk_dim=16, v_dim=32, model_dim=32, group_norm=facts["group_norm"],
        attention=AttentionOptions(
            alpha=facts["alpha"], max_attn_len=facts["max_attn_len"], contextual_seq_len=facts["contextual_seq_len"]
        ),
    )  # fmt: skip
    weights = {k.removeprefix("sd."): v for k, v in tensors.items() if k.startswith("sd.")}
    return load_dense(StuStack(config), weights, name).eval(), tensors, facts
