"""The ``embedding_lookup`` stage on the host: a Runner over memory-mapped tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.stored_table import TablesFolder
from hstu_trt.contract.tensors import PADDING_ID, feature_columns, float_dtype
from hstu_trt.tables.host import HostTables, LookupOptions, OutputDtype
from hstu_trt.tables.ids import Policy
from hstu_trt.tables.row_source import RowSource
from hstu_trt.tables.tiers import IdsPart, lookup_parts


class RowsOfModel:
    """Ids [n, features] -> rows [n, features * dim] as a model takes them, from any tables of its form."""

    def __init__(self, model: ModelFolder, policy: Policy) -> None:
        self.columns = feature_columns(model.ranking_config)
        dtype: OutputDtype = "float16" if float_dtype(model.precision) == "float16" else "float32"
        self._options = {
            name: LookupOptions(
                policy=policy, padding_id=PADDING_ID if name == "contextual_ids" else None, dtype=dtype, what=name
            )
            for name in self.columns
        }

    def look_up(self, tables: RowSource, feed: Mapping[str, NDArray]) -> tuple[Tensors, Tensors]:
        """Rows by embeddings tensor, and status ``[n, features]`` uint8 by ids tensor.

        Raises InputError for an id that the policy rejects, RemoteError for rows that a cluster must give and does not.
        """
        parts = [
            IdsPart(features=features, ids=feed[name], options=self._options[name])
            for name, features in self.columns.items()
        ]
        found = dict(zip(self.columns, lookup_parts(tables, parts), strict=True))
        rows = {name.replace("_ids", "_embeddings"): rows for name, (rows, _) in found.items()}
        return rows, {name: status for name, (_, status) in found.items()}


class HostLookup:
    """Ids [n, features] -> rows [n, features * dim], in the model folder's precision."""

    def __init__(self, model: ModelFolder, policy: Policy = "reject") -> None:
        self.spec = model.specs["embedding_lookup"]
        self._limits = model.limits
        self._rows = RowsOfModel(model, policy)
        self._tables = HostTables.open(model.tables)
        check_tables(model, self._tables.folder)

    def __enter__(self) -> HostLookup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        """Looks up every ids tensor. Raises InputError for a malformed one and for an id that the policy rejects."""
        check_request(feed, self.spec, self._limits)
        return self._rows.look_up(self._tables, feed)[0]


def check_tables(model: ModelFolder, found: TablesFolder) -> None:
    """Refuses tables that a model cannot use: of other dense weights, or of another form. Raises ArtefactError."""
    if None not in (found.pair_id, model.pair_id) and found.pair_id != model.pair_id:
        raise ArtefactError(
            f"{found.path} belongs to the dense weights {found.pair_id}, the model {model.path} has {model.pair_id}; "
            "export both from one checkpoint"
        )
    home = {feature: table for table in found.tables.values() for feature in table.features}
    config = model.ranking_config
    for feature in config.embedding_features:
        dim = config.table_of(feature).dim
        if feature not in home or home[feature].dim != dim:
            got = f"rows of width {home[feature].dim}" if feature in home else "no table"
            raise ArtefactError(
                f"{found.path} has {got} for feature {feature!r}; the model {model.path} takes rows of width {dim}"
            )
