"""Where two runners part: the error of every output per request, gathered by layer and by length of history."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.split_users import TAP_PREFIX

DEFAULT_EDGES = (0, 1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


def parse_edges(text: str) -> tuple[int, ...]:
    """``0,16,64`` -> the lower ends of buckets 0 to 15, 16 to 63, 64 and more. Raises ConfigError."""
    try:
        edges = tuple(int(part) for part in text.split(","))
    except ValueError:
        edges = ()
    if not edges or edges[0] != 0 or any(b <= a for a, b in itertools.pairwise(edges)):
        raise ConfigError(f"--buckets {text!r}: expected rising lengths that begin with 0, as in 0,16,64")
    return edges


@dataclass(frozen=True, kw_only=True)
class Errors:
    """How far B is from A, per request; arrays are float64 [requests]."""

    max_abs: NDArray
    """Largest |difference| where both are finite."""
    error: NDArray
    """Sum of squared differences."""
    scale: NDArray
    """Sum of A's squares."""
    mismatches: NDArray
    """Elements that are NaN or Inf on one side, and other on the other."""

    @classmethod
    def of(cls, actual: NDArray, expected: NDArray, request: NDArray, requests: int) -> Errors:
        """Errors of rows [rows, width]; ``request`` [rows] says whose each is."""
        a, e = (side.astype(np.float64).reshape(len(request), -1) for side in (actual, expected))
        both = np.isfinite(a) & np.isfinite(e)
        same = both | (np.isnan(a) & np.isnan(e)) | (a == e)
        difference = np.where(both, np.where(both, a, 0.0) - np.where(both, e, 0.0), 0.0)
        largest = np.zeros(requests)
        np.maximum.at(largest, request, np.abs(difference).max(axis=1, initial=0.0))

        def summed(values: NDArray) -> NDArray:
            return np.bincount(request, values.sum(axis=1), minlength=requests)

        squares = np.where(both, e, 0.0) ** 2
        return cls(max_abs=largest, error=summed(difference**2), scale=summed(squares), mismatches=summed(~same))

    @classmethod
    def joined(cls, parts: Sequence[Errors]) -> Errors:
        """The errors of several batches, one after the other."""
        names = [one.name for one in dataclasses.fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def among(self, where: NDArray) -> Summary:
        """The errors of the requests ``where`` (bool or rows), taken together."""
        return Summary(
            max_abs=float(self.max_abs[where].max(initial=0.0)),
            relative_l2=_relative(self.error[where].sum(), self.scale[where].sum()),
            mismatches=int(self.mismatches[where].sum()),
        )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Errors of several requests."""

    max_abs: float
    relative_l2: float
    mismatches: int


def _relative(error: float, scale: float) -> float:
    return float(np.sqrt(error / scale)) if scale else 0.0


@dataclass(frozen=True, kw_only=True)
class OutputErrors:
    """The errors of one output."""

    name: str
    errors: Errors
    tolerance: float | None
    """Largest accepted |difference|; None where none is defined, and none is judged."""
    judged: bool = True
    """Polygraphy's verdict over all batches."""

    @property
    def total(self) -> Summary:
        """Over all requests."""
        return self.errors.among(np.ones(len(self.errors.max_abs), dtype=bool))

    @property
    def passed(self) -> bool:
        return self.judged

    @property
    def worst_request(self) -> int:
        """The request with the largest difference, NaN and Inf before all."""
        return int(np.lexsort((-self.errors.max_abs, -self.errors.mismatches))[0])


@dataclass(kw_only=True)
class ErrorLog:
    """Gathers the errors of batches as they come."""

    tolerances: Mapping[str, float]
    parts: dict[str, list[Errors]] = field(default_factory=dict)
    verdicts: dict[str, bool] = field(default_factory=dict)

    def add(self, name: str, actual: NDArray, expected: NDArray, request: NDArray, requests: int) -> None:
        """Notes one output of a batch of ``requests`` requests."""
        self.parts.setdefault(name, []).append(Errors.of(actual, expected, request, requests))

    def judge(self, verdicts: Mapping[str, bool]) -> None:
        """Notes Polygraphy's verdicts on a batch."""
        for name, passed in verdicts.items():
            self.verdicts[name] = passed and self.verdicts.get(name, True)

    def outputs(self) -> list[OutputErrors]:
        """The errors of every output over all batches, in the order of the graph."""
        return [
            OutputErrors(
                name=name,
                errors=Errors.joined(self.parts[name]),
                tolerance=self.tolerances.get(name),
                judged=self.verdicts.get(name, name not in self.tolerances),
            )
            for name in sorted(self.parts, key=_graph_order)
        ]


def _graph_order(name: str) -> tuple[int, int]:
    """Table rows, then layers, then what the last layer and the head make of them."""
    if name.startswith(TAP_PREFIX):
        return 1, int(name.split(".")[1])
    return (
        (0, 0) if name.endswith("_embeddings") and name != "user_embeddings" else (2 + (name != "user_embeddings"), 0)
    )


def request_of_rows(name: str, packed: Mapping[str, NDArray], slots: int) -> NDArray:
    """Whose each row of an output is, int64 [rows]; ``slots``: contextual tokens per user."""
    history, candidates = (np.diff(packed[key]) for key in ("uih_offsets", "candidate_offsets"))
    users = np.arange(len(history))
    if name == "contextual_embeddings":
        return users
    if name == "uih_embeddings":
        return np.repeat(users, history)
    if name.startswith(TAP_PREFIX):
        return np.concatenate([np.repeat(users, history + slots), np.repeat(users, candidates)])
    return np.repeat(users, candidates)


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Requests of a range of history lengths."""

    low: int
    high: int | None
    """First length beyond; None: no end."""
    rows: NDArray

    @property
    def label(self) -> str:
        """As in ``16-63``."""
        if self.high is None:
            return f"{self.low}+"
        return str(self.low) if self.high == self.low + 1 else f"{self.low}-{self.high - 1}"


def buckets(history_lengths: NDArray, edges: Sequence[int]) -> list[Bucket]:
    """The requests by length of history, empty buckets left out."""
    number = np.searchsorted(edges, history_lengths, side="right") - 1
    found = [
        Bucket(low=low, high=high, rows=np.flatnonzero(number == n))
        for n, (low, high) in enumerate(itertools.zip_longest(edges, edges[1:]))
    ]
    return [bucket for bucket in found if bucket.rows.size]


def first_beyond(outputs: Sequence[OutputErrors]) -> OutputErrors | None:
    """The first output in the order of the graph that is beyond its tolerance."""
    return next((output for output in outputs if not output.passed), None)


def growth(outputs: Sequence[OutputErrors]) -> list[tuple[str, float]]:
    """Each layer's relative L2 error as a multiple of the layer before it; NaN after an exact layer."""
    layers = [(o.name, o.total.relative_l2) for o in outputs if o.name.startswith(TAP_PREFIX)]
    return [
        (name, after / before if before else float("nan")) for (_, before), (name, after) in itertools.pairwise(layers)
    ]
