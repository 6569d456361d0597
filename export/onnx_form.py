"""Which optional parts of the attention a model uses: what its ONNX function is made for."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from hstu_trt.contract.ops import HSTU_ATTENTION


@dataclass(frozen=True, kw_only=True)
class AttentionForm:
    """Which optional parts an attention node uses; nodes of one model must agree, since they share one body."""

    causal: bool = True
    window: bool = False
    contextual: bool = False
    full_tail: bool = False
    grouped: bool = False
    scaled: bool = False
    biased: bool = False
    quantised: bool = False
    """Tokens are e4m3."""

    @classmethod
    def of_node(cls, node: onnx.NodeProto) -> AttentionForm:
        """The form of an ``HstuAttention`` node."""
        values = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        given = {port.name for port, name in zip(HSTU_ATTENTION.inputs, node.input, strict=False) if name}
        return cls(
            causal=bool(values["causal"]),
            window=values["max_attn_len"] > 0,
            contextual=values["contextual_seq_len"] > 0,
            full_tail=values["min_full_attn_seq_len"] > 0,
            grouped=values["candidate_group_size"] > 1,
            scaled="attn_scale" in given,
            biased="position_bias" in given,
            quantised="q_scale" in given,
        )
