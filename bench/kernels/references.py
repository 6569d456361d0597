"""What the kernels are held against in the same run: HSTU attention in PyTorch, softmax attention, and plain GEMMs.

Shapes: U users, H heads, Q and K padded queries and keys of a user, D head width, T token rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hstu_trt.bench.kernels.cases import Dtype, KernelCase
from hstu_trt.bench.kernels.inputs import Tokens
from hstu_trt.bench.kernels.variants import GEMM_NAMES, GEMM_SIZE, REFERENCES
from hstu_trt.export.attention import MaskOptions, valid_pairs

_SOFTMAX_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

_SCORE_COPIES = 3
"""Score matrices that eager PyTorch holds at a time."""
_SCORE_SHARE = 0.15
"""Of the GPU's memory, for score matrices: each graph keeps its own. More users are taken in chunks."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A contender that is not ours."""

    name: str
    """As the variant of its row."""
    flops: int
    calls: Sequence[Callable[[], Tensor]]
    """One per input set."""
    rows: Callable[[Tensor], Tensor] | None = None
    """The output's rows as our kernels order them, where it computes the same function."""


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Row numbers of a case's tokens in padded form; -1: padding. A user's candidates follow its prefix."""

    query_rows: Tensor
    """[U, Q]"""
    key_rows: Tensor
    """[U, K]"""

    @classmethod
    def of(cls, case: KernelCase, device: torch.device | str) -> Padded:
        """The row numbers on a device."""
        prefixes = torch.tensor(case.histories, device=device)
        position = torch.arange(case.longest, device=device)
        prefix_begin = (prefixes.cumsum(0) - prefixes)[:, None]
        user = torch.arange(case.users, device=device)[:, None]
        candidate = position - prefixes[:, None]
        key_rows = torch.where(
            candidate < 0,
            prefix_begin + position,
            case.prefix_rows + user * case.candidates + candidate,
        )
        key_rows = torch.where(candidate < case.candidates, key_rows, -1)
        if not case.cached:
            return cls(query_rows=key_rows, key_rows=key_rows)
        candidate = torch.arange(case.candidates, device=device)
        return cls(query_rows=user * case.candidates + candidate, key_rows=key_rows)

    def mask(self, case: KernelCase, dtype: torch.dtype) -> Tensor:
        """Ones where a query sees a key, [U or 1, 1, Q, K]; one for all users if they are alike."""
        queries, keys = self.query_rows.shape[1], self.key_rows.shape[1]
        histories = case.histories[:1] if case.uniform else case.histories
        mask = torch.zeros((len(histories), 1, queries, keys), dtype=dtype, device=self.key_rows.device)
        for user, history in enumerate(histories):
            tokens = history + case.candidates
            positions = torch.arange(history if case.cached else 0, tokens, device=mask.device)
            mask[user, 0, : len(positions), :tokens] = valid_pairs(positions, history, case.candidates, MaskOptions())
        return mask

    def gather(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """Packed tokens in padded form [U, H, rows, D]; padding is zero."""
        padded = tokens[rows.clamp(min=0)] * (rows >= 0)[..., None, None]
        return padded.transpose(1, 2).contiguous()

    def scatter(self, out: Tensor) -> Tensor:
        """A padded output's rows, packed [T, H, D]."""
        kept = self.query_rows >= 0
        rows = out.transpose(1, 2)[kept]
        return rows[torch.argsort(self.query_rows[kept])]


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, alpha: float, norm: float) -> Tensor:
    """HSTU attention on padded tokens [U, H, tokens, D], the scores materialised; 1/N comes last, which is kindest."""
    weights = F.silu(torch.matmul(q, k.transpose(-1, -2)) * alpha) * mask
    return torch.matmul(weights, v) / norm


def build_reference(name: str, case: KernelCase, sets: list[Tokens], alpha: float) -> Reference | str:
    """A reference by its name in ``REFERENCES``, or a sentence that says why it cannot run this case."""
    if name in _SOFTMAX_BACKENDS:
        if not case.uniform:
            return f"sdpa {name}: users of different lengths would be timed with their padding"
        return _softmax(name, case, sets)
    attention = eager_attention if name == "eager" else torch.compile(eager_attention, dynamic=False)
    return _hstu(REFERENCES[name], attention, case, sets, alpha)


def _hstu(name: str, attention: Callable[..., Tensor], case: KernelCase, sets: list[Tokens], alpha: float) -> Reference:
    padded = Padded.of(case, sets[0].q.device)
    mask = padded.mask(case, sets[0].q.dtype)
    users = _chunk_users(case, torch.cuda.get_device_properties(0).total_memory)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        masks = mask.split(users) if len(mask) > 1 else [mask] * (case.users // users)
        chunks = zip(q.split(users), k.split(users), v.split(users), masks, strict=True)
        outs = [attention(*chunk, alpha, float(case.longest)) for chunk in chunks]
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    calls = [partial(call, *tensors) for tensors in _padded_sets(padded, sets)]
    return Reference(name=name, flops=case.flops, calls=calls, rows=padded.scatter)


def _padded_sets(padded: Padded, sets: Iterable[Tokens]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for tokens in sets:
        yield (
            padded.gather(tokens.q, padded.query_rows),
            padded.gather(tokens.k, padded.key_rows),
            padded.gather(tokens.v, padded.key_rows),
        )


def _chunk_users(case: KernelCase, memory: int) -> int:
    """Users whose score matrices fit at a time: the largest divisor of all users."""
    queries = case.candidates if case.cached else case.longest
    per_user = _SCORE_COPIES * 2 * case.heads * queries * case.longest
    fitting = max(1, int(_SCORE_SHARE * memory) // per_user)
    return max(n for n in range(1, case.users + 1) if case.users % n == 0 and n <= fitting)


def _softmax(backend: str, case: KernelCase, sets: list[Tokens]) -> Reference:
    """Softmax attention: fully causal, or with a cache all candidates over the whole prefix."""
    padded = Padded.of(case, sets[0].q.device)
    keys = case.histories[0] if case.cached else case.longest
    pairs = case.candidates * keys if case.cached else keys * (keys + 1) // 2

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(_SOFTMAX_BACKENDS[backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=not case.cached)

    calls = [
        partial(call, q, k[:, :, :keys].contiguous(), v[:, :, :keys].contiguous())
        for q, k, v in _padded_sets(padded, sets)
    ]
    flops = 4 * case.dim * case.heads * case.users * pairs
    return Reference(name=REFERENCES[backend], flops=flops, calls=calls)


def gemm_reference(dtype: Dtype, device: torch.device | str) -> Reference:
    """A large matrix product: the rate that the tensor cores reach in practice."""
    n = GEMM_SIZE
    generator = torch.Generator(device=device).manual_seed(0)
    calls: list[Callable[[], Tensor]] = []
    for _ in range(2):
        a, b = (torch.randn((n, n), generator=generator, device=device, dtype=torch.bfloat16) for _ in range(2))
        if dtype == "fp8":
            a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
            one = torch.ones((), device=device)
            calls.append(partial(torch._scaled_mm, a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        else:
            half = torch.float16 if dtype == "fp16" else torch.bfloat16
            calls.append(partial(torch.mm, a.to(half), b.to(half)))
    return Reference(name=GEMM_NAMES[dtype], flops=2 * n**3, calls=calls)
