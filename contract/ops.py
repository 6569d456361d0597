"""Op specs: the two custom ops, as ONNX nodes, torch ops and TensorRT plugins all know them.

``HstuAttention`` works on the split token layout. Keys and values hold all prefixes (contextual + history), user after
user, then all candidates, user after user. Queries hold the last ``query_offsets[b+1] - query_offsets[b]`` prefix
tokens of each user (all of them, or none in a candidates-only layer), then all candidates. With query i and key j of
one user:

    out_i = sum_j SiLU(alpha * q_i.k_j + bias_ij) * mask_ij * v_j / N

A candidate sees its user's prefix and itself, and where ``candidate_group_size`` is g > 1, also the earlier candidates
of its group: a user's candidates 0 to g-1 are one group, g to 2g-1 the next. The mask's other options are those of the
reference (``AttentionOptions``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

OP_DOMAIN = "hstu.trt"
"""ONNX domain and TensorRT plugin namespace."""
OP_VERSION = "1"
TORCH_NAMESPACE = "hstu_trt"


@dataclass(frozen=True)
class TensorPort:
    """An input or output of an op. ``dims`` are symbols shared within the op."""

    name: str
    dtypes: tuple[str, ...]
    dims: str
    doc: str
    optional: bool = False


@dataclass(frozen=True)
class Attribute:
    """An attribute of an op and a field of its plugin."""

    name: str
    kind: Literal["int", "float", "string"]
    default: int | float | str
    doc: str
    optional: bool = False
    """Nodes may leave it out; those that carry it are for the plugin alone, and function bodies know nothing of it."""


@dataclass(frozen=True)
class OpSpec:
    """A custom op: ``domain::name``, version "1"."""

    name: str
    inputs: tuple[TensorPort, ...]
    outputs: tuple[TensorPort, ...]
    attributes: tuple[Attribute, ...]
    domain: str = field(default=OP_DOMAIN, init=False)
    version: str = field(default=OP_VERSION, init=False)

    @property
    def plugin_attributes(self) -> dict[str, str]:
        """What each node carries so that a TensorRT parser picks the plugin over the function body."""
        return {"plugin_version": self.version, "plugin_namespace": self.domain}


_FLOATS = ("float16", "bfloat16", "float32")
_TOKENS = (*_FLOATS, "float8_e4m3fn")
_SCALE_DOC = "of e4m3 tokens: real value = stored value * scale; all three scales are given, or none"
_BIAS_DOC = "relative attention bias; both tables and both timestamps are given, or none"

HSTU_ATTENTION = OpSpec(
    "HstuAttention",
    inputs=(
        TensorPort("q", _TOKENS, "[Tq, H, Dqk]", "queries: prefix rows in use, then all candidates"),
        TensorPort("k", _TOKENS, "[Tk, H, Dqk]", "keys: all prefixes, then all candidates"),
        TensorPort("v", _TOKENS, "[Tk, H, Dv]", "values, as the keys"),
        TensorPort("query_offsets", ("int32",), "[B+1]", "prefix rows of q per user, the last ones of the prefix"),
        TensorPort("prefix_offsets", ("int32",), "[B+1]", "prefix rows of k and v per user"),
        TensorPort("candidate_offsets", ("int32",), "[B+1]", "candidates per user"),
        TensorPort("norm", ("float32",), "[1] or [B]", "N: the output is divided by it"),
        TensorPort("q_scale", ("float32",), "[1] or [H]", _SCALE_DOC, optional=True),
        TensorPort("k_scale", ("float32",), "[1] or [H]", _SCALE_DOC, optional=True),
        TensorPort("v_scale", ("float32",), "[1] or [H]", _SCALE_DOC, optional=True),
        TensorPort("attn_scale", ("float32",), "[1] or [Tq]", "multiplies the output instead of 1/N", optional=True),
        TensorPort("position_bias", ("float32",), "[2P-1]", _BIAS_DOC, optional=True),
        TensorPort("time_bias", ("float32",), "[buckets+1]", _BIAS_DOC, optional=True),
        TensorPort("query_timestamps", ("int64",), "[Tq]", "seconds; of the token after the query", optional=True),
        TensorPort("key_timestamps", ("int64",), "[Tk]", "seconds; of the key", optional=True),
    ),
    outputs=(TensorPort("out", _FLOATS, "[Tq, H, Dv]", "attention output, rows as in q"),),
    attributes=(
        Attribute("alpha", "float", 1.0, "factor on q.k"),
        Attribute("causal", "int", 1, "0: a token also sees later tokens of its user"),
        Attribute("max_attn_len", "int", 0, "window in tokens; 0: none"),
        Attribute("contextual_seq_len", "int", 0, "leading prefix tokens with full attention"),
        Attribute("min_full_attn_seq_len", "int", 0, "newest tokens exempt from the window"),
        Attribute("candidate_group_size", "int", 1, "a candidate sees the earlier candidates of its group"),
        Attribute("output_type", "int", 1, "ONNX element type of the output: 1 float32, 10 float16, 16 bfloat16"),
    ),
)

EMBEDDING_LOOKUP = OpSpec(
    "EmbeddingLookup",
    inputs=(
        TensorPort("ids", ("int32", "int64"), "[n]", "row numbers; outside [0, rows) the policy's row"),
        TensorPort(
            "table", ("float16", "float32"), "[rows, dim]", "the table; a plugin finds it by table_name instead"
        ),
    ),
    outputs=(
        TensorPort("rows", ("float16", "float32"), "[n, dim]", "table rows"),
        TensorPort("row_status", ("int32",), "[n]", "where each row came from (RowStatus)", optional=True),
    ),
    attributes=(
        Attribute("table_name", "string", "", "the table's name in the tables room"),
        Attribute("output_type", "int", 1, "ONNX element type of the output: 1 float32, 10 float16"),
        Attribute(
            "policy",
            "string",
            "zero",
            "of bad ids: reject (zeros, the status tells), zero, clamp, row0, default_row",
            optional=True,
        ),
        Attribute("has_padding", "int", 0, "1: padding_id answers zeros and is no bad id", optional=True),
        Attribute("padding_id", "int", 0, "counts with has_padding", optional=True),
        Attribute("status", "int", 0, "1: the second output is there", optional=True),
    ),
)

OPS = {spec.name: spec for spec in (HSTU_ATTENTION, EMBEDDING_LOOKUP)}

# The research family's time bucket: trunc(ln(max(|dt|, 1)) / 0.301), clamped to the table, as in
# research/modeling/sequential/hstu.py of the reference (``export/model.py`` names its repository and commit).
RESEARCH_TIME_BUCKET_DIVISOR = 0.301
