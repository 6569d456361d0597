"""Whether the Python files of a deployment's models still find what they import from this package.

A deployment is often older than the package that serves it. What a model imports may have moved since, and then Triton
would tell of it as an error deep in a log; so it is looked up before the launch, without running any of it.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from hstu_trt.contract.errors import ArtefactError

_PACKAGE = "hstu_trt"


def check_model_code(repository: Path, regenerate: str) -> None:
    """Every ``repository/MODEL/VERSION/model.py``. Raises ArtefactError with what is missing and ``regenerate``."""
    for path in sorted(repository.glob("*/*/model.py")):
        try:
            missing = next(_missing(ast.parse(path.read_bytes(), path.name)), None)
        except (SyntaxError, ValueError, OSError, RecursionError) as error:
            raise ArtefactError(f"{path} is no Python file ({error}); make it again with: {regenerate}") from None
        if missing is not None:
            raise ArtefactError(
                f"{path} was made by another version of hstu-trt: it imports {missing}, which this version does not "
                f"have; make the deployment again with: {regenerate}"
            )


def _missing(code: ast.Module) -> Iterator[str]:
    """Imports of this package that lead nowhere, as ``module`` or ``name from module``."""
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            named: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            named = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        for module, name in named:
            if module.partition(".")[0] != _PACKAGE:
                continue
            source = _source_of(module)
            if source is None:
                yield module
            elif name is not None and not _defines(source, name) and _source_of(f"{module}.{name}") is None:
                yield f"{name} from {module}"


def _source_of(module: str) -> Path | None:
    """Its file, found without running it; None: there is no such module."""
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None  # nor a package that could hold it
    return None if spec is None or spec.origin is None else Path(spec.origin)


def _defines(source: Path, name: str) -> bool:
    """Whether a module binds a name at its top level."""
    for node in ast.parse(source.read_bytes()).body:
        match node:
            case ast.ClassDef(name=found) | ast.FunctionDef(name=found):
                bound = {found}
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                bound = {alias.asname or alias.name for alias in aliases}
            case ast.Assign(targets=targets):
                bound = {target.id for target in targets if isinstance(target, ast.Name)}
            case _:
                bound = set()
        if name in bound:
            return True
    return False
