"""A call of HSTU attention as tensors, and the AttentionParams that the library takes.

Tensors are views of any strides but for the last axis, which is contiguous. Shapes: Tq query rows, Tk key rows, B
users, H heads, Dqk and Dv the dims of a head; kernels/attention/params.h says which rows those are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.plugins.library import DATA_TYPES, AttentionParams, TokenTensor
from hstu_trt.plugins.tensors import type_name

# Name, tensor, its type, and the shapes that it may have.
_Expected = tuple[Any, ...]

VALUE_BLOCK_KEYS = 128
"""Keys of a value block: kValueBlockKeys of kernels/attention/value_blocks.h."""


class Offsets(NamedTuple):
    """INT32 [B+1] each: rows of each user among the prefix rows of q, the prefix rows of k and v, the candidates."""

    query: Tensor
    prefix: Tensor
    candidate: Tensor


@dataclass(frozen=True)
class AttentionOptions:
    """Attributes of the op (``contract/ops.py``)."""

    alpha: float = 1.0
    causal: bool = True
    max_attn_len: int = 0
    contextual_seq_len: int = 0
    min_full_attn_seq_len: int = 0
    candidate_group_size: int = 1


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of earlier tokens, which stand before the prefix rows of the call.

    Contiguous: k [rows, H, Dqk], v [rows, H, Dv], each user's rows by ``offsets``. Paged: k [pages, page size, H, Dqk],
    v [pages, page size, H, Dv]; page n of a user is ``page_table[user, n]``, INT32 [B, pages per user]. An fp8 cache
    keeps v as value blocks: [blocks, H, Dv, 128], with pages of 128 tokens, one block each.
    """

    k: Tensor
    v: Tensor
    offsets: Tensor
    """INT32 [B+1]: cached tokens of each user."""
    page_table: Tensor | None = None


class Scales(NamedTuple):
    """fp32 [1] or [H]: a real value is the stored e4m3 value times its scale."""

    q: Tensor
    k: Tensor
    v: Tensor


