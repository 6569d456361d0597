"""``hstu-trt export``: config + weights -> ONNX files and tables."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.cli import run_verb
from hstu_trt.contract.config_json import load_config
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.fp8_plan import LAYERS, planned_sites
from hstu_trt.contract.model import AnyConfig, HstuConfig
from hstu_trt.contract.model_folder import ModelFolder, onnx_stages, read_model_folder
from hstu_trt.contract.tensors import PRECISIONS, Limits, default_limits
from hstu_trt.contract.text import number_in


def parser() -> argparse.ArgumentParser:
    """The verb's options."""
    p = argparse.ArgumentParser(prog="hstu-trt export", description="checkpoint -> ONNX files and tables")
    p.add_argument(
        "--config",
        help="CONFIG.json (the reference's own works) or a preset: debug, dlrm_v3; an exported model brings its own",
    )
    p.add_argument(
        "--weights",
        required=True,
        help="checkpoint directory, .safetensors, torch.save state dict, exported model (fp32 or fp16), random:SEED, "
        "or random-heavy:SEED (heavy-tailed)",
    )
    p.add_argument("--precision", choices=PRECISIONS, default="fp32")
    p.add_argument("--out", type=Path, required=True, help="model folder to write")
    p.add_argument(
        "--name", help="the model's name; default: the config file's, its folder's if it is config.json, or the preset"
    )
    p.add_argument(
        "--table-rows", action="append", default=[], metavar="TABLE=ROWS", help="with random weights: a smaller table"
    )
    fp8 = p.add_argument_group("fp8")
    fp8.add_argument("--calibration", help="FILE as score takes it, or synthetic:N requests (default: synthetic:32)")
    fp8.add_argument("--plan", help="what computes in fp8: layers (default), all, or plan.json of bench plan-precision")
    fp8.add_argument("--attention-norm", help="of the calibration: fixed:<N> (default: max_seq_len) or batch_max")
    limits = p.add_argument_group("limits (upper bounds of requests and optimisation profiles)")
    limits.add_argument("--max-users", type=int, help="users per request")
    limits.add_argument("--max-history", type=int, help="history events per user")
    limits.add_argument("--max-candidates", type=int, help="candidates per user")
    limits.add_argument("--max-batch-history", type=int, help="history events per batch")
    limits.add_argument("--max-batch-candidates", type=int, help="candidates per batch")
    p.add_argument("--dry-run", action="store_true", help="read config and weights, print what would be written")
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    return p


def main(argv: Sequence[str]) -> int:
    """Runs the verb; returns its exit code."""
    args = parser().parse_args(argv)
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"[{time.perf_counter() - started:6.1f} s] {text}", file=sys.stderr, flush=True)

    progress(f"reading {' and '.join(filter(None, (args.config, args.weights)))}")
    job = _job(args, argv)
    if args.dry_run:
        _print_plan(job.config, job.limits, args)
        return 0
    from hstu_trt.export.export_model import export_model

    _print_result(export_model(job, args.out, progress), args.json, time.perf_counter() - started)
    return 0


def _job(args: argparse.Namespace, argv: Sequence[str]):  # type: ignore[no-untyped-def]
    """Config and checkpoint, checked against each other. PyTorch is imported here, after the options are known good."""
    from hstu_trt.export.build import check_weights
    from hstu_trt.export.export_model import ExportJob
    from hstu_trt.export.sources import is_exported, read_weights, table_hints, with_tables

    source = read_model_folder(Path(args.weights), verify=False) if is_exported(args.weights) else None
    config = _with_table_rows(_config(args, source), args)
    if not isinstance(config, HstuConfig) and args.precision != "fp32":
        raise ConfigError(f"{args.precision} is there for ranking models only; export a sequence encoder in fp32")
    checkpoint = read_weights(config, args.weights)
    config = with_tables(config, checkpoint, table_hints(Path(args.config or "")))
    check_weights(config, checkpoint.dense, checkpoint.source)
    limits = _limits(config, args, source.limits if source else None)
    return ExportJob(
        name=args.name or (source.name if source else _default_name(args.config)),
        config=config,
        checkpoint=checkpoint,
        limits=limits,
        precision=args.precision,
        made_by=shlex.join(["hstu-trt", "export", *argv]),
        quantisation=_quantisation(config, limits, args),
    )


def _config(args: argparse.Namespace, source: ModelFolder | None) -> AnyConfig:
    """The config that is named, or that of an exported model."""
    if args.config:
        return load_config(args.config)
    if source is None:
        raise ConfigError("--config is missing: CONFIG.json or a preset; only an exported model as --weights has one")
    return source.config


