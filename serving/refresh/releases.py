"""Releases: tables, and the dense weights that they were trained with. They move together or not at all.

A folder of versions (``contract/table_versions.py``) holds tables, deltas, and model folders. Every version bears the
``pair_id`` of the dense weights that it belongs to, so the pair needs no list of its own:

    a model folder           dense weights and tables of one checkpoint: the way to new dense weights
    tables, or a delta       served with the dense model of the same pair_id: the deployment's own, or that of a model
                             folder beside it; refused where there is none

How a request sees one release only, though its steps run in different processes: ``embedding_lookup`` pins a release
as the request begins, and sends the digest of the dense model along with the rows (``dense_id``). ``hstu`` and
``mlp_head`` answer with the runner of exactly that digest, which covers every file of the model; they never look at
what is in use. Each announces what it holds (``held.py``), and ``embedding_lookup`` moves to new dense weights once
both hold them. Should one not hold what a request names, it opens it then: late, but never mixed. ``ranking_fused``
runs in one process and pins a release per batch.

So nothing depends on when which process notices ``CURRENT``, and no versions of Triton's models have to be switched,
of which an ensemble would take three, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import json_digest, read_document
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import MODEL_KIND, ModelFolder, read_model_folder, require_whole
from hstu_trt.contract.model_folder import REGENERATE as MODEL_AGAIN
from hstu_trt.contract.stored_table import TablesFolder, is_table_name
from hstu_trt.contract.table_format import read_tables_folder
from hstu_trt.contract.table_versions import (
    CURRENT_NAME,
    DELTA_KIND,
    PREVIOUS_NAME,
    named_version,
    tables_in,
    version_kind,
)
from hstu_trt.serving.signature import ENGINE_STEPS
from hstu_trt.tables.delta import read_delta
from hstu_trt.tables.delta_chain import chain_to_whole
from hstu_trt.tables.host import REGENERATE
from hstu_trt.tables.lookup_stage import check_tables
from hstu_trt.tables.refresh import VersionOpener
from hstu_trt.tables.version import TableVersion

T = TypeVar("T")


@dataclass(eq=False)
class Release:
    """Tables and the dense model that they belong to. Closed once no request reads it."""

    tables: TableVersion
    dense: ModelFolder
    instead_of: str | None = None
    """The version in use that could not be served as the server started, so that this one is."""

    def close(self) -> None:
        """Lets go of the tables; dense models are let go of where they are held (``DenseStages``)."""
        self.tables.close()


@dataclass(frozen=True)
class ReleaseFolder:
    """Where versions are published for a deployment, and the model that it was assembled for."""

    path: Path
    model: ModelFolder
    or_previous: bool = False
    """Whether a server that starts takes the version before the one in use, where that cannot be served."""

    def current(self) -> Path | None:
        """The version in use; None where nothing has been published. Raises ArtefactError."""
        return named_version(self.path, CURRENT_NAME) if (self.path / CURRENT_NAME).exists() else None

    def dense_of(self, version: Path) -> ModelFolder:
        """The dense model of a version. Raises ArtefactError, with the reason why the two cannot be served."""
        if version_kind(version) == MODEL_KIND:
            return self._read_model(version)
        pair_id = pair_id_of(version)
        if pair_id is None and self.model.pair_id is not None:
            raise ArtefactError(
                f"{version} does not say which dense weights it belongs to; "
                f"convert with: hstu-trt tables convert --pair-with {self.model.path}"
            )
        if pair_id == self.model.pair_id:
            return self.model
        # Exported again with newer tables, the same dense weights stand there twice: any of them will do, and every
        # process must choose the same.
        found = {_dense_files(model): model for model in self._models() if model.pair_id == pair_id}
        if len(found) != 1:
            raise ArtefactError(
                f"{version} belongs to the dense weights {str(pair_id)[:12]}, the model {self.model.path} has "
                f"{str(self.model.pair_id)[:12]}; {len(found)} model folders beside it have its weights: publish the "
                "exported model folder, which brings both"
            )
        return self._read_model(next(iter(found.values())).path)

    def dense_by_digest(self, digest: str) -> ModelFolder:
        """The dense model of that digest. Raises ArtefactError."""
        for model in (self.model, *self._models()):
            if model.digest == digest:
                return self.model if model is self.model else self._read_model(model.path)
        raise ArtefactError(f"no model folder of digest {digest[:12]} in {self.path}; restart the server")

    def _models(self) -> Iterator[ModelFolder]:
        """The model folders among the versions, their files not yet read."""
        for path in sorted(self.path.iterdir()) if self.path.is_dir() else []:
            try:
                is_version = is_table_name(path.name) and path.is_dir() and not path.is_symlink()
                if is_version and version_kind(path) == MODEL_KIND:
                    model = read_model_folder(path, verify=False)
                    require_whole(model)
                    yield model
            except ArtefactError:
                continue  # not a version, or not a sound one

    def _read_model(self, path: Path) -> ModelFolder:
        """A verified model folder that can stand in for the deployment's. Raises ArtefactError."""
        found = read_model_folder(path)
        require_whole(found)
        for what, new, old in (
            ("limits", found.limits, self.model.limits),
            ("precision", found.precision, self.model.precision),
            ("stages", found.specs, self.model.specs),
            ("config", _without_rows(found.ranking_config), _without_rows(self.model.ranking_config)),
        ):
            if new != old:
                raise ArtefactError(
                    f"{path} has other {what} than the model of this deployment, {self.model.path}; "
                    "assemble a deployment of its own"
                )
        return found


