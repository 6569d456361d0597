"""The ``embedding_lookup`` stage on the host: a Runner over memory-mapped tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from numpy.typing import NDArray

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.features import Tensors, check_request
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.tensors import PADDING_ID, feature_columns, float_dtype
from hstu_trt.tables.host import HostTables, OutputDtype
from hstu_trt.tables.ids import Policy


class HostLookup:
    """Ids [n, features] -> rows [n, features * dim], in the model folder's precision."""

    def __init__(self, model: ModelFolder, policy: Policy = "reject") -> None:
        self.spec = model.specs["embedding_lookup"]
        self._limits = model.limits
        self._columns = feature_columns(model.ranking_config)
        self._dtype: OutputDtype = "float16" if float_dtype(model.precision) == "float16" else "float32"
        self._policy = policy
        self._tables = HostTables.open(model.tables)
        pair_id = self._tables.folder.pair_id
        if None not in (pair_id, model.pair_id) and pair_id != model.pair_id:
            raise ArtefactError(
                f"{model.tables} belongs to the dense weights {pair_id}, the model {model.path} has {model.pair_id}; "
                "export both from one checkpoint"
            )

    def __enter__(self) -> HostLookup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def infer(self, feed: Mapping[str, NDArray]) -> Tensors:
        """Looks up every ids tensor. Raises InputError for a malformed one and for an id that the policy rejects."""
        check_request(feed, self.spec, self._limits)
        return {
            name.replace("_ids", "_embeddings"): self._tables.lookup_features(
                features,
                feed[name],
                policy=self._policy,
                padding_id=PADDING_ID if name == "contextual_ids" else None,
                dtype=self._dtype,
                what=name,
            )
            for name, features in self._columns.items()
        }
