"""``tables convert``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.config_json import config_from_json
from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import read_document
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import MODEL_KIND, REGENERATE
from hstu_trt.contract.stored_table import IdRule
from hstu_trt.tables.convert import PlannedTable, TableRequest, check_target, convert, plan
from hstu_trt.tables.terminal import DTYPES, Progress, Verbs, json_option, pairs, print_tables, whole

_RULES = ("--features", "--hash", "--rank-by", "--default-row")


def add_parsers(verbs: Verbs) -> None:
    """Adds the verb's parser."""
    text = "make a tables folder from matrices [rows, dim] in .npy or .safetensors files, or from checkpoints"
    one = verbs.add_parser("convert", parents=[json_option()], help=text, description=text)
    one.add_argument(
        "--table", action="append", required=True, metavar="NAME=FILE[:TENSOR]",
        help="or NAME=CHECKPOINT[:TABLE], a directory with non_sparse.ckpt or a state dict (.pt); may be repeated",
    )  # fmt: skip
    for option, metavar, help_ in (
        ("--features", "NAME=F1,F2", "features of a table (default: --pair-with's, else its name)"),
        ("--hash", "NAME=splitmix64[:SEED]", "how ids become rows (default: the id is the row)"),
        ("--rank-by", "NAME=COUNTS.npy", "a count per id: the most frequent rows come first, ids are permuted"),
        ("--default-row", "NAME=ID", "the id whose row the policy default_row answers"),
    ):
        one.add_argument(option, action="append", default=[], metavar=metavar, help=help_)
    one.add_argument("--dtype", choices=DTYPES, help="of the stored rows (default: the source's)")
    one.add_argument("--shard-rows", type=int, help="rows per file (default: as many as fill 16 GiB)")
    one.add_argument("--pair-with", type=Path, metavar="MODEL", help="the exported model that these tables belong to")
    one.add_argument("--out", type=Path, required=True, help="the folder to make")
    one.add_argument("--force", action="store_true", help="replace a tables folder that stands there")
    one.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")
    one.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> int:
    dtype = None if options.dtype is None else DTYPES[options.dtype]
    model = None if options.pair_with is None else paired_model(options.pair_with)
    tables = plan(_requests(options, model.features if model else {}), dtype, options.shard_rows)
    check_target(options.out, sum(table.payload_bytes for table in tables), options.force)
    facts = {"pair_id": model.pair_id} if model else {}
    if not options.dry_run:
        progress = Progress(sum(table.payload_bytes for table in tables), "written")
        convert(options.out, tables, progress.add, facts)
        progress.end()
    print_tables([_planned_row(table) for table in tables], options.json)
    if not options.json:
        print(f"would write {options.out}" if options.dry_run else f"wrote {options.out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class PairedModel:
    """The exported model that tables belong to."""

    pair_id: str
    features: Mapping[str, tuple[str, ...]]
    """Of each table, by its name."""


def paired_model(model: Path) -> PairedModel:
    """What tables take over from an exported model. Raises ArtefactError, or ConfigError where it has no pair id."""
    regenerate = REGENERATE.format(folder=model)
    document = read_document(model, kind=MODEL_KIND, regenerate=regenerate)
    pair_id = document.get("pair_id")
    if not isinstance(pair_id, str):
        raise ConfigError(f"{model} has no pair id; make it again with: {regenerate}")
    config = config_from_json(document["config"]) if "config" in document else None
    tables = config.tables if isinstance(config, HstuConfig) else ()
    return PairedModel(pair_id=pair_id, features={table.name: table.features for table in tables})


def _requests(options: argparse.Namespace, of_model: Mapping[str, tuple[str, ...]]) -> dict[str, TableRequest]:
    sources = pairs("--table", options.table)
    features, hashes, ranks, defaults = (
        pairs(option, getattr(options, option[2:].replace("-", "_"))) for option in _RULES
    )
    for option, given in zip(_RULES, (features, hashes, ranks, defaults), strict=True):
        for name in given:
            if name not in sources:
                raise ConfigError(f"{option[2:]} of table {name!r}, but no --table {name}=FILE")
            if name in hashes and name in ranks:
                raise ConfigError(f"table {name!r}: hashed ids have no rank; give --hash or --rank-by")
    return {
        name: TableRequest(
            source=source,
            features=_features(name, features[name]) if name in features else of_model.get(name, (name,)),
            ids=_id_rule(hashes.get(name), defaults.get(name)),
            rank_by=Path(ranks[name]) if name in ranks else None,
        )
        for name, source in sources.items()
    }


def _id_rule(hash_text: str | None, default: str | None) -> IdRule:
    kind, _, seed = (hash_text or "none").partition(":")
    if kind not in ("none", "splitmix64"):
        raise ConfigError(f"--hash {hash_text!r}: choose splitmix64 or splitmix64:SEED")
    default_row = None if default is None else whole("--default-row", default)
    return IdRule(hash=kind, seed=whole("--hash", seed) if seed else 0, default_row=default_row)  # type: ignore[arg-type]


def _features(name: str, text: str) -> tuple[str, ...]:
    features = tuple(text.split(","))
    if "" in features or len(set(features)) != len(features):
        raise ConfigError(f"--features {name}={text}: a feature is empty or given twice")
    return features


def _planned_row(table: PlannedTable) -> dict[str, Any]:
    config = table.config
    return {
        "table": config.name,
        "source": str(table.source.path),
        "source dtype": table.source.dtype,
        "rows": config.rows,
        "dim": config.dim,
        "dtype": table.dtype,
        "bytes": table.payload_bytes,
        "shards": table.shards,
        "features": list(config.features),
    }