def _dense_files(model: ModelFolder) -> str:
    """Digest of what the steps serve of a model: not of its tables, nor of graphs that name their rows."""
    files = read_document(model.path, kind=MODEL_KIND, regenerate=MODEL_AGAIN.format(folder=model.path))["files"]
    dense = (*(model.onnx(step) for step in ENGINE_STEPS), model.weights)
    return json_digest({path.name: files[path.name]["sha256"] for path in dense})


def _without_rows(config: HstuConfig) -> HstuConfig:
    """Tables may grow."""
    return dataclasses.replace(config, tables=tuple(dataclasses.replace(table, rows=0) for table in config.tables))


def pair_id_of(version: Path) -> str | None:
    """The dense weights that tables or a delta belong to. Raises ArtefactError."""
    if version_kind(version) == DELTA_KIND:
        pair_id = read_delta(version, verify=False).result.get("pair_id")
        if pair_id is not None and not isinstance(pair_id, str):
            raise ArtefactError(f"{version}: the pair_id of its result is {pair_id!r}")
        return pair_id
    return read_tables_folder(
        version, regenerate=REGENERATE.format(folder=version), may_lack=lambda table: True
    ).pair_id


@dataclass(frozen=True)
class PassedOver:
    """The version in use, where a server that starts cannot serve it and takes the one before it."""

    version: str
    """Its name; CURRENT where that names none."""
    why: str


def take_first(folder: ReleaseFolder, take: Callable[[Path | None], T]) -> tuple[T, PassedOver | None]:
    """What a server starts with: ``take`` of the version in use (None: nothing has been published).

    A running server refuses a bad version and goes on, so that one may stand in CURRENT for long before a server has to
    start with it. Then this takes the version before it, under ``or_previous``: it was published once, so it was whole,
    and ``take`` holds it to the same checks, of its files and of the dense weights that it belongs to. Any other folder
    may never have been meant to be served. Raises ArtefactError with the way back, or ConfigError.
    """
    try:
        return take(folder.current()), None
    except (ArtefactError, ConfigError) as error:
        if not (folder.path / CURRENT_NAME).exists():
            raise
        why = str(error)
    cannot = f"{folder.path / CURRENT_NAME} cannot be served: {why}"
    if not folder.or_previous:
        way_back = f"serve the version before it with: hstu-trt tables rollback {folder.path.resolve()}"
        raise ArtefactError(f"{cannot}; {way_back}")
    try:
        return take(named_version(folder.path, PREVIOUS_NAME)), PassedOver(_name_in_use(folder), why)
    except (ArtefactError, ConfigError) as error:
        raise ArtefactError(f"{cannot}; nor can the version before it: {error}") from None


def _name_in_use(folder: ReleaseFolder) -> str:
    try:
        return named_version(folder.path, CURRENT_NAME).name
    except ArtefactError:
        return CURRENT_NAME


def check_published(folder: ReleaseFolder, tell: Callable[[str], None] = lambda text: None) -> Path | None:
    """The version that a server would start with, if any, after a look at whether it can be served.

    tell: gets a sentence where that is not the one in use. Raises ArtefactError.
    """
    version, passed = take_first(folder, lambda version: _checked(folder, version))
    if passed is not None and version is not None:
        tell(f"{passed.version} cannot be served, {version.name} before it is: {passed.why}")
    return version


def _checked(folder: ReleaseFolder, version: Path | None) -> Path | None:
    if version is None:
        return None
    dense = folder.dense_of(version)
    if version_kind(version) == DELTA_KIND:
        chain_to_whole(read_delta(version))
    else:
        tables = tables_in(version)
        regenerate = REGENERATE.format(folder=tables)
        check_tables(dense, read_tables_folder(tables, regenerate=regenerate, may_lack=lambda table: True))
    return version


def open_tables_of(
    version: Path, dense: ModelFolder, opener: VersionOpener, held: TableVersion | None = None
) -> TableVersion:
    """Opens the tables of a version for a dense model. Raises ArtefactError, ConfigError or OSError."""

    def check(folder: TablesFolder) -> None:
        check_tables(dense, folder)

    folder = version if version_kind(version) == DELTA_KIND else tables_in(version)
    return dataclasses.replace(opener, check=check).open(folder, version.name, held)


def open_own_tables(model: ModelFolder, opener: VersionOpener) -> TableVersion:
    """The tables that were exported with a model; whoever launched the server has verified the model's files."""
    regenerate = REGENERATE.format(folder=model.tables)
    check_tables(model, read_tables_folder(model.tables, regenerate=regenerate, may_lack=opener.may_lack))
    return opener.open(model.tables, model.name)
