"""The house's rules: which room may import which, what stays out of the import space and out of the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]

# room -> the rooms it may import
ALLOWED = {
    "contract": set(),
    "export": {"contract"},
    "plugins": {"contract"},
    "tables": {"contract"},
    "engines": {"contract", "plugins"},
    "serving": {"contract", "engines", "tables"},
    "triton_repo": {"serving"},
    "bench": {"contract", "export", "plugins", "tables", "engines", "serving"},
}

# The command line names each verb's module as data and imports it when the verb is called.
# The second looks up whether modules are there, and runs none.
IMPORTS_BY_VARIABLE = {"contract/cli.py", "serving/model_code.py"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imported_modules(source: str, package: str) -> tuple[set[str], bool]:
    """Modules that a source imports anywhere, late imports too, and whether it imports one whose name is computed."""
    found: set[str] = set()
    computed = False
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found.update((module, *(f"{module}.{alias.name}" for alias in node.names)))
        elif isinstance(node, ast.Call) and _is_import_call(node.func):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.JoinedStr):  # f"hstu_trt.room.{module}": the room is said
                name = name.values[0] if rooms_of({_text(name.values[0])}) else None
            if _text(name):
                found.add(_text(name))
            else:
                computed = True
    return found, computed


def _text(node: ast.expr | None) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _is_import_call(function: ast.expr) -> bool:
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__", "run_module", "find_spec")


def rooms_of(modules: set[str]) -> set[str]:
    return {m.split(".")[1] for m in modules if m.startswith("hstu_trt.")} & set(ALLOWED)


PLANTED = [
    ("import hstu_trt.tables.host", {"tables"}),
    ("from hstu_trt.tables import host", {"tables"}),
    ("from hstu_trt import tables", {"tables"}),
    ("from ..tables import host", {"tables"}),
    ("from .. import tables", {"tables"}),
    ("def late():\n    from hstu_trt.tables.host import HostTables", {"tables"}),
    ("import importlib\nimportlib.import_module('hstu_trt.tables.host')", {"tables"}),
    ("from importlib import import_module\nimport_module('hstu_trt.tables')", {"tables"}),
    ("__import__('hstu_trt.tables')", {"tables"}),
    ("import_module(f'hstu_trt.tables.{name}')", {"tables"}),
    ("from .hashing import mix\nimport tables_of_contents", {"export"}),
    ("help = 'hstu_trt.tables is a room'", set()),
]


@pytest.mark.parametrize(("source", "rooms"), PLANTED)
def test_planted_imports_are_found(source, rooms):
    assert rooms_of(imported_modules(source, "hstu_trt.export")[0]) == rooms


@pytest.mark.parametrize("name", ["name", "f'{name}'", "f'hstu_trt.{name}'", "f'{room}.tables.{name}'"])
def test_a_computed_import_is_found(name):
    assert imported_modules(f"import importlib\nimportlib.import_module({name})", "hstu_trt.export")[1]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_the_rooms_before_it(room):
    wrong = []
    for path in sources(room):
        package = ".".join(("hstu_trt", *path.relative_to(ROOT).parent.parts))
        modules, computed = imported_modules(path.read_text(), package)
        name = path.relative_to(ROOT).as_posix()
        wrong += [f"{name} imports {other}" for other in rooms_of(modules) - ALLOWED[room] - {room}]
        wrong += [f"{name} imports a module by a variable"] * (computed and name not in IMPORTS_BY_VARIABLE)
    assert not wrong


def test_every_package_is_a_room():
    packages = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} <= set(ALLOWED)


def folders_of_modules(room: Path) -> set[str]:
    """Folders with Python files from a room on downwards, as ``serving/fleet``."""
    return {path.parent.relative_to(room.parent).as_posix() for path in room.rglob("*.py")}


@pytest.mark.parametrize("room", sorted(set(ALLOWED) - {"triton_repo"}))
def test_every_folder_of_modules_is_installed(room):
    """setuptools takes the packages that are listed, so a wheel would lack one that is not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = folders_of_modules(ROOT / room)
    assert {folder for folder in folders if not (ROOT / folder / "__init__.py").is_file()} == set()
    names = {f"hstu_trt.{folder.replace('/', '.')}": folder for folder in folders}
    listed = {name: folder for name, folder in settings["package-dir"].items() if folder.split("/")[0] == room}
    assert listed == names
    assert {name for name in settings["packages"] if name.split(".")[1] == room} == set(names)


def test_a_folder_of_modules_is_found(tmp_path):
    (tmp_path / "room/part/empty").mkdir(parents=True)
    (tmp_path / "room/part/module.py").touch()
    assert folders_of_modules(tmp_path / "room") == {"room/part"}


@pytest.mark.parametrize("room", ["export", "plugins", "tables", "engines", "serving", "bench", "contract"])
def test_a_room_is_no_global_name(room, tmp_path):
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({room!r}) is not None)"
    assert subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_model_repository_is_no_package():
    assert not list((ROOT / "triton_repo").rglob("__init__.py"))


def tree() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: the list of files comes from git")
    files = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in files if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


# Written so that this file does not match itself.
FOREIGN = {
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(root[/]|home[/]\w)"),
    "an index option": re.compile(r"-{2}(extra-)?index-url|-{2}find-links"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_the_tree_is_free_of(what):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tree()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if FOREIGN[what].search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of somebody's machine", "open('/ro" + "ot/x')"),
        ("an index option", "pip install --ind" + "ex-url x"),
    ],
)
def test_foreign_lines_are_found(what, line):
    assert FOREIGN[what].search(line)
