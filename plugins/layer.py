"""What stands between the matrix products of a model: fused kernels on a CUDA GPU, plain PyTorch elsewhere.

Rows in fp16 on a GPU go to the kernels (kernels/layer), one launch on the current stream each; everything else goes to
``layer_reference``. Outputs are in the rows' dtype, or in e4m3 where a scale is given: real value = stored * scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hstu_trt.plugins import layer_reference as reference
from hstu_trt.plugins.layer_calls import POSTPROCESSORS, Norm, TokenInputs, TokenWeights, VectorWeights
from hstu_trt.plugins.layer_library import (
    MAX_ACTIONS,
    MAX_PROJECT_INPUTS,
    MAX_PROJECTIONS,
    PROJECT_INPUT_STEP,
    PROJECT_WIDTH_STEP,
    EncodeTokensParams,
    GateParams,
    LayerParams,
    NormRowsParams,
    ProjectParams,
    QuantiseRowsParams,
    QuantiseSegment,
    RowChoice,
    RowsOut,
    ScoresParams,
    UserVectorsParams,
    load_layer_library,
)
from hstu_trt.plugins.library import DATA_TYPES, UnsupportedError
from hstu_trt.plugins.tensors import address, capability, type_name

E4M3 = torch.float8_e4m3fn


def on_kernels(rows: Tensor) -> bool:
    """Whether rows go to the kernels."""
    return rows.is_cuda and rows.dtype == torch.float16


def norm_rows(
    x: Tensor,
    norm: Norm,
    *,
    delta: Tensor | None = None,
    swish: bool = False,
    factor: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Layer norm of rows [T, W]; with ``swish`` x * sigmoid(LN(x)), with a factor [T, W] LN(x) * factor.

    delta: added to x, which is changed in place, before all else.
    """
    if not on_kernels(x):
        return reference.norm_rows(x, norm, delta=delta, swish=swish, factor=factor, scale=scale)
    out = _empty(x, x.shape, scale)
    params = NormRowsParams(
        x=address(x), x_stride=x.stride(0), out=_rows_out(out, scale), gain=address(norm.gain),
        bias=address(norm.bias), rows=x.shape[0], width=x.shape[1], swish=swish, eps=norm.eps,
    )  # fmt: skip
    if delta is not None:
        params.delta, params.delta_stride = address(delta), delta.stride(0)
        params.sum, params.sum_stride = address(x), x.stride(0)
    if factor is not None:
        params.factor, params.factor_stride = address(factor), factor.stride(0)
    _launch(params, x)
    return out


def gate(
    u: Tensor, attention: Tensor, norm: Norm, joined: Tensor, *, heads: int, group_norm: bool, scale: float | None
) -> None:
    """Fills ``joined`` [T, 3W] with [SiLU(u), attention, SiLU(u) * norm(attention)]; u and attention are [T, W].

    Without a scale, ``attention`` may be the middle third of ``joined``, where the attention has written it.
    """
    if not on_kernels(u):
        reference.gate(u, attention, norm, joined, heads=heads, group_norm=group_norm, scale=scale)
        return
    in_place = attention.data_ptr() == joined.data_ptr() + u.shape[1] * joined.element_size()
    params = GateParams(
        u=address(u), u_stride=u.stride(0), attention=address(attention), attention_stride=attention.stride(0),
        gain=address(norm.gain), bias=address(norm.bias), joined=_rows_out(joined, scale),
        rows=u.shape[0], width=u.shape[1], heads=heads, group_norm=group_norm, keep_attention=in_place, eps=norm.eps,
    )  # fmt: skip
    _launch(params, u)


def quantise_rows(segments: Sequence[tuple[Tensor, float]]) -> list[Tensor]:
    """Up to 3 matrices [T, W], views of any row stride, each with its scale -> e4m3, contiguous."""
    outs = [_empty(x, x.shape, scale) for x, scale in segments]
    first = segments[0][0]
    if not on_kernels(first):
        return [reference.stored(x.float(), x.dtype, scale) for x, scale in segments]
    params = QuantiseRowsParams(count=len(segments))
    for number, ((x, scale), out) in enumerate(zip(segments, outs, strict=True)):
        params.segments[number] = QuantiseSegment(
            x=address(x), x_stride=x.stride(0), rows=x.shape[0], width=x.shape[1], out=_rows_out(out, scale)
        )
    _launch(params, first)
    return outs


def can_project(x: Tensor, outputs: Sequence[tuple[int, float | None]]) -> bool:
    """Whether ``project`` can do rows [T, inputs] where they are."""
    if not x.is_cuda:
        return True
    inputs = x.shape[1]
    fits = inputs % PROJECT_INPUT_STEP == 0 and inputs <= MAX_PROJECT_INPUTS and len(outputs) <= MAX_PROJECTIONS
    return fits and all(width % PROJECT_WIDTH_STEP == 0 for width, _ in outputs) and capability(x.device) == 90


def project(
    x: Tensor, weight: Tensor, column_scale: Tensor, bias: Tensor, outputs: Sequence[tuple[int, float | None]]
) -> list[Tensor]:
    """x W^T * column_scale + bias for e4m3 x [T, inputs] and W [columns, inputs], cut into runs of columns.

    column_scale, bias: fp32 [columns]. outputs: width of each run, and the scale of those that are stored in e4m3; the
    others are fp16.
    """
    if not x.is_cuda:
        return reference.project(x, weight, column_scale, bias, outputs)
    outs = [
        torch.empty((x.shape[0], width), dtype=torch.float16 if scale is None else E4M3, device=x.device)
        for width, scale in outputs
    ]
    params = ProjectParams(
        x=address(x), x_stride=x.stride(0), weight=address(weight), column_scale=address(column_scale),
        bias=address(bias), rows=x.shape[0], inputs=x.shape[1], count=len(outs),
    )  # fmt: skip
    for number, ((width, scale), out) in enumerate(zip(outputs, outs, strict=True)):
        params.outs[number], params.widths[number] = _rows_out(out, scale), width
    _launch(params, x)
    return outs


