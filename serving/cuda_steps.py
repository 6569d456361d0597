"""The flavour ``cuda``: every step a Python model on one GPU, over our kernels and the model's own tables.

Tensors stay on the GPU between the steps of ``ranking``. ``ranking_fused`` packs waiting requests by tokens itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hstu_trt.contract.errors import ConfigError
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.contract.model_folder import REGENERATE, ModelFolder
from hstu_trt.contract.table_format import read_tables
from hstu_trt.contract.tensors import ENSEMBLE, FUSED, STAGES
from hstu_trt.serving import pbtxt
from hstu_trt.serving.engine_steps import send_through_lookup
from hstu_trt.serving.signature import Signature

DEVICES = ("cuda", "cpu")
MODEL_CLASSES = {
    "embedding_lookup": "DeviceLookupModel", "hstu": "DeviceStepModel", "mlp_head": "DeviceStepModel",
    FUSED: "MicroBatchModel",
}  # fmt: skip
_MODEL_FILE = '''"""Made by hstu-trt assemble: {name} on {device}."""

{imports}from hstu_trt.serving.models.cuda_models import {cls} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# Without a GPU attention is the plain PyTorch operator of another room, which a deployment may know and this one not.
_PLAIN_OPERATORS = "import hstu_trt.export.torch_ops  # noqa: F401\n"


@dataclass(frozen=True, kw_only=True)
class CudaSettings:
    """Settings of the flavour, which go into ``config.pbtxt``."""

    device: str = "cuda"
    """``cpu``: plain PyTorch in place of the kernels, to test deployments where there is no GPU."""
    batch_tokens: int = 36_864
    """Tokens of a micro-batch."""
    batches_in_flight: int = 2
    bucket_steps: int = 16
    """``CudaOptions.bucket_steps``: a batch of a size that is new goes without a graph."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ConfigError(f"unknown device {self.device!r}: choose from {', '.join(DEVICES)}")
        for name in ("batch_tokens", "batches_in_flight", "bucket_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give 1 or more")

    def parameters(self) -> dict[str, str]:
        """As parameters of the models."""
        return {name: str(value) for name, value in vars(self).items()}

    def command_options(self) -> dict[str, object]:
        """As options of ``assemble``."""
        return {"--device": self.device, "--batch-tokens": self.batch_tokens}

    @classmethod
    def of_parameters(cls, parameters: Mapping[str, str]) -> CudaSettings:
        """What ``parameters`` wrote. Raises ConfigError."""
        try:
            numbers = {name: int(parameters[name]) for name in ("batch_tokens", "batches_in_flight", "bucket_steps")}
            return cls(device=parameters["device"], **numbers)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"config.pbtxt: {error!r}; assemble the deployment again") from None


def require_servable(model: ModelFolder) -> None:
    """Raises ConfigError for tables that the runner does not take."""
    for name, table in read_tables(model.tables, regenerate=REGENERATE.format(folder=model.path)).items():
        if table.is_quantised or table.row_order != "identity" or table.ids.hash != "none":
            raise ConfigError(
                f"table {name} of {model.path} is quantised, hashed or in another order than its ids; the flavour cuda "
                "keeps plain rows in GPU memory: export the model anew, or take --flavour cpu"
            )


def use_cuda(configs: Mapping[str, pbtxt.ModelConfig], wanted: Mapping[str, Signature], settings: CudaSettings) -> None:
    """Puts the steps of the repository on the device, in place."""
    for name in (name for name in MODEL_CLASSES if name in configs):
        config = configs[name]
        del config.instance_group[:]
        if settings.device == "cpu":
            config.instance_group.add(kind="KIND_CPU", count=1)
        else:
            config.instance_group.add(kind="KIND_GPU", count=1, gpus=[0])
        kept = {key: pbtxt.parameter(config, key) for key in ("model_folder", "id_policy", "attention_norm", "config")}
        config.parameters.clear()
        # Triton's Python backend copies every input to the host unless told otherwise.
        given = {"FORCE_CPU_ONLY_INPUT_TENSORS": "no"} if name in STAGES else {}
        for key, value in {**kept, **settings.parameters(), **given}.items():
            if value is not None:
                pbtxt.set_parameter(config, key, value)
    if ENSEMBLE in configs:
        send_through_lookup(configs, wanted)


def place_models(repository: Path, device: str) -> None:
    """Writes the Python files of the models, in place of those that run on the host."""
    for name, cls in MODEL_CLASSES.items():
        if not (repository / name).is_dir():
            continue  # not served
        imports = _PLAIN_OPERATORS if device == "cpu" else ""
        text = _MODEL_FILE.format(name=name, device=device, imports=imports, cls=cls)
        write_text_atomically(repository / name / "1" / "model.py", text)
