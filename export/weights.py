"""From a checkpoint to a model with weights: key check, table mapping, and seeded weights for tests and benchmarks."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hstu_trt.contract.checkpoint_layout import table_key
from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.model import HstuConfig, TableConfig
from hstu_trt.export.checkpoint import Checkpoint, TableSource
from hstu_trt.export.model import DlrmHstu

_MAX_LISTED_KEYS = 12
_RANDOM_BLOCK_ROWS = 1 << 16
_MOST_DRAWING = 8
"""Blocks in the making: 65,536 rows x 512 in fp32 and fp16 take 192 MiB each."""
_BUFFER_RTOL = 2.0**-8  # bfloat16, the coarsest dtype of a checkpoint, keeps 8 bits
_ROLE_PREFIXES = ("uih_", "item_candidate_", "item_")

Module = TypeVar("Module", bound=nn.Module)


def load_dense(model: Module, dense: Mapping[str, Tensor], source: str) -> Module:
    """Loads the dense weights. Keys and shapes must match exactly, and values be finite in the model's dtypes.

    Buffers (action weights, time units) follow from the config: the checkpoint's copies must be equal but are not
    loaded, since a checkpoint in half precision holds 86528 or infinity for the 86400 seconds of a day.
    Raises ArtefactError with a readable diff.
    """
    expected = model.state_dict()
    check_fit(expected, dense, source)
    buffers = dict(model.named_buffers())
    for key, value in buffers.items():
        _check_buffer(key, value, dense[key], source)
    weights = {key: value.to(expected[key].dtype) for key, value in dense.items()} | buffers
    broken = [f"  {key} in {value.dtype}" for key, value in weights.items() if not value.float().isfinite().all()]
    if broken:
        raise ArtefactError(f"{source}: NaN or Inf in {len(broken)} tensors\n" + _listing(broken))
    model.load_state_dict(weights)
    return model


def check_fit(expected: Mapping[str, Tensor], dense: Mapping[str, Tensor], source: str) -> None:
    """That a checkpoint has the keys and shapes of a model's state dict. Raises ArtefactError with a readable diff."""
    _check_keys(expected.keys(), dense.keys(), source)
    wrong = [
        f"  {key}: {list(dense[key].shape)} in the checkpoint, {list(value.shape)} by the config"
        for key, value in expected.items()
        if dense[key].shape != value.shape
    ]
    if wrong:
        raise ArtefactError(
            f"{source}: {len(wrong)} tensors do not have the config's shape\n"
            + _listing(wrong)
            + "\nCheck heads, widths and action_weights in the config."
        )


def _check_buffer(key: str, expected: Tensor, found: Tensor, source: str) -> None:
    rtol = _BUFFER_RTOL if expected.is_floating_point() else 0.0
    if not torch.allclose(found.double(), expected.to(found.dtype).double(), rtol=rtol, atol=0):
        raise ArtefactError(
            f"{source}: {key.rpartition('.')[2]} is {found.tolist()} in the checkpoint, "
            f"{expected.tolist()} by the config"
        )


def _check_keys(expected: Iterable[str], found: Iterable[str], source: str) -> None:
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    if missing or unexpected:
        lines = [f"  - {key}" for key in missing] + [f"  + {key}" for key in unexpected]
        raise ArtefactError(
            f"{source} does not fit the config: {len(missing)} keys missing (-), {len(unexpected)} unexpected (+)\n"
            + _listing(lines)
            + "\nCheck layers, contextual features, action_weights, group norm and postprocessor in the config."
        )


def _listing(lines: list[str]) -> str:
    more = len(lines) - _MAX_LISTED_KEYS
    return "\n".join(lines[:_MAX_LISTED_KEYS] + ([f"  ... and {more} more"] if more > 0 else []))


def resolve_tables(config: HstuConfig, tables: Mapping[str, TableSource], hints: Mapping[str, str]) -> HstuConfig:
    """Fills ``config.tables``: which feature looks up in which of the checkpoint's tables.

    A config that lists ``embedding_tables`` decides. Otherwise a feature takes the table of its own name, of its
    history partner, or of one of these without the role prefix (``uih_``, ``item_``). ``hints`` (feature -> table,
    from the comments of the config file) are asked only where names give none. Raises ConfigError naming the features
    left over.
    """
    given = {feature: table.name for table in config.tables for feature in table.features}
    mapping = {f: given.get(f) or _table_by_name(f, config, tables) or hints.get(f) for f in config.embedding_features}
    lost = [feature for feature, table in mapping.items() if table not in tables]
    if lost:
        raise ConfigError(
            f"no embedding table for {', '.join(map(repr, lost))}; the checkpoint has {', '.join(tables) or 'none'}. "
            + _way_to_tables([given[feature] for feature in lost if feature in given])
        )
    resolved = tuple(
        _table_config(config, table, mapping) for table in tables.values() if table.name in mapping.values()
    )
    return dataclasses.replace(config, tables=resolved)