def encode_tokens(
    weights: TokenWeights, inputs: TokenInputs, norm: Norm, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The token stream [T, D] and the first layer's norm of it, from the content product and what is added to it.

    x = sqrt(D) * (LN(content) + extra + action) + position + time; contextual tokens stand for the bracket themselves.
    """
    if not on_kernels(inputs.content):
        return reference.encode_tokens(weights, inputs, norm, scale)
    content = inputs.content
    x, normed = torch.empty_like(content), _empty(content, content.shape, scale)
    first = weights.content_norm
    params = EncodeTokensParams(
        content=address(content), gain=address(first.gain), bias=address(first.bias), extra=_choice(inputs),
        actions_table=address(weights.actions_table), actions=address(inputs.actions),
        contextual=address(inputs.contextual), position_table=address(weights.position_table),
        time_table=address(weights.time_table), timestamps=address(inputs.timestamps),
        prefix_offsets=address(inputs.prefix_offsets), candidate_offsets=address(inputs.candidate_offsets),
        norm_gain=address(norm.gain), norm_bias=address(norm.bias), x=address(x), normed=_rows_out(normed, scale),
        action_count=len(weights.action_masks), tokens=content.shape[0], prefix_tokens=inputs.prefix_tokens,
        users=inputs.prefix_offsets.shape[0] - 1, slots=weights.slots, width=content.shape[1],
        last_position=weights.position_table.shape[0] - 1, last_bucket=weights.time_table.shape[0] - 1,
        eps=first.eps, norm_eps=norm.eps,
    )  # fmt: skip
    # The library says that there are too many, if there are.
    for number, mask in enumerate(weights.action_masks[:MAX_ACTIONS]):
        params.action_masks[number] = mask
    _launch(params, content)
    return x, normed


def _choice(inputs: TokenInputs) -> RowChoice:
    if inputs.extra is None:
        return RowChoice()
    rows = inputs.extra.rows
    return RowChoice(address(rows), address(inputs.extra.index), rows.shape[0] - 1)


def user_vectors(
    weights: VectorWeights,
    x: Tensor,
    timestamps: Tensor | None,
    *,
    items: tuple[Tensor, Norm] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """User vectors [C, D] of the last layer's rows, and their products with LN(items) if items [C, D] are given.

    x: for ``timestamp``, its product with the first D columns of the combiner, and the bias. timestamps: int64 [C].
    Raises UnsupportedError on kernels where both have a norm, each with an eps of its own.
    """
    if not on_kernels(x):
        vectors = reference.user_vectors(weights, x, timestamps)
        product = None
        if items is not None:
            product = reference.norm_rows(*items, delta=None, swish=False, factor=vectors, scale=scale)
        return vectors, product
    vectors = torch.empty_like(x)
    params = UserVectorsParams(
        x=address(x), x_stride=x.stride(0), users=address(vectors), time_weight=address(weights.time_weight),
        timestamps=address(timestamps), rows=x.shape[0], width=x.shape[1], kind=POSTPROCESSORS.index(weights.kind),
    )  # fmt: skip
    if weights.norm is not None:
        params.gain, params.bias = address(weights.norm.gain), address(weights.norm.bias)
        params.eps = weights.norm.eps
    product = None
    if items is not None:
        rows, norm = items
        if weights.norm is not None and norm.eps != weights.norm.eps:
            raise UnsupportedError(
                f"user_vectors: the kernel has one eps; the items' norm has {norm.eps}, the vectors' {weights.norm.eps}"
            )
        product = _empty(x, x.shape, scale)
        params.items, params.item_gain, params.item_bias = address(rows), address(norm.gain), address(norm.bias)
        params.product, params.eps = _rows_out(product, scale), norm.eps
    _launch(params, x)
    return vectors, product


def scores(
    hidden: Tensor, norm: Norm, weight: Tensor, bias: Tensor, *, binary: int, out: Tensor | None = None
) -> Tensor:
    """The head behind its first product: (h * sigmoid(LN(h))) W^T + b, sigmoid of the first ``binary`` tasks.

    hidden [C, W]; weight fp32 [tasks, W]; bias fp32 [tasks]. Returns fp32 [C, tasks], ``out`` if it is given.
    """
    if not on_kernels(hidden):
        result = reference.scores(hidden, norm, weight, bias, binary=binary)
        return result if out is None else out.copy_(result)
    if out is None:
        out = torch.empty((hidden.shape[0], weight.shape[0]), device=hidden.device)
    params = ScoresParams(
        hidden=address(hidden), stride=hidden.stride(0), gain=address(norm.gain), bias=address(norm.bias),
        weight=address(weight), weight_bias=address(bias), scores=address(out), rows=hidden.shape[0],
        width=hidden.shape[1], tasks=weight.shape[0], binary=binary, eps=norm.eps,
    )  # fmt: skip
    _launch(params, hidden)
    return out


def _empty(like: Tensor, shape: Sequence[int], scale: float | None) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype if scale is None else E4M3, device=like.device)


def _rows_out(out: Tensor, scale: float | None) -> RowsOut:
    return RowsOut(out.data_ptr(), out.stride(0), scale or 0.0, DATA_TYPES[type_name(out.dtype)])


def _launch(params: LayerParams, on: Tensor) -> None:
    with torch.cuda.device(on.device):
        load_layer_library().launch(params, torch.cuda.current_stream(on.device).cuda_stream)
