"""``hstu-trt score``: scores the requests of a file with one runner, for parity checks and for people."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.bench.chain import (
    NORM,
    RUNNERS,
    Chain,
    norm_tensor,
    open_runner,
    reference_token_order,
)
from hstu_trt.bench.files import read_tensors, write_tensors
from hstu_trt.contract.attention_norm import parse_attention_norm
from hstu_trt.contract.errors import InputError
from hstu_trt.contract.features import Tensors, jagged_features, offsets_of, pack_request, request_features
from hstu_trt.contract.model import HstuConfig
from hstu_trt.contract.model_folder import TAPS, ModelFolder, read_model_folder
from hstu_trt.contract.tensors import PADDING_ID, Limits
from hstu_trt.tables.ids import POLICIES, Policy
from hstu_trt.tables.lookup_stage import HostLookup


def main(argv: Sequence[str]) -> int:
    """Parses, scores, writes."""
    args = _parser().parse_args(argv)
    model = read_model_folder(args.model)
    norm = parse_attention_norm(args.attention_norm, model.ranking_config)
    packed = pack_file(model.ranking_config, args.inputs)
    scored = score(
        model,
        packed,
        runner=args.runner,
        device=args.device,
        engines=args.engines,
        norm=norm,
        policy=args.id_policy,
        taps=args.taps,
        stage_by_stage=args.stage_by_stage,
    )
    write_tensors(args.out, scored)
    _report(args, model, packed, scored)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hstu-trt score", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="exported model folder")
    parser.add_argument("--inputs", type=Path, required=True, help="safetensors: uih.<feature>.values|lengths, cand...")
    parser.add_argument("--runner", choices=RUNNERS, default="onnxruntime")
    parser.add_argument("--device", help="where torch (cpu) and cuda (cuda) run: cpu or cuda")
    parser.add_argument("--engines", type=Path, help="what hstu-trt engines made, for tensorrt and tensorrt_rtx")
    parser.add_argument("--attention-norm", help="fixed:<N> (default: the config's max_seq_len) or batch_max")
    parser.add_argument("--id-policy", choices=POLICIES, default="reject", help="ids outside a table")
    parser.add_argument(
        "--taps", action="store_true", help="also write stu.<layer>.out, in the reference's token order"
    )
    parser.add_argument("--stage-by-stage", action="store_true", help="also write the table rows handed to hstu")
    parser.add_argument("--out", type=Path, required=True, help="safetensors: preds, user_embeddings, ...")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser


def pack_file(config: HstuConfig, path: Path) -> Tensors:
    """Reads a file of jagged features into the inputs of the ``ranking`` stage. Raises InputError."""
    tensors = read_tensors(path)
    try:
        used = request_features(config)
        packed = pack_request(config, jagged_features(tensors, "uih", used), jagged_features(tensors, "cand", used))
        if not packed["candidate_ids"].size:
            raise InputError("no user has a candidate: there is nothing to score")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return packed


def score(  # noqa: PLR0913 - the options of the verb
    model: ModelFolder,
    packed: Mapping[str, NDArray],
    *,
    runner: str,
    device: str | None = None,
    engines: Path | None = None,
    norm: float | None = None,
    policy: Policy = "reject",
    taps: bool = False,
    stage_by_stage: bool = False,
) -> Tensors:
    """Scores a packed request as one batch.

    runner, device: what executes hstu and mlp_head, and where.
    engines: the folder of engines for TensorRT's runners; None is the one of `make engines` for the GPU here.
    norm: N of the attention; None is the longest sequence of the batch.
    Returns float32 ``preds`` [tasks, candidates] and ``user_embeddings`` [candidates, D]; with ``taps``
    ``stu.<layer>.out`` [tokens, D] in the reference's token order; with ``stage_by_stage`` the table rows too.
    """
    config = model.ranking_config
    feed, answered = with_stand_ins(config, packed)
    feed[NORM] = norm_tensor(norm, config, packed)
    open_model = dataclasses.replace(model, limits=_limits_of(feed))
    stages = [
        HostLookup(open_model, policy),
        open_runner(runner, open_model, TAPS if taps else "hstu", device, engines),
        open_runner(runner, open_model, "mlp_head", device, engines),
    ]
    with Chain(open_model, stages) as chain:
        answers = chain.infer(feed)
    candidates = {"preds": answers["preds"][answered].T, "user_embeddings": answers["user_embeddings"][answered]}
    extras = {}
    if taps:
        order = _answered_tokens(config, feed, answered)
        extras = {name: tensor[order] for name, tensor in answers.items() if name.startswith("stu.")}
    if stage_by_stage:
        extras |= {name: answers[name] for name in ("uih_embeddings", "contextual_embeddings") if name in answers}
        extras["candidate_embeddings"] = answers["candidate_embeddings"][answered]
    return {name: tensor.astype(np.float32) for name, tensor in (candidates | extras).items()}


def with_stand_ins(config: HstuConfig, packed: Mapping[str, NDArray]) -> tuple[Tensors, NDArray]:
    """Gives each user without candidates a stand-in, since stages want a candidate of every user.

    No other token attends to it. It must not move the end of time either, nor count towards ``min_sequence``: it asks
    at the user's last event, and contextual features that are too short without it are taken away.
    Returns the feed, and bool [candidates of the feed]: whether the candidate was asked for.
    """
    lengths = np.diff(packed["candidate_offsets"])
    idle = np.flatnonzero(lengths == 0)
    padded = np.maximum(lengths, 1)
    answered = np.repeat(lengths > 0, padded)
    feed = {**packed, "candidate_offsets": offsets_of(padded)}
    for name in ("candidate_ids", "candidate_timestamps"):
        feed[name] = np.repeat(packed[name][:1], len(answered), axis=0)
        feed[name][answered] = packed[name]
    starts, ends = packed["uih_offsets"][:-1][idle], packed["uih_offsets"][1:][idle]
    times = np.append(packed["uih_timestamps"], 0)
    feed["candidate_timestamps"][~answered] = times[np.where(ends > starts, ends - 1, -1)]
    if config.contextual_slots:
        least = np.array([f.min_sequence for f in config.contextual_features for _ in range(f.slots)])
        feed["contextual_ids"] = packed["contextual_ids"].copy()
        feed["contextual_ids"][idle] = np.where(
            (ends - starts)[:, None] < least, PADDING_ID, packed["contextual_ids"][idle]
        )
    return feed, answered


def _answered_tokens(config: HstuConfig, feed: Mapping[str, NDArray], answered: NDArray) -> NDArray:
    """The reference's token order without stand-ins."""
    order = reference_token_order(config, feed)
    prefix_tokens = len(order) - len(answered)
    asked = np.concatenate([np.ones(prefix_tokens, dtype=bool), answered])
    return order[asked[order]]


