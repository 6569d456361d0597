"""Cases of the kernel benchmark: who attends to what, how much work that is, and how long the GPU needs at least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hstu_trt.contract.errors import ConfigError

Dtype = Literal["fp16", "bf16", "fp8"]
DTYPES: tuple[Dtype, ...] = ("fp16", "bf16", "fp8")
GROUPS = ("table", "sweep")

# One draw of 128 users: exp(ln 40 + 0.93 z), rounded, z = torch.randn with seed 7, the first set to 1024.
SHORT_HISTORIES = (
    1024, 58, 92, 11, 34, 52, 22, 17, 95, 24, 14, 26, 77, 103, 50, 110, 9, 30, 240, 29, 48, 83, 105, 20, 33, 33, 7,
    29, 6, 75, 12, 11, 37, 39, 47, 339, 97, 22, 19, 23, 11, 134, 184, 15, 31, 32, 64, 51, 34, 31, 39, 28, 3, 15, 30,
    95, 181, 40, 27, 6, 116, 28, 29, 81, 45, 47, 25, 84, 13, 8, 23, 23, 18, 122, 62, 35, 19, 28, 15, 69, 5, 58, 68,
    53, 36, 16, 204, 99, 28, 34, 81, 100, 19, 47, 64, 150, 24, 86, 107, 14, 45, 39, 27, 66, 57, 237, 13, 208, 64,
    35, 61, 14, 14, 30, 72, 44, 23, 25, 73, 71, 19, 117, 13, 64, 27, 71, 52, 120,
)  # fmt: skip

# Rates of an H100 SXM under this load: 132 multiprocessors at 1.75 GHz, and the bandwidth of a copy kernel.
_CLOCKS_PER_S = 132 * 1.75e9
TENSOR_FLOPS = {dtype: flops * _CLOCKS_PER_S for dtype, flops in (("fp16", 4096), ("bf16", 4096), ("fp8", 8192))}
MUFU_PER_S = 16 * _CLOCKS_PER_S
"""SiLUs per second: each score takes one tanh of the special-function unit."""
MEMORY_BYTES_PER_S = 2.85e12


@dataclass(frozen=True)
class Floors:
    """What no kernel can be faster than, in microseconds."""

    tensor_us: float
    mufu_us: float
    memory_us: float

    @property
    def limit(self) -> tuple[float, str]:
        """The largest of the three, and what it is."""
        return max((self.tensor_us, "tensor"), (self.mufu_us, "MUFU"), (self.memory_us, "memory"))


@dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One shape. Queries are all tokens, or with ``cached`` the candidates alone, over prefixes in a cache."""

    name: str
    histories: tuple[int, ...]
    """Prefix tokens of each user."""
    candidates: int
    """Candidates of each user."""
    heads: int
    dim: int
    cached: bool = False
    group: str = "table"
    variants: tuple[str, ...] = ("fp16", "fp8", "fp8 packed")
    """Measured unless others are asked for."""
    references: tuple[str, ...] = ("eager", "compile", "cudnn", "flash")
    """What it is held against; a GEMM always."""

    @property
    def users(self) -> int:
        return len(self.histories)

    @property
    def prefix_rows(self) -> int:
        return sum(self.histories)

    @property
    def candidate_rows(self) -> int:
        return self.users * self.candidates

    @property
    def query_rows(self) -> int:
        """Rows of q and out."""
        return self.candidate_rows + (0 if self.cached else self.prefix_rows)

    @property
    def key_rows(self) -> int:
        """Rows of k and v, the cache counted in."""
        return self.prefix_rows + self.candidate_rows

    @property
    def longest(self) -> int:
        """Tokens of the longest user: N."""
        return max(self.histories) + self.candidates

    @property
    def uniform(self) -> bool:
        """Whether all users are alike."""
        return len(set(self.histories)) == 1

    @property
    def pairs(self) -> int:
        """Unmasked (query, key) pairs of one head: prefixes are causal, a candidate sees its prefix and itself."""
        prefix = 0 if self.cached else sum(n * (n + 1) // 2 for n in self.histories)
        return prefix + self.candidates * sum(n + 1 for n in self.histories)

    @property
    def flops(self) -> int:
        """Multiplications and additions of both products over the unmasked pairs."""
        return 4 * self.dim * self.heads * self.pairs

    def bytes_read(self, dtype: Dtype) -> int:
        """q, k, v and the cache, each once."""
        element = 1 if dtype == "fp8" else 2
        return element * self.heads * self.dim * (self.query_rows + 2 * self.key_rows)

    def bytes_moved(self, dtype: Dtype) -> int:
        """What is read, and the output in half precision."""
        return self.bytes_read(dtype) + 2 * self.heads * self.dim * self.query_rows

    def floors(self, dtype: Dtype) -> Floors:
        """The least times of tensor cores, special-function units and memory."""
        return Floors(
            tensor_us=self.flops / TENSOR_FLOPS[dtype] * 1e6,
            mufu_us=self.heads * self.pairs / MUFU_PER_S * 1e6,
            memory_us=self.bytes_moved(dtype) / MEMORY_BYTES_PER_S * 1e6,
        )


def table_cases() -> list[KernelCase]:
    """The cases that the README reports."""
    usual, planned = KernelCase.variants, ("fp16 planned", "fp8 packed planned")
    return [
        _case("B4 4x128", [7168] * 4, 2048, variants=("bf16", *usual, "smxx fp16")),
        _case("B1 4x128", [7168], 2048, variants=(*usual, *planned)),
        _case("B16 4x128", [7168] * 16, 2048),
        _case("B4 8x64", [7168] * 4, 2048),
        _case("B4 2x256", [7168] * 4, 2048),
        _case("M-FALCON B16 2048q 4x128", [7168] * 16, 2048, cached=True),
        _case("M-FALCON B16 128q 4x128", [7168] * 16, 128, cached=True, variants=(*usual, *planned)),
        _case("SH B128 4x128", SHORT_HISTORIES, 64, variants=(*usual, *planned)),
    ]


def sweep_cases() -> list[KernelCase]:
    """History lengths 512 to 16384, without and with 2048 candidates, 65536 history tokens in all."""
    options = {"group": "sweep", "variants": ("fp16", "bf16", "fp8 packed"), "references": ("cudnn",)}
    cases = []
    for candidates in (0, 2048):
        for length in (512 << doubling for doubling in range(6)):
            users, tokens = 65536 // length, f"{length}+{candidates}" if candidates else str(length)
            cases.append(_case(f"B{users} {tokens} 4x128", [length] * users, candidates, **options))
    return cases


def _case(name: str, histories: Sequence[int], candidates: int, **options: Any) -> KernelCase:
    """A case whose name ends with heads x dim."""
    heads, dim = map(int, name.rsplit(maxsplit=1)[1].split("x"))
    return KernelCase(name=name, histories=tuple(histories), candidates=candidates, heads=heads, dim=dim, **options)


def all_cases() -> list[KernelCase]:
    """Table cases, then the sweep."""
    return [*table_cases(), *sweep_cases()]


def select_cases(names: Sequence[str]) -> list[KernelCase]:
    """The cases of these names and groups. Raises ConfigError on an unknown one."""
    cases = all_cases()
    known = {*GROUPS, *(case.name for case in cases)}
    for name in names:
        if name not in known:
            cases_text = ", ".join(repr(case.name) for case in cases)
            raise ConfigError(f"unknown case {name!r}; there are the groups {', '.join(GROUPS)}, and {cases_text}")
    return [case for case in cases if case.name in names or case.group in names]