def _quantisation(config: AnyConfig, limits: Limits, args: argparse.Namespace):  # type: ignore[no-untyped-def]
    """What fp8 needs beside the weights; None for another precision."""
    from hstu_trt.export.calibration import DEFAULT_REQUESTS, SYNTHETIC, calibration_requests, requests_with_norm
    from hstu_trt.export.export_model import Quantisation

    if args.precision != "fp8":
        for option in ("calibration", "plan", "attention_norm"):
            if getattr(args, option) is not None:
                raise ConfigError(f"--{option.replace('_', '-')} goes with --precision fp8")
        return None
    assert isinstance(config, HstuConfig)
    sites = planned_sites(args.plan or LAYERS, config)
    source = args.calibration or f"{SYNTHETIC}:{DEFAULT_REQUESTS}"
    requests = calibration_requests(config, limits, source)
    norm = parse_attention_norm(args.attention_norm, config)
    return Quantisation(sites=sites, requests=requests_with_norm(config, requests, norm), source=source)


def _with_table_rows(config: AnyConfig, args: argparse.Namespace) -> AnyConfig:
    """The config with ``--table-rows`` applied: a preset's tables may be larger than any disk at hand."""
    if not args.table_rows:
        return config
    if not isinstance(config, HstuConfig) or not args.weights.startswith("random"):
        raise ConfigError("--table-rows goes with a ranking model and --weights random:SEED")
    rows: dict[str, int] = {}
    for option in args.table_rows:
        name, _, count = option.partition("=")
        number = number_in(count)
        if name not in {t.name for t in config.tables} or not number:
            known = ", ".join(t.name for t in config.tables)
            raise ConfigError(f"--table-rows {option}: expected TABLE=ROWS with a table of the config ({known})")
        rows[name] = number
    tables = tuple(dataclasses.replace(t, rows=rows.get(t.name, t.rows)) for t in config.tables)
    return dataclasses.replace(config, tables=tables)


def _default_name(config: str) -> str:
    """A model's name by its config: the preset, the file, or the folder of a ``config.json``."""
    path = Path(config)
    if path.suffix != ".json":
        return config
    return path.resolve().parent.name if path.stem == "config" else path.stem


def _limits(config: AnyConfig, args: argparse.Namespace, of_source: Limits | None) -> Limits:
    """Limits from the options; else an exported model's own, else the config's."""
    options = {field.name: getattr(args, f"max_{field.name}") for field in dataclasses.fields(Limits)}
    if isinstance(config, HstuConfig):
        if of_source is not None and not any(options.values()):
            return of_source
        return default_limits(config, **options)
    users = 32 if args.max_users is None else args.max_users
    history = config.max_seq_len if args.max_history is None else args.max_history
    if history > config.max_seq_len:
        raise ConfigError(f"--max-history {history}: the position table ends at {config.max_seq_len} events")
    return Limits(users=users, history=history, candidates=1, batch_history=users * history, batch_candidates=users)


def _print_plan(config: AnyConfig, limits: Limits, args: argparse.Namespace) -> None:
    files = [f"{stage}.onnx" for stage in onnx_stages(config)]
    print(f"would write {args.out} in {args.precision}: {', '.join(files)}, weights.safetensors, tables/")
    print(f"limits: {limits}")
    if isinstance(config, HstuConfig):
        for table in config.tables:
            print(f"table {table.name}: {table.rows} x {table.dim} {table.dtype} <- {', '.join(table.features)}")


def _print_result(model: ModelFolder, as_json: bool, seconds: float) -> None:
    files = {p.name: p.stat().st_size for p in sorted(model.path.glob("*.*"))}
    tables = sum(p.stat().st_size for p in model.tables.rglob("*.safetensors"))
    if as_json:
        print(json.dumps({"model": str(model.path), "name": model.name, "precision": model.precision, "files": files,
                          "table_bytes": tables, "seconds": round(seconds, 1)}))  # fmt: skip
        return
    print(f"{model.name} {model.precision} -> {model.path}   ({seconds:.1f} s)")
    for name, size in files.items():
        print(f"  {name:<24} {size / 1e6:10.2f} MB")
    print(f"  {'tables/':<24} {tables / 1e6:10.2f} MB")


if __name__ == "__main__":
    sys.exit(run_verb(main, sys.argv[1:], "hstu-trt export"))