class RelativeBias(NamedTuple):
    """Bias tables of the HSTU paper and INT64 seconds: of the token after each query, and of each key."""

    position: Tensor
    time: Tensor
    query_timestamps: Tensor
    key_timestamps: Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Inputs of one call. q [Tq, H, Dqk], k [Tk, H, Dqk], v [Tk, H, Dv] or, in fp8, value blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    offsets: Offsets
    norm: Tensor
    """fp32 [1] or [B]: N."""
    options: AttentionOptions = field(default_factory=AttentionOptions)
    attn_scale: Tensor | None = None
    """fp32 [1] or [Tq]: multiplies the output instead of 1/N."""
    cache: Cache | None = None
    scales: Scales | None = None
    bias: RelativeBias | None = None
    whole_items: bool = False
    """Never cut long rows of keys over multiprocessors. Small calls take longer, and a user's bits are the same in any
    batch; else they depend on how many parts the whole batch makes it worth to cut."""

    @property
    def users(self) -> int:
        return self.offsets.prefix.shape[0] - 1

    @property
    def is_fp8(self) -> bool:
        return self.q.dtype == torch.float8_e4m3fn

    @property
    def packed_values(self) -> bool:
        return self.v.dim() == 4

    @property
    def v_dim(self) -> int:
        return self.v.shape[2]

    def empty_output(self, dtype: torch.dtype) -> Tensor:
        """[Tq, H, Dv], not filled."""
        return self.q.new_empty((self.q.shape[0], self.q.shape[1], self.v_dim), dtype=dtype)

    def params(self, out: Tensor) -> AttentionParams:
        """What the library takes, but for the workspace. Raises InputError for tensors of a wrong type or shape."""
        self._check(out)
        params = AttentionParams(
            q=_tokens(self.q), k=_tokens(self.k), v=_tokens(self.v), out=_tokens(out),
            query_offsets=self.offsets.query.data_ptr(), prefix_offsets=self.offsets.prefix.data_ptr(),
            candidate_offsets=self.offsets.candidate.data_ptr(),
            norm=self.norm.data_ptr(), norm_count=self.norm.numel(),
            users=self.users, heads=self.q.shape[1], qk_dim=self.q.shape[2], v_dim=self.v_dim,
            query_rows=self.q.shape[0], key_rows=self.k.shape[0],
            packed_values=self.packed_values, whole_items=self.whole_items,
            type=_data_type(self.q.dtype), output_type=_data_type(out.dtype),
            **vars(self.options),
        )  # fmt: skip
        if self.attn_scale is not None:
            params.attn_scale, params.attn_scale_count = self.attn_scale.data_ptr(), self.attn_scale.numel()
        self._add_cache(params)
        self._add_scales_and_bias(params)
        return params

    def _add_cache(self, params: AttentionParams) -> None:
        # A cache without rows has no address; its offsets are all zero.
        if self.cache is None or not self.cache.k.shape[0]:
            return
        cache = self.cache
        paged = cache.page_table is not None
        params.cached_k = _page_tokens("cached_k", cache.k) if paged else _tokens(cache.k)
        params.cached_v = _page_tokens("cached_v", cache.v) if paged and not self.is_fp8 else _tokens(cache.v)
        params.cached_rows = cache.k.shape[0] * (cache.k.shape[1] if paged else 1)
        params.cached_offsets = cache.offsets.data_ptr()
        if cache.page_table is not None:
            params.page_table = cache.page_table.data_ptr()
            # A slice of a wider table is read where it is: its rows stand that far apart.
            params.page_size, params.pages_per_user = cache.k.shape[1], cache.page_table.stride(0)

    def _add_scales_and_bias(self, params: AttentionParams) -> None:
        if self.scales is not None:
            params.q_scale, params.k_scale, params.v_scale = (scale.data_ptr() for scale in self.scales)
            params.scale_count = self.scales.q.numel()
        if self.bias is not None:
            params.position_bias, params.time_bias = self.bias.position.data_ptr(), self.bias.time.data_ptr()
            params.position_bias_count, params.time_bias_count = self.bias.position.numel(), self.bias.time.numel()
            params.query_timestamps = self.bias.query_timestamps.data_ptr()
            params.key_timestamps = self.bias.key_timestamps.data_ptr()

    def _check(self, out: Tensor) -> None:
        """What the library cannot see from numbers and addresses: types, devices, shapes."""
        for name, tensor, dtype, *shapes in (*self._expected(out), *self._expected_options(), *self._expected_cache()):
            _expect(name, tensor, dtype, shapes, self.q.device)
        blocks = {"v": self.v} if self.packed_values else {}
        if self.cache is not None and self.is_fp8:
            blocks["cached_v"] = self.cache.v
        for name, tensor in blocks.items():
            if not tensor.is_contiguous():
                raise InputError(f"{name}: value blocks stand one behind the other; strides are {tensor.stride()}")
        if self.packed_values and not self.is_fp8:
            raise InputError(f"v: value blocks are of float8_e4m3fn tokens, not of {self.q.dtype}")
        if self.cache is not None and self.cache.page_table is not None and self.cache.page_table.stride(-1) != 1:
            raise InputError(
                f"page_table: the pages of a user must be neighbours; strides are {self.cache.page_table.stride()}"
            )
        if (self.scales is not None) != self.is_fp8:
            raise InputError("q_scale, k_scale and v_scale belong to float8_e4m3fn tokens, and are all needed there")

    def _expected(self, out: Tensor) -> Iterator[_Expected]:
        (rows, heads, qk_dim), keys = self.q.shape, self.k.shape[0]
        for name, offsets in zip(Offsets._fields, self.offsets, strict=True):
            yield f"{name}_offsets", offsets, torch.int32, (self.users + 1,)
        yield "q", self.q, self.q.dtype, (rows, heads, qk_dim)
        yield "k", self.k, self.q.dtype, (keys, heads, qk_dim)
        blocks = 2 * value_blocks(keys, self.users)
        packed = (blocks, heads, self.v_dim, VALUE_BLOCK_KEYS)
        yield "v", self.v, self.q.dtype, packed if self.packed_values else (keys, heads, self.v_dim)
        yield "out", out, out.dtype, (rows, heads, self.v_dim)

    def _expected_options(self) -> Iterator[_Expected]:
        rows, heads = self.q.shape[:2]
        yield "norm", self.norm, torch.float32, (1,), (self.users,)
        if self.attn_scale is not None:
            yield "attn_scale", self.attn_scale, torch.float32, (1,), (rows,)
        if self.scales is not None:
            for name, scale in zip(Scales._fields, self.scales, strict=True):
                yield f"{name}_scale", scale, torch.float32, (heads,) if self.scales.q.numel() > 1 else (1,)
        if self.bias is not None:
            yield "position_bias", self.bias.position, torch.float32, (self.bias.position.numel(),)
            yield "time_bias", self.bias.time, torch.float32, (self.bias.time.numel(),)
            yield "query_timestamps", self.bias.query_timestamps, torch.int64, (rows,)
            yield "key_timestamps", self.bias.key_timestamps, torch.int64, (self.k.shape[0],)

    def _expected_cache(self) -> Iterator[_Expected]:
        if self.cache is None:
            return
        heads, dtype, table = self.q.shape[1], self.q.dtype, self.cache.page_table
        rows = tuple(self.cache.k.shape[: 1 if table is None else 2])
        blocks = value_blocks(rows[0], self.users) if table is None else rows[0]
        packed = (blocks, heads, self.v_dim, VALUE_BLOCK_KEYS)
        yield "cached_offsets", self.cache.offsets, torch.int32, (self.users + 1,)
        yield "cached_k", self.cache.k, dtype, (*rows, heads, self.q.shape[2])
        yield "cached_v", self.cache.v, dtype, packed if self.is_fp8 else (*rows, heads, self.v_dim)
        if table is not None:
            yield "page_table", table, torch.int32, (self.users, table.shape[-1])