def _limits_of(feed: Mapping[str, NDArray]) -> Limits:
    """Limits that admit the request: those of the deployment are not this verb's business."""
    history, candidates = (np.diff(feed[name]) for name in ("uih_offsets", "candidate_offsets"))
    return Limits(
        users=len(history),
        history=max(1, int(history.max())),
        candidates=int(candidates.max()),
        batch_history=max(1, int(history.sum())),
        batch_candidates=int(candidates.sum()),
    )


def _report(args: argparse.Namespace, model: ModelFolder, packed: Tensors, scored: Tensors) -> None:
    users, candidates = len(packed["uih_offsets"]) - 1, len(packed["candidate_ids"])
    facts = {
        "model": model.name,
        "precision": model.precision,
        "runner": args.runner,
        "attention_norm": args.attention_norm or f"fixed:{model.ranking_config.max_seq_len}",
        "users": users,
        "candidates": candidates,
        "out": str(args.out),
        "tensors": {name: list(tensor.shape) for name, tensor in scored.items()},
    }
    if args.json:
        print(json.dumps(facts))
        return
    print(f"scored {candidates} candidates of {users} users with {args.runner} ({model.name}, {model.precision})")
    print(f"wrote {args.out} ({', '.join(f'{name} {shape}' for name, shape in facts['tensors'].items())})")
