"""A deployment that was made by another version of this package is refused in words, before a server is launched."""

import subprocess
import sys

import pytest

from hstu_trt.contract.errors import ArtefactError
from hstu_trt.contract.manifest import MANIFEST_NAME, read_document, write_manifest
from hstu_trt.serving.assemble import Options, assemble
from hstu_trt.serving.cuda_steps import CudaSettings
from hstu_trt.serving.deployment import DEPLOYMENT_KIND, read_deployment
from hstu_trt.serving.model_code import check_model_code

FLAVOURS = {
    "cpu": Options(),
    "cuda": Options(flavour="cuda"),
    "cuda on a CPU": Options(flavour="cuda", cuda=CudaSettings(device="cpu")),
}


@pytest.mark.parametrize("options", FLAVOURS.values(), ids=FLAVOURS)
def test_what_assemble_writes_finds_its_imports(make_model, tmp_path, options):
    deployment = assemble(make_model(), tmp_path / "out", options)
    assert len(list(deployment.repository.glob("*/1/model.py"))) == 4


def made_for_another_version(deployment, code):
    """The deployment as a version would have written it whose models import something else."""
    document = read_document(deployment.path, kind=DEPLOYMENT_KIND, regenerate="")
    (deployment.repository / "hstu/1/model.py").write_text(code)
    facts = {key: value for key, value in document.items() if key not in ("schema", "kind", "made_by", "files")}
    write_manifest(
        deployment.path, kind=DEPLOYMENT_KIND, made_by=document["made_by"], files=document["files"], facts=facts
    )
    return document["made_by"]


MOVED = {
    "from hstu_trt.serving.triton_models import StepModel": "imports hstu_trt.serving.triton_models, which",
    "from hstu_trt.attic.triton_models import StepModel": "imports hstu_trt.attic.triton_models, which",
    "from hstu_trt.serving.models.triton_models import HstuModel": "imports HstuModel from hstu_trt.serving.models.",
    "import numpy, hstu_trt.export.no_such_ops": "imports hstu_trt.export.no_such_ops, which",
    "def f():\n    from hstu_trt.serving import no_such": "imports no_such from hstu_trt.serving, which",
    "from hstu_trt import": "is no Python file",
}


@pytest.mark.parametrize(("code", "said"), MOVED.items(), ids=MOVED)
def test_what_moved_is_named_with_the_command_that_makes_it_again(make_model, tmp_path, code, said):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    made_by = made_for_another_version(deployment, code)
    with pytest.raises(ArtefactError) as caught:
        read_deployment(deployment.path)
    text = str(caught.value)
    assert said in text and "hstu/1/model.py" in text
    assert made_by.startswith("hstu-trt assemble --model") and text.endswith(f"again with: {made_by}")
    assert assemble(deployment.model, deployment.path, Options()), "and that command replaces it"


def test_serve_refuses_it_before_the_launch(make_model, tmp_path):
    deployment = assemble(make_model(), tmp_path / "out", Options())
    made_for_another_version(deployment, "from hstu_trt.serving.triton_models import StepModel as TritonPythonModel\n")
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment.path)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert answer.returncode == 2 and "was made by another version of hstu-trt" in answer.stderr
    assert "hstu-trt assemble --model" in answer.stderr and "Traceback" not in answer.stderr
    assert not deployment.run.exists() and (deployment.path / MANIFEST_NAME).exists()


GOOD = [
    "import os\nfrom json import loads\nfrom . import sibling",
    "import hstu_trt.contract.errors as errors",
    "from hstu_trt.contract import errors, manifest",
    "from hstu_trt.serving.models.stages import Stage, GuardedLookup",
    "from hstu_trt.serving.serve import READY_TIMEOUT_S, main, json",
]


@pytest.mark.parametrize("code", GOOD)
def test_what_is_there_is_found(tmp_path, code):
    (tmp_path / "hstu/1").mkdir(parents=True)
    (tmp_path / "hstu/1/model.py").write_text(code)
    check_model_code(tmp_path, "")