def value_blocks(rows: int, users: int) -> int:
    """Value blocks of one section: value_blocks() of kernels/attention/value_blocks.h."""
    return rows // VALUE_BLOCK_KEYS + users


def _tokens(tensor: Tensor) -> TokenTensor:
    return TokenTensor(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _page_tokens(name: str, pages: Tensor) -> TokenTensor:
    """Pages [pages, page size, heads, dim] as one run of rows. Raises InputError if they are none."""
    if pages.shape[0] > 1 and pages.stride(0) != pages.shape[1] * pages.stride(1):
        raise InputError(
            f"{name}: pages must follow each other like the rows in them, {pages.shape[1] * pages.stride(1)} elements "
            f"apart; they are {pages.stride(0)} apart"
        )
    return TokenTensor(pages.data_ptr(), pages.stride(1), pages.stride(2))


def _data_type(dtype: torch.dtype) -> int:
    name = type_name(dtype)
    if name not in DATA_TYPES:
        raise InputError(f"{name} is no type of these kernels, which know {', '.join(DATA_TYPES)}")
    return DATA_TYPES[name]


def _expect(
    name: str, tensor: Tensor, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> None:
    """Raises InputError unless the tensor has the type, one of the shapes, the device, and a contiguous last axis."""
    if tensor.dtype != dtype:
        raise InputError(f"{name} is {tensor.dtype}, and must be {dtype}")
    if tuple(tensor.shape) not in shapes:
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise InputError(f"{name} has shape {list(tensor.shape)}, and must have {wanted}")
    if tensor.device != device:
        raise InputError(f"{name} is on {tensor.device}, and q on {device}")
    if tensor.numel() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise InputError(f"the last axis of {name} has stride {tensor.stride(-1)}: its elements must lie side by side")
