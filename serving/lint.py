"""Lint of a model repository: misconfigurations that Triton accepts, or answers with a message that helps nobody.

Each rule (``lint_rules.py``, ``lint_contract.py``) is a function from a repository to messages that say what to do.
Rules run before every launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hstu_trt.contract.errors import GateError
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.serving import (
    lint_contract,  # noqa: F401 - adds its rules
    pbtxt,
)
from hstu_trt.serving.lint_rules import RULES, Finding, Repository
from hstu_trt.serving.served import SERVED, models_of
from hstu_trt.serving.signature import signatures

__all__ = ["RULES", "lint", "require_clean"]


def lint(path: Path, model: ModelFolder, flavour: str = "cpu", served: Sequence[str] = SERVED) -> list[Finding]:
    """Every finding in the repository at ``path`` that serves ``model`` in a flavour."""
    signed = signatures(model.ranking_config, model.limits, model.precision, flavour)
    wanted = {name: signed[name] for name in models_of(served)}
    repository = Repository(path, pbtxt.read_repository(path), wanted)
    return [Finding(identity, message) for identity, rule in RULES.items() for message in rule(repository)]


def require_clean(path: Path, model: ModelFolder, flavour: str = "cpu", served: Sequence[str] = SERVED) -> None:
    """Raises GateError that lists every finding."""
    if findings := lint(path, model, flavour, served):
        raise GateError("the model repository has faults:\n" + "\n".join(f"  {finding}" for finding in findings))
