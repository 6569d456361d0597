"""Gates on ranking accuracy: how far a runner's scores may lie from the reference's before they count as changed.

The first three and ``request_entropy`` are those of MLPerf's DLRMv3 rules; the logit gates guard requests with too
few candidates for an entropy of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hstu_trt.contract.tensors import Precision


@dataclass(frozen=True, kw_only=True)
class RankingGates:
    """Bounds against the reference with the same weights, requests and attention norm."""

    entropy_change: float = 0.001
    """Largest |relative change| of the normalised entropy over all requests."""
    accuracy_ratio: float = 0.999
    """Smallest accuracy at 0.5, as a share of the reference's."""
    gauc_ratio: float = 0.999
    """Smallest mean AUC per request, as a share of the reference's."""
    request_entropy: float = 0.001
    """Largest |relative change| of one request's normalised entropy."""
    request_entropy_candidates: int = 512
    """Requests with fewer candidates are held to ``max_logit`` instead: their entropy is too noisy."""
    max_logit: dict[Precision, float] = field(default_factory=lambda: {"fp32": 1e-4, "fp16": 2e-2, "fp8": 0.3})
    """Largest |difference of a logit| in those requests."""


RANKING_GATES = RankingGates()


@dataclass(frozen=True, kw_only=True)
class AttentionGates:
    """Largest relative L2 errors of an attention kernel's output against float64."""

    relative_l2: dict[str, float] = field(default_factory=lambda: {"fp16": 3.0e-4, "bf16": 2.4e-3, "fp8": 2.7e-2})
    """Against exact arithmetic on the values that the kernel is given, by their dtype."""
    relative_l2_from_fp16: float = 5.5e-2
    """fp8: against exact arithmetic on the fp16 values before they were quantised."""


ATTENTION_GATES = AttentionGates()
