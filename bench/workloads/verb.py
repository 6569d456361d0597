"""``hstu-trt bench workload``: the requests of a profile as files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hstu_trt.bench.arguments import count, suite_parser, whole
from hstu_trt.bench.workloads.generate import DEFAULT_SEED, generate_slots
from hstu_trt.bench.workloads.lengths import length_histogram
from hstu_trt.bench.workloads.profiles import PROFILES
from hstu_trt.contract.config_json import load_config
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import read_model_folder
from hstu_trt.contract.tensors import Limits, default_limits
from hstu_trt.contract.text import bytes_text


def main(argv: Sequence[str]) -> int:
    """Generates the requests of a profile, one .npz per time slot."""
    parser = suite_parser("workload", main.__doc__)
    parser.add_argument("--profile", choices=PROFILES, default="ci", help="(default: ci)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="exported model: its tables bound the ids, its limits the rest")
    source.add_argument("--config", help="preset or config JSON with embedding_tables")
    parser.add_argument("--requests", type=count, help="at most this many requests (default: the profile's)")
    parser.add_argument("--timestamps", choices=("real", "ones"), default="real", help="ones: as in MLPerf's data")
    parser.add_argument("--seed", type=whole, default=DEFAULT_SEED, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for slot_<number>.npz")
    args = parser.parse_args(argv)
    config, limits = _model_limits(args.model) if args.model else _preset_limits(args.config)
    profile = PROFILES[args.profile]()
    if args.requests is not None:
        profile = dataclasses.replace(profile, requests=args.requests)
    lengths, size = [], 0
    for part in generate_slots(profile, config, seed=args.seed, timestamps=args.timestamps, limits=limits):
        path = args.out / f"slot_{part.key[0, 0]:03d}.npz"
        part.save(path)
        lengths.append(part.history_lengths)
        size += path.stat().st_size
    print(length_histogram(np.concatenate(lengths)))
    print(f"wrote {args.out}: {len(lengths)} file(s), {bytes_text(size)}, profile {args.profile}, seed {args.seed}")
    return 0


def _model_limits(path: Path) -> tuple[HstuConfig, Limits]:
    model = read_model_folder(path, verify=False)
    return model.ranking_config, model.limits


def _preset_limits(source: str) -> tuple[HstuConfig, Limits]:
    config = load_config(source)
    if not isinstance(config, HstuConfig):
        raise ConfigError(f"config {source} is a sequence encoder; a workload needs a ranking model (DlrmHSTU)")
    return config, default_limits(config)
