"""HSTU attention on a CUDA GPU: one launch on the current stream, nothing copied, nothing read on the host."""

from __future__ import annotations

import ctypes
from collections.abc import Hashable

import torch
from torch import Tensor

from hstu_trt.contract.errors import InputError
from hstu_trt.plugins.library import AttentionParams, KernelLibrary, TokenTensor, UnsupportedError, load_library
from hstu_trt.plugins.parameters import VALUE_BLOCK_KEYS, AttentionCall, Offsets, Scales, value_blocks
from hstu_trt.plugins.tensors import capability

E4M3_MAX = 448.0

# What may differ between calls that share a plan. Of tensors, only the strides and the alignment choose a kernel.
_TENSORS = ("q", "k", "v", "out", "cached_k", "cached_v")
_PER_CALL = ("norm", "attn_scale", "q_scale", "k_scale", "v_scale", "position_bias", "time_bias", "workspace")


class AttentionPlan:
    """Workspace of one forward: its first call builds the tile list, later ones reuse it.

    For layers with the same offsets, options and shapes. Make a new one for each forward: the offsets' addresses are
    compared, their contents are not.
    """

    def __init__(self) -> None:
        self._workspace: Tensor | None = None
        self._made_for: Hashable = None
        self._made_by: AttentionCall | None = None

    def fit(self, params: AttentionParams, library: KernelLibrary, kernel: str, device: torch.device) -> Tensor:
        """The workspace for a call; marks the call if the tile list is there. Raises InputError for a foreign call."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        wanted = (kernel, str(device), stream, _signature(params))
        if self._made_by is None:
            self._workspace = _workspace(params, library, kernel, device)
            self._made_for = wanted
        elif wanted != self._made_for:
            raise InputError(
                "this plan is of a call with other offsets, options, shapes or strides, or of another stream: "
                "make another one"
            )
        else:
            params.reuse_plan = 1
        assert self._workspace is not None
        return self._workspace

    def made_by(self, call: AttentionCall) -> None:
        """Says that a launch has built the list. Keeps the call, whose offsets' addresses the plan goes by."""
        self._made_by = self._made_by or call


def attention(
    call: AttentionCall,
    *,
    output_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    kernel: str = "auto",
    plan: AttentionPlan | None = None,
) -> Tensor:
    """[Tq, H, Dv] of a call on a CUDA GPU.

    output_dtype: default q's, and fp16 for fp8 tokens. out: a tensor to write instead of a new one, of any strides.
    kernel: "auto" takes the first of sm90, smxx and fp32 that can; another raises UnsupportedError with the reason why
    it cannot. plan: kept by the caller for several layers.
    """
    if out is None:
        out = call.empty_output(output_dtype or (torch.float16 if call.is_fp8 else call.q.dtype))
    params = call.params(out)
    if not out.numel():
        return out
    library, device = _library(kernel, call.q.device, params), call.q.device
    with torch.cuda.device(device):
        if plan is None:
            workspace = _workspace(params, library, kernel, device)
        else:
            workspace = plan.fit(params, library, kernel, device)
        params.workspace = workspace.data_ptr()
        library.launch_attention(params, kernel, torch.cuda.current_stream(device).cuda_stream)
        if plan is not None:
            plan.made_by(call)
    return out


def unsupported(
    call: AttentionCall, kernel: str = "auto", *, capability: int, output_dtype: torch.dtype = torch.float16
) -> str | None:
    """Why a kernel cannot do a call on GPUs of a compute capability (90 for 9.0); None if it can. Runs nothing."""
    return load_library().unsupported(call.params(call.empty_output(output_dtype)), kernel, capability)


def pack_values(v: Tensor, prefix_offsets: Tensor, candidate_offsets: Tensor) -> Tensor:
    """e4m3 values [Tk, H, Dv] -> value blocks [2 * value_blocks(Tk, B), H, Dv, 128]: prefixes, then candidates.

    For a contiguous cache: its offsets as prefixes, no candidates, and the first half of the result.
    Raises UnsupportedError for values that are not 4-byte aligned.
    """
    users, (rows, heads, v_dim) = prefix_offsets.shape[0] - 1, v.shape
    blocks = v.new_empty(2 * value_blocks(rows, users), heads, v_dim, VALUE_BLOCK_KEYS)
    one = torch.ones(1, device=v.device)
    call = AttentionCall(
        q=v[:0], k=v, v=v, offsets=Offsets(prefix_offsets, prefix_offsets, candidate_offsets), norm=one,
        scales=Scales(one, one, one),
    )  # fmt: skip
    params = call.params(call.empty_output(torch.float16))
    # Rows are read four columns at a time (kernels/attention/value_blocks.cu).
    if any(number % 4 for number in (v.data_ptr(), *v.stride()[:2], v_dim)):
        raise UnsupportedError(
            "values to pack must be 4-byte aligned, v_dim and their strides multiples of 4; "
            f"here v_dim is {v_dim}, strides {v.stride()[:2]}, and the address {v.data_ptr() % 4} past a multiple of 4"
        )
    with torch.cuda.device(v.device):
        stream = torch.cuda.current_stream(v.device).cuda_stream
        load_library().launch_pack_values(params, blocks.data_ptr(), stream)
    return blocks


def quantise(x: Tensor, *, per_head: bool = False) -> tuple[Tensor, Tensor]:
    """[T, H, D] -> e4m3 values and their fp32 scale, [1] or [H]: the largest value becomes 448."""
    by_head = x.abs().float().transpose(0, 1).flatten(1)
    largest = by_head.amax(dim=1) if x.shape[0] else by_head.new_zeros(x.shape[1])
    largest = largest if per_head else largest.amax(dim=0, keepdim=True)
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / E4M3_MAX
    return (x.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def _library(kernel: str, device: torch.device, params: AttentionParams) -> KernelLibrary:
    library = load_library()
    if sentence := library.unsupported(params, kernel, capability(device)):
        raise UnsupportedError(f"attention on {torch.cuda.get_device_name(device)}: {sentence}")
    return library


def _workspace(params: AttentionParams, library: KernelLibrary, kernel: str, device: torch.device) -> Tensor:
    return torch.empty(max(library.workspace_size(params, kernel), 1), dtype=torch.uint8, device=device)


def _signature(params: AttentionParams) -> bytes:
    """All that the tile list and the choice of a kernel depend on."""
    same = AttentionParams.from_buffer_copy(params)
    for name in _TENSORS:
        tensor: TokenTensor = getattr(params, name)
        aligned = 0 if tensor.data is None else tensor.data % 16 + 1
        setattr(same, name, TokenTensor(aligned, tensor.row_stride, tensor.head_stride))
    for name in _PER_CALL:
        setattr(same, name, getattr(params, name) is not None)
    same.query_timestamps = same.key_timestamps = same.reuse_plan = 0
    return ctypes.string_at(ctypes.addressof(same), ctypes.sizeof(same))