def _way_to_tables(listed: Sequence[str]) -> str:
    """What to do about features without a table, of which the config lists these."""
    if listed:
        keys = ", ".join(table_key(name) for name in dict.fromkeys(listed))
        return f"The config's embedding_tables name them, so the checkpoint must hold {keys}"
    return (
        'Add to the config: "embedding_tables": {"TABLE": {"rows": R, "dim": D, "dtype": "float16", '
        '"features": ["FEATURE", ...]}, ...}'
    )


def _table_by_name(feature: str, config: HstuConfig, tables: Iterable[str]) -> str | None:
    partners = [uih for uih, candidate in config.feature_pairs if candidate == feature]
    names = [feature, *partners]
    stripped = [name.removeprefix(prefix) for name in names for prefix in _ROLE_PREFIXES if name.startswith(prefix)]
    return next((name for name in (*names, *stripped) if name in tables), None)


def _table_config(config: HstuConfig, table: TableSource, mapping: Mapping[str, str | None]) -> TableConfig:
    if table.dim != config.embedding_dim:
        raise ArtefactError(
            f"table {table.name} is {table.dim} wide, the config's embedding dim is {config.embedding_dim}"
        )
    features = tuple(feature for feature, name in mapping.items() if name == table.name)
    return TableConfig(name=table.name, rows=table.rows, dim=table.dim, dtype=table.dtype, features=features)  # type: ignore[arg-type]


def random_checkpoint(config: HstuConfig, seed: int, *, heavy_tailed: bool = False) -> Checkpoint:
    """Seeded weights for a config that lists its tables; for tests, demos and benchmarks.

    Linear layers keep the variance of their input, norms are near one, so activations stay of order one. Gaussian, or
    ``heavy_tailed``: Student's t with 3 degrees of freedom, whose outliers are what quantising finds hard.
    """
    if not config.tables:
        raise ConfigError("random weights need the tables' sizes: list embedding_tables in the config")
    generator = torch.Generator().manual_seed(seed)
    model = DlrmHstu(config)
    noise = _student_t if heavy_tailed else _gaussian
    dense = {key: _random_weight(key, value, noise, generator) for key, value in model.state_dict().items()}
    tables = {
        t.name: TableSource(name=t.name, rows=t.rows, dim=t.dim, dtype=t.dtype, blocks=_random_rows(t, seed, number))
        for number, t in enumerate(config.tables)
    }
    source = f"random{'-heavy' * heavy_tailed}:{seed}"
    return Checkpoint(source=source, dense=dense, tables=tables)


_Noise = Callable[[torch.Size, torch.Generator], Tensor]


def _gaussian(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _student_t(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom, scaled to variance 1: a Gaussian over the root of a mean of 3 squares."""
    squares = torch.randn((3, *shape), generator=generator).square().mean(dim=0)
    return torch.randn(shape, generator=generator) / squares.sqrt() / 3**0.5


def _random_weight(key: str, value: Tensor, draw: _Noise, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point() or re.search(r"_period_units|_units_per_period", key):
        return value
    noise = draw(value.shape, generator)
    if value.ndim == 1:
        is_gain = re.search(r"norm_weight$|layer_norm\.weight$|\.[13]\.weight$", key)
        return 1 + 0.1 * noise if is_gain else 0.1 * noise
    in_by_out = re.search(r"_uvqk_weight|_output_weight|contextual_linear_weights", key)
    fan_in = value.shape[-2] if in_by_out else value.shape[-1]
    is_lookup = re.search(r"_embeddings_weight|action_embedding_table", key)
    return noise * (1.0 if is_lookup else fan_in**-0.5)


def _random_rows(table: TableConfig, seed: int, number: int) -> Callable[[], Iterator[NDArray]]:
    """Blocks of rows, each from a generator of its own, so that every core draws some of them."""

    def block(first: int) -> NDArray:
        rows = min(_RANDOM_BLOCK_ROWS, table.rows - first)
        generator = np.random.default_rng([seed, number, first])
        return generator.standard_normal((rows, table.dim), dtype=np.float32).astype(table.dtype)

    def blocks() -> Iterator[NDArray]:
        threads = min(os.cpu_count() or 1, _MOST_DRAWING)
        with ThreadPoolExecutor(threads) as pool:
            drawn: deque[Future[NDArray]] = deque()
            for first in range(0, table.rows, _RANDOM_BLOCK_ROWS):
                drawn.append(pool.submit(block, first))
                if len(drawn) > threads:
                    yield drawn.popleft().result()
            while drawn:
                yield drawn.popleft().result()

    return blocks
