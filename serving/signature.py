"""What Triton sees of each model: the contract's stages as inputs and outputs of a ``config.pbtxt``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.tensors import (
    ENSEMBLE,
    FUSED,
    STAGES,
    Dim,
    Limits,
    Precision,
    StageSpec,
    TensorSpec,
    stage_specs,
)
from hstu_trt.serving.served import SERVED, models_of
from hstu_trt.tables.ids import RowStatus

MODELS = models_of(SERVED)
"""Every model of a repository, steps before the ensemble."""

FLAVOURS = ("cpu", "cuda", "tensorrt")
"""How the models run: ONNX Runtime or our kernels in Python models, or TensorRT plans in Triton's TensorRT backend."""

FIXED_FLAVOURS = ("cuda", "tensorrt")
"""Those whose steps serve one dense model for good, behind a lookup that checks the whole request."""

ENGINE_STEPS = ("hstu", "mlp_head")
"""The steps that are TensorRT plans in the flavour ``tensorrt``."""

TIERS_PARAMETER = "tiers"
"""Parameter of LOOKUP_MODELS that names the settings of the tables' tiers; without it all tables are mapped files."""

ATTENTION_NORM = "attention_norm"
OUT_OF_REACH = "rows or weights out of reach: "
"""What an UNAVAILABLE of a server that runs says before it names them."""
USER_METADATA = "x-user-id"
"""The gRPC metadata by which a gateway sends a user's requests to one replica."""
REPLICA_LOST = "the replica is gone or silent; the request can be sent again"
"""What a gateway's UNAVAILABLE says where a request may have reached a replica that did not answer."""
DRAINING = ("has no available versions", "Server is stopping")
"""What Triton says of a model while the server is stopping: a NOT_FOUND, and an UNAVAILABLE between two steps."""
OVERLOADED = "overloaded: "
"""What an UNAVAILABLE says that refuses a request before any work, since too many wait."""
QUEUE_PARAMETER = "queue"
"""Parameter of LOOKUP_MODELS, where requests come in: how many may wait (``waiting_room.py``)."""
TABLES_VERSION = "tables_version"
"""Output: name and digest of the tables that answered, as in ``v000002@1f0c5a9be21d``."""
ROW_STATUS = "row_status"
"""Output: how many of the request's rows came from where, by ``tables.ids.RowStatus``."""
DENSE_ID = "dense_id"
"""Between the steps of the ensemble: digest of the dense model that goes with the rows (``releases.py``)."""
OFFSETS = ("uih_offsets", "candidate_offsets")

_TRITON_TYPES = {"float16": "TYPE_FP16", "float32": "TYPE_FP32", "int32": "TYPE_INT32", "int64": "TYPE_INT64"}


@dataclass(frozen=True)
class Port:
    """An input or output as ``config.pbtxt`` states it; -1 is a dynamic dim, the batch dim is left out."""

    name: str
    data_type: str
    dims: tuple[int, ...]
    ragged: bool = False


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model in Triton; ``max_batch_size`` 0 means that the tensors carry no batch dim."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    max_batch_size: int = 0


_DENSE_ID = Port(DENSE_ID, "TYPE_STRING", (1,))
_SERVED = (Port(TABLES_VERSION, "TYPE_STRING", (1,)), Port(ROW_STATUS, "TYPE_INT64", (len(RowStatus),)))


def _with_inputs(signature: Signature, *ports: Port) -> Signature:
    return dataclasses.replace(signature, inputs=(*signature.inputs, *ports))


def _with_outputs(signature: Signature, *ports: Port) -> Signature:
    return dataclasses.replace(signature, outputs=(*signature.outputs, *ports))


def signatures(config: HstuConfig, limits: Limits, precision: Precision, flavour: str = "cpu") -> dict[str, Signature]:
    """The signature of every model of a repository, by name.

    In the flavour ``cpu`` a step adds the attention norm itself, and serves the dense model that ``dense_id`` names. A
    TensorRT plan takes the norm as an input and checks nothing, so in that flavour ``embedding_lookup`` sees the whole
    request, checks it, and hands the norm on; plans are fixed, so there is no ``dense_id``. ``cuda`` does likewise.
    """
    specs = stage_specs(config, limits, precision)
    packed = {name: _packed(specs[name].without(ATTENTION_NORM)) for name in (*STAGES, ENSEMBLE)}
    if flavour in FIXED_FLAVOURS:
        lookup, norm = specs["embedding_lookup"], specs["hstu"].tensor(ATTENTION_NORM)
        guarded = StageSpec(lookup.name, specs[ENSEMBLE].inputs, (*lookup.outputs, norm))
        packed |= {"embedding_lookup": _packed(guarded), "hstu": _packed(specs["hstu"])}
    else:
        packed["embedding_lookup"] = _with_outputs(packed["embedding_lookup"], _DENSE_ID)
        packed |= {name: _with_inputs(packed[name], _DENSE_ID) for name in ENGINE_STEPS}
    packed[FUSED] = _one_user(specs[FUSED].without(ATTENTION_NORM, *OFFSETS), limits)
    return packed | {name: _with_outputs(packed[name], *_SERVED) for name in ("embedding_lookup", ENSEMBLE, FUSED)}


def _packed(spec: StageSpec) -> Signature:
    return Signature(tuple(map(_packed_port, spec.inputs)), tuple(map(_packed_port, spec.outputs)))


def _packed_port(tensor: TensorSpec) -> Port:
    dims = tuple(-1 if isinstance(dim, Dim) else dim for dim in tensor.dims)
    return Port(tensor.name, _TRITON_TYPES[tensor.dtype], dims)


def _one_user(spec: StageSpec, limits: Limits) -> Signature:
    """Triton's batch dim is the users: jagged tensors are ragged 1-D inputs, per-user tensors lose their first dim."""
    inputs = tuple(_one_user_port(tensor) for tensor in spec.inputs)
    return Signature(inputs, tuple(map(_packed_port, spec.outputs)), limits.users)


def _one_user_port(tensor: TensorSpec) -> Port:
    if len(tensor.dims) == 1:
        return Port(tensor.name, _TRITON_TYPES[tensor.dtype], (-1,), ragged=True)
    widths = tuple(dim for dim in tensor.dims[1:] if isinstance(dim, int))
    return Port(tensor.name, _TRITON_TYPES[tensor.dtype], widths)
