"""What ``hstu-trt engines`` prints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hstu_trt.contract.text import bytes_text, text_table
from hstu_trt.engines.attention_memory import plugin_bytes, tokens
from hstu_trt.engines.build import BuildPlan
from hstu_trt.engines.builders import BuiltStage
from hstu_trt.engines.commands import EngineInputs, equivalent_commands
from hstu_trt.engines.stages import engine_stages
from hstu_trt.engines.targets import TARGETS, capability_text
from hstu_trt.engines.tensorrt_builder import SUFFIX, StagePlan, TensorRtBuilder


def report_targets(as_json: bool) -> None:
    """The table of GPUs."""
    if as_json:
        print(json.dumps([dataclasses.asdict(t) | {"precisions": t.precisions} for t in TARGETS.values()], indent=1))
        return
    rows = [
        [
            target.name,
            target.title,
            capability_text(target.compute_capability),
            f"{target.memory_gib} GiB" if target.memory_gib else "-",
            ", ".join(target.precisions),
            ", ".join(target.builders),
        ]
        for target in TARGETS.values()
    ]
    print(text_table(["gpu", "device", "compute capability", "memory", "precisions", "builders, default first"], rows))


def report_plan(plan: BuildPlan) -> None:
    """Stages, profiles and the commands that other tools would take."""
    if not isinstance(plan.builder, TensorRtBuilder):
        print(f"stages: {', '.join(plan.request.chosen_stages(engine_stages(plan.request.model)))}")
        return
    builder, request = plan.builder, plan.request
    plans, left_out = builder.plan(request)
    for one in plans:
        print(f"{one.stage}: {one.graph.op_nodes} op nodes, {one.graph.plugin_layers} of them as plugins")
        for profile in one.profiles:
            bounds = ", ".join(f"{dim} {'/'.join(map(str, values))}" for dim, values in profile.dims.items())
            print(f"  profile {profile.name}: {bounds}")
        for note in _notes(plan, one):
            print(f"  {note}")
        for line in equivalent_commands(builder.flavour, request.options, _inputs_of(plan, builder, one)):
            print(line)
        print()
    print("\n".join(left_out), end="\n" if left_out else "")


def _inputs_of(plan: BuildPlan, builder: TensorRtBuilder, one: StagePlan) -> EngineInputs:
    return EngineInputs(
        source=plan.request.model.onnx(one.stage),
        engine=plan.out / f"{one.stage}{SUFFIX[builder.name]}",
        profiles=one.profiles,
        capabilities=builder.capabilities(plan.request),
        has_plugins=one.graph.plugin_layers > 0,
    )


def _notes(plan: BuildPlan, one: StagePlan) -> list[str]:
    """What differs between our engine and the commands'."""
    notes = list(one.notes)
    if one.graph.plugin_layers and one.graph.lookups:
        notes.append("the commands read the tables into the plan; hstu-trt engines leaves them to the plugin")
    if plan.request.model.precision == "fp8" and one.graph.has_dense_attention:
        notes.append("the commands cannot parse fp8 functions that are called twice; hstu-trt engines inlines them")
    return notes


def report(plan: BuildPlan, state: str, stages: Sequence[BuiltStage] | None, as_json: bool, memory: bool) -> None:
    """The result, as text or JSON."""
    request = plan.request
    if as_json:
        document = {
            "state": state,
            "out": str(plan.out),
            "target": request.target.name,
            "builder": plan.builder.name,
            "precision": request.model.precision,
            "digest": plan.digest,
            **plan.builder.facts(request),
            "stages": None if stages is None else [dataclasses.asdict(stage) for stage in stages],
        }
        if memory:
            document["memory"] = memory_rows(plan, stages or [])
        print(json.dumps(document, indent=1))
        return
    if stages is not None:
        print(_stage_table(plan, stages))
        for note in (note for stage in stages for note in stage.details.get("notes", ())):
            print(note)
        if isinstance(plan.builder, TensorRtBuilder):
            print("".join(f"{sentence}\n" for sentence in plan.builder.plan(request)[1]), end="")
    versions = ", ".join(f"{name} {version}" for name, version in plan.builder.versions().items())
    if memory and stages is not None:
        report_memory(memory_rows(plan, stages))
    print(f"{plan.out}: {state} ({versions}, {request.target.name}, {request.model.precision})")


def _stage_table(plan: BuildPlan, stages: Sequence[BuiltStage]) -> str:
    if not isinstance(plan.builder, TensorRtBuilder):
        rows = [[one.stage, one.file, bytes_text(one.bytes), f"{one.seconds:.3f}"] for one in stages]
        return text_table(["stage", "file", "size", "load s"], rows)
    rows = []
    for one in stages:
        facts = one.details
        memory = [bytes_text(size) for size in facts["activation_bytes"]]
        names = [profile["name"] for profile in facts["profiles"]]
        rows.append(
            [
                one.stage,
                one.file,
                bytes_text(one.bytes),
                f"{one.seconds:.2f}" if one.seconds else "kept",
                facts["network_layers"],
                facts["kernels"] or "-",
                f"{facts['plugin_layers']} of {facts['op_nodes']}",
                ", ".join(f"{n} {m}" for n, m in zip(names, memory, strict=False)) or "-",
            ]
        )
    header = ["stage", "file", "size", "build s", "layers", "kernels", "plugins", "activations per profile"]
    return text_table(header, rows)


def memory_rows(plan: BuildPlan, stages: Sequence[BuiltStage]) -> list[dict[str, Any]]:
    """Per stage with attention and profile: bytes of the engine's activations, and what one plugin layer needs.

    ``plugin_bytes`` is None where the kernels are not built.
    """
    if not isinstance(plan.builder, TensorRtBuilder):
        return []
    plans = {one.stage: one for one in plan.builder.plan(plan.request)[0]}
    return [
        {
            "stage": one.stage,
            "profile": profile.name,
            "tokens": tokens(plan.request.model, profile),
            "activation_bytes": size,
            "plugin_bytes": plugin_bytes(plan.request.model, profile),
        }
        for one in stages
        if plans[one.stage].graph.op_nodes > plans[one.stage].graph.lookups
        for profile, size in zip(plans[one.stage].profiles, one.details["activation_bytes"], strict=False)
    ]


def report_memory(rows: Sequence[Mapping[str, Any]]) -> None:
    """What attention takes without and with the plugin, as a table."""
    lines = [
        [
            row["stage"],
            row["profile"],
            row["tokens"],
            bytes_text(row["activation_bytes"]),
            "make plugins" if row["plugin_bytes"] is None else bytes_text(row["plugin_bytes"]),
        ]
        for row in rows
    ]
    header = ["stage", "profile", "tokens", "engine's activations", "plugin, per layer: q, k, v, out, workspace"]
    print(text_table(header, lines))
