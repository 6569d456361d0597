"""Which parts of a ranking model compute in fp8: their names, and the plan that bench makes and export follows.

A part is one of the model's dense products, or the attention of one layer:

    preprocessor.content       the MLP over the content rows; .additional and .action likewise
    stu.<layer>.uvqk           the projection to u, v, q and k
    stu.<layer>.attention      HstuAttention on e4m3 q, k and v
    stu.<layer>.output         the projection of [u, attention, gated]
    postprocessor              the product with the time features
    item_tower                 the MLP over the candidates' rows
    head                       the prediction head but for its last product, whose few columns fp8 cannot speed up

The contextual product, one row per user and slot, is always fp16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ArtefactError, ConfigError
from hstu_trt.contract.manifest import read_json, write_text_atomically
from hstu_trt.contract.model import HstuConfig

LAYERS, ALL = "layers", "all"
"""Plans that need no file: the attention layers, or everything."""
PLAN_KIND = "fp8-plan"
PLAN_SCHEMA = 1


def fp8_sites(config: HstuConfig) -> tuple[str, ...]:
    """Every part of a model that can compute in fp8, in the order of a request."""
    preprocessor = ["content"]
    preprocessor += ["additional"] if config.additional_features else []
    preprocessor += ["action"] if config.action_weights is not None else []
    layers = (f"stu.{n}.{part}" for n in range(config.layers) for part in ("uvqk", "attention", "output"))
    post = ["postprocessor"] if config.postprocessor == "timestamp" else []
    return (*(f"preprocessor.{name}" for name in preprocessor), *layers, *post, "item_tower", "head")


def layer_sites(config: HstuConfig) -> tuple[str, ...]:
    """The parts of the attention layers: nearly all the work on long histories, and little of the error.

    The MLPs around them feed the residual stream and the logits directly.
    """
    return tuple(site for site in fp8_sites(config) if site.startswith("stu."))


def planned_sites(plan: str, config: HstuConfig) -> tuple[str, ...]:
    """The parts of ``layers``, ``all``, or a plan's file. Raises ArtefactError or ConfigError."""
    named = {LAYERS: layer_sites, ALL: fp8_sites}
    return named[plan](config) if plan in named else read_plan(Path(plan), config).fp8


def check_sites(sites: Sequence[str], config: HstuConfig, source: str) -> tuple[str, ...]:
    """The given parts in the model's order. Raises ConfigError for a name that the model does not have."""
    known = fp8_sites(config)
    unknown = [site for site in sites if site not in known]
    if unknown:
        raise ConfigError(f"{source}: the model has no part {unknown[0]!r}; its parts are {', '.join(known)}")
    return tuple(site for site in known if site in sites)


@dataclass(frozen=True, kw_only=True)
class Fp8Plan:
    """What computes in fp8, and what was measured for it."""

    model: str
    """Name of the model that it was made for."""
    fp8: tuple[str, ...]
    figures: tuple[dict[str, Any], ...] = ()
    """One row per part and per step of the choice, for people; nothing reads them back."""

    def save(self, path: Path, made_by: str) -> None:
        """Writes the plan as JSON."""
        document = {
            "schema": PLAN_SCHEMA,
            "kind": PLAN_KIND,
            "made_by": made_by,
            "model": self.model,
            "fp8": list(self.fp8),
            "figures": list(self.figures),
        }
        write_text_atomically(path, json.dumps(document, indent=1) + "\n")


def read_plan(path: Path, config: HstuConfig) -> Fp8Plan:
    """Reads a plan and checks that the model has its parts. Raises ArtefactError or ConfigError."""
    remedy = f"make it again with: hstu-trt bench plan-precision --model MODEL --out {path.parent}"
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise ArtefactError(f"no precision plan at {path}; {remedy}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ArtefactError(f"{path} is not readable JSON ({error}); {remedy}") from None
    if not isinstance(document, dict) or (document.get("schema"), document.get("kind")) != (PLAN_SCHEMA, PLAN_KIND):
        raise ArtefactError(f"{path} is no precision plan of schema {PLAN_SCHEMA}; {remedy}")
    sites = document.get("fp8")
    if not isinstance(sites, list) or not all(isinstance(site, str) for site in sites):
        raise ArtefactError(f"{path}: 'fp8' is no list of names; {remedy}")
    return Fp8Plan(model=str(document.get("model", "")), fp8=check_sites(sites, config, str(path)))
