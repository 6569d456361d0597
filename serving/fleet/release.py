"""Releases of a fleet: a new deployment, engines and tables together, tried beside the old one, then switched to."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hstu_trt.contract.errors import GateError, InputError
from hstu_trt.contract.features import Tensors, jagged_features, pack_request, request_features
from hstu_trt.contract.model_folder import ModelFolder
from hstu_trt.contract.numerics import TOLERANCES
from hstu_trt.contract.split_users import one_user_feeds
from hstu_trt.contract.tensors import ENSEMBLE, FUSED
from hstu_trt.serving.client import RankingClient
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.fleet.fleet import Fleet, FleetError, Generation, Tell
from hstu_trt.serving.fleet.replica import State
from hstu_trt.serving.requests import one_user
from hstu_trt.serving.server_process import tied_to_us


@dataclass(frozen=True, kw_only=True)
class Golden:
    """Requests with the scores that a new deployment must give, as ``hstu-trt score`` reads and writes them."""

    requests: Path
    expected: Path


async def release(fleet: Fleet, deployment: Path, golden: Golden | None, tell: Tell, drop: Sequence[str] = ()) -> None:
    """Checks a deployment's files, starts and tries its replicas, and only then switches to it.

    drop: served models that the new deployment may lack, since nobody asks for them any more.
    Raises ArtefactError, FleetError, ReplicaError or GateError with the cause; the fleet is then as it was.
    """
    deployment = deployment.resolve()
    async with fleet.one_change():
        _require_new_folder(fleet, deployment)
        await _check_files(deployment, fleet.settings.options)
        tell("files, tables and configs are sound")
        _require_served(fleet, read_deployment(deployment, verify=False), drop)
        before = fleet.serving()
        new = await fleet.new_generation(deployment, len(before.replicas))
        try:
            tell(f"{len(new.replicas)} new replicas answer to requests for {' and '.join(new.deployment.served)}")
            if golden is not None:
                count = await asyncio.to_thread(try_golden, golden, new)
                tell(f"{count} golden requests give the expected scores")
            await fleet.switch(new, tell)
        except BaseException:
            if fleet.current is not new:
                await fleet.stop_generation(new)
            raise


async def rollback(fleet: Fleet, tell: Tell) -> None:
    """Back to the deployment before, whose replicas are still there unless they were retired.

    Raises FleetError where there is none, or ReplicaError; the fleet is then as it was.
    """
    async with fleet.one_change():
        previous = fleet.previous
        if previous is None:
            raise FleetError("there is nothing to go back to: no release was made since the fleet was started")
        if not any(replica.state is State.SERVING for replica in previous.replicas):
            await fleet.stop_generation(previous)
            previous = await fleet.new_generation(previous.deployment.path, len(fleet.serving().replicas))
            tell(f"{len(previous.replicas)} replicas of the deployment before answer again")
        if lost := _no_longer_served(fleet, previous.deployment):
            tell(f"the deployment before does not serve {' and '.join(lost)}: requests for it fail from now on")
        await fleet.switch(previous, tell)


async def retire(fleet: Fleet, tell: Tell) -> None:
    """Stops the replicas that are kept for a rollback, and frees their memory."""
    async with fleet.one_change():
        if fleet.previous is None or not fleet.previous.replicas:
            raise FleetError("no replicas are kept from before")
        await fleet.stop_generation(fleet.previous)
        tell("a rollback will have to start replicas first")


def _require_new_folder(fleet: Fleet, deployment: Path) -> None:
    """Replicas that are restarted read their folder again: another version in it would mix with the one in use."""
    for generation in (fleet.current, fleet.previous):
        if generation is not None and generation.deployment.path == deployment and generation.replicas:
            raise FleetError(
                f"{deployment} is in use by generation {generation.number}; assemble the new one into another folder"
            )


def _no_longer_served(fleet: Fleet, new: Deployment) -> list[str]:
    return [name for name in fleet.serving().deployment.served if name not in new.served]


def _require_served(fleet: Fleet, new: Deployment, drop: Sequence[str]) -> None:
    """A release fails no request, so it takes no model from those who ask for it unless told that nobody does."""
    lost = [name for name in _no_longer_served(fleet, new) if name not in drop]
    if lost:
        raise FleetError(
            f"{new.path} serves {' and '.join(new.served)} alone, and this fleet {' and '.join(lost)} too: every "
            f"request for it would fail; assemble it with --served {','.join(fleet.serving().deployment.served)}, or "
            f"release it with --drop {','.join(lost)} once nobody asks for {'them' if len(lost) > 1 else 'it'}"
        )


async def _check_files(deployment: Path, options: tuple[str, ...]) -> None:
    """``hstu-trt serve --check``, in a process of its own: what a damaged file can do, it does there."""
    command = [sys.executable, "-m", "hstu_trt.serving.serve", "--deployment", str(deployment), "--check", *options]
    check = await asyncio.create_subprocess_exec(
        *tied_to_us(command),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        said, _ = await check.communicate()
    finally:
        if check.returncode is None:  # the fleet is being stopped, and nobody waits for the verdict
            check.kill()
    if check.returncode:
        text = said.decode(errors="replace").strip().removeprefix("hstu-trt serve: error: ")
        raise FleetError(f"the new deployment is not sound: {text or f'its check ended with code {check.returncode}'}")


def try_golden(golden: Golden, generation: Generation) -> int:
    """Sends the golden requests to every served model of every replica; returns how many there are.

    Raises InputError for files that cannot be used, GateError for other scores than expected.
    """
    model = generation.deployment.model
    users = _read_requests(golden.requests, model)
    expected = _read_scores(golden.expected, users)
    allowed = TOLERANCES[ENSEMBLE, model.tolerances].atol
    for replica in generation.replicas:
        for name in generation.deployment.served:
            with RankingClient(replica.plan.address, name) as client:
                for number, (user, scores) in enumerate(zip(users, expected, strict=True)):
                    got = client.infer(one_user(user) if name == FUSED else user).reshape(scores.shape)
                    difference = float(np.abs(got - scores).max())
                    if not difference <= allowed:
                        raise GateError(
                            f"{name} of {replica.plan.name} scores golden request {number} {difference:.2g} away from "
                            f"what {golden.expected} expects; {allowed:g} is allowed"
                        )
    return len(users)


def _read_requests(path: Path, model: ModelFolder) -> list[Tensors]:
    tensors, config = _read_tensors(path), model.ranking_config
    used = request_features(config)
    try:
        packed = pack_request(config, jagged_features(tensors, "uih", used), jagged_features(tensors, "cand", used))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    users = [user for user in one_user_feeds(packed) if len(user["candidate_ids"])]
    if not users:
        raise InputError(f"{path}: no user has a candidate, so there is nothing to compare")
    return users


def _read_scores(path: Path, users: list[Tensors]) -> list[NDArray]:
    """``preds`` ``[tasks, candidates of all users]`` as ``[candidates, tasks]`` per user. Raises InputError."""
    preds = _read_tensors(path).get("preds")
    counts = [len(user["candidate_ids"]) for user in users]
    if preds is None or preds.ndim != 2 or preds.shape[1] != sum(counts):
        shape = "no tensor" if preds is None else f"a tensor of shape {list(preds.shape)}"
        raise InputError(f"{path} has {shape} 'preds'; [tasks, {sum(counts)}] is expected, as hstu-trt score writes it")
    return np.split(preds.T, np.cumsum(counts)[:-1])


def _read_tensors(path: Path) -> Tensors:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read tensors from {path}: {error}") from None
