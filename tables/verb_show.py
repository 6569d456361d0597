"""``tables show``, ``tables publish`` and ``tables rollback``."""

from __future__ import annotations

import argparse
from pathlib import Path

from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import current_tables, publish_version, rollback_version
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.terminal import Verbs, json_option, print_tables, stored_row


def add_parsers(verbs: Verbs) -> None:
    """Adds the verbs' parsers."""
    text = "list the tables of a folder, or of the version in use of a folder of versions"
    one = verbs.add_parser("show", parents=[json_option()], help=text, description=text)
    one.add_argument("folder", type=Path, help="the tables folder, e.g. MODEL/tables")
    one.set_defaults(run=_show)
    text = "hash a version, then make it the one in use of the folder it stands in (also the way back to an older one)"
    one = verbs.add_parser("publish", help=text, description=text)
    one.add_argument("folder", type=Path, help="tables, a delta or a model folder, e.g. TABLES/v000002")
    one.set_defaults(run=_publish)
    text = "go back to the version that was in use before; running servers follow"
    one = verbs.add_parser("rollback", help=text, description=text)
    one.add_argument("folder", type=Path, help="the folder of versions, e.g. TABLES")
    one.set_defaults(run=_rollback)


def _show(options: argparse.Namespace) -> int:
    folder = current_tables(options.folder)
    found = read_tables_folder(folder, regenerate=REGENERATE.format(folder=folder))
    facts = {key: value for key in ("version", "pair_id") if (value := getattr(found, key)) is not None}
    print_tables([stored_row(table) for table in found.tables.values()], options.json, facts)
    return 0


def _publish(options: argparse.Namespace) -> int:
    version = options.folder.absolute()
    publish_version(version, regenerate=REGENERATE.format(folder=options.folder))
    _print_current(version.parent, version.name)
    return 0


def _rollback(options: argparse.Namespace) -> int:
    version = rollback_version(options.folder.absolute(), regenerate=REGENERATE.format(folder=options.folder))
    _print_current(options.folder, version.name)
    return 0


def _print_current(folder: Path, name: str) -> None:
    print(f"{folder} uses {name}. Servers that follow it take it, or stay as they are and say why in RUN/events.jsonl")
