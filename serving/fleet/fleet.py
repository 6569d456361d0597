"""A fleet: replicas of one deployment behind a gateway, kept by canaries, changed without failing a request.

What is served is a generation: the replicas of one deployment. A release starts the next generation beside it, tries
it, and hands the gateway the new set in one reload, so that a request is answered by one generation whole. The old one
stays, drained, for the way back. The orders are always: into the gateway after the canaries, out of it before the stop.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hstu_trt.contract.errors import ConfigError, HstuTrtError
from hstu_trt.contract.manifest import write_text_atomically
from hstu_trt.serving.deployment import Deployment, read_deployment
from hstu_trt.serving.fleet.gateway import Gateway, GatewayError
from hstu_trt.serving.fleet.gateway_config import Upstream
from hstu_trt.serving.fleet.replica import Replica, ReplicaPlan, State, upstream_states, version_of
from hstu_trt.serving.server import LOOPBACK, choose_port
from hstu_trt.serving.supervision.drain import wait_until_quiet

RECORD = "fleet.json"
LOOK_EVERY_S = 0.5
_DRAIN_S = 90.0
Tell = Callable[[str], None]


class FleetError(HstuTrtError):
    """A command that the fleet cannot carry out as it is now."""

    exit_code = 1


@dataclass
class Generation:
    """The replicas of one deployment."""

    number: int
    deployment: Deployment
    version: str
    """Digest of the deployment's manifest."""
    replicas: list[Replica] = field(default_factory=list)

    def status(self) -> dict[str, Any]:
        return {
            "generation": self.number,
            "deployment": str(self.deployment.path),
            "version": self.version[:12],
            "served": list(self.deployment.served),
            "replicas": [replica.status() for replica in self.replicas],
        }


@dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """How replicas are started."""

    count: int
    gpus: tuple[str, ...] = ()
    first_port: int
    options: tuple[str, ...] = ()
    """Further options of ``hstu-trt serve``."""


class Fleet:
    """All methods belong to one event loop; commands that change something run one at a time."""

    def __init__(self, run: Path, gateway: Gateway, settings: ReplicaSettings, tell: Tell) -> None:
        self.gateway, self.settings = gateway, settings
        self.current: Generation | None = None
        self.previous: Generation | None = None
        self._run, self._tell = run, tell
        self._numbers = itertools.count(1)
        self._changing, self._pointing = asyncio.Lock(), asyncio.Lock()

    async def start(self, deployment: Path) -> None:
        """Starts the first generation, then the gateway. Raises ReplicaError or GatewayError."""
        self.current = await self.new_generation(deployment, self.settings.count)
        await self.gateway.start(self._upstreams())
        self._write_record()

    async def watch(self) -> None:
        """Looks at every replica, again and again, and points the gateway at those that are well."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            replicas = [replica for each in (self.current, self.previous) if each for replica in each.replicas]
            await asyncio.gather(*(replica.look() for replica in replicas if replica.state is not State.STOPPED))
            try:
                if (trouble := self.gateway.look()) is not None:
                    self._tell(f"the gateway {trouble} and is started again")
                    await self.gateway.restart()
                await self.point()
            except (GatewayError, OSError) as error:
                self._tell(str(error))

    async def stop(self) -> None:
        """Finishes what runs, then stops everything."""
        await self.gateway.stop()
        for generation in (self.current, self.previous):
            if generation is not None:
                await self.stop_generation(generation)

    def status(self) -> dict[str, Any]:
        """What ``hstu-trt fleet status`` shows."""
        settings = self.gateway.settings
        return {
            "url": f"{LOOPBACK if settings.address in ('0.0.0.0', '') else settings.address}:{settings.port}",
            "gateway_pid": self.gateway.pid,
            "gets_requests": [upstream.address for upstream in self.gateway.upstreams if not upstream.down],
            "current": self.current.status() if self.current else None,
            "previous": self.previous.status() if self.previous else None,
        }

    async def add(self, tell: Tell) -> str:
        """One replica more; returns its name. Raises ReplicaError."""
        async with self.one_change():
            return (await self._add(tell)).plan.name

    async def drain(self, name: str, tell: Tell) -> None:
        """One replica less, without failing a request. Raises FleetError."""
        async with self.one_change():
            await self._drain(self._named(name), tell)

    async def replace(self, name: str, tell: Tell) -> str:
        """A new replica for one that is drained after it; returns its name. Raises FleetError or ReplicaError."""
        async with self.one_change():
            old = self._named(name)
            new = await self._add(tell, gpu=old.plan.gpu)
            await self._drain(old, tell)
            return new.plan.name

    def one_change(self) -> asyncio.Lock:
        if self._changing.locked():
            raise FleetError("the fleet is being changed by another command; try again when it is done")
        return self._changing

    async def new_generation(self, deployment: Path, count: int) -> Generation:
        """Starts the replicas of a deployment, outside the gateway; all or none. Raises ArtefactError, ReplicaError."""
        number = 1 + max((each.number for each in (self.current, self.previous) if each), default=0)
        version = version_of(deployment)
        # Hashes every file but the shards: in a thread, or nobody would look after the replicas meanwhile.
        generation = Generation(number, await asyncio.to_thread(read_deployment, deployment), version)
        for _ in range(count):
            generation.replicas.append(self._plan(generation, self._emptiest_gpu(generation), generation.replicas))
        starts = [asyncio.create_task(replica.start()) for replica in generation.replicas]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for task in starts:
                task.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            await self.stop_generation(generation)
            raise
        return generation

    async def stop_generation(self, generation: Generation) -> None:
        """Stops replicas that get no requests."""
        await asyncio.gather(*(replica.stop() for replica in generation.replicas))
        generation.replicas.clear()

    async def switch(self, to: Generation, tell: Tell) -> None:
        """Hands the gateway another generation in one reload; the one before becomes ``previous``.

        Raises GatewayError, and nothing has changed.
        """
        before, older = self.current, self.previous
        self.current, self.previous = to, before
        try:
            await self.point()
        except BaseException:
            self.current, self.previous = before, older
            raise
        self._write_record()
        tell(f"generation {to.number} gets all new requests ({to.deployment.path})")
        done = await self.gateway.settled(_DRAIN_S)
        tell("the one before has answered its last request" if done else "some requests are still with the one before")
        if older is not None and older is not to:
            await self.stop_generation(older)

    async def point(self) -> None:
        """Points the gateway at the current generation's replicas, as they are now."""
        async with self._pointing:
            upstreams = self._upstreams()
            if upstreams:
                await self.gateway.apply(upstreams)

    def _upstreams(self) -> list[Upstream]:
        replicas = self.current.replicas if self.current else []
        return [
            Upstream(address=replica.plan.address, down=not is_open)
            for replica, is_open in upstream_states(replicas)
        ]  # fmt: skip

    async def _add(self, tell: Tell, gpu: str | None = None) -> Replica:
        generation = self.serving()
        replica = self._plan(generation, gpu or self._emptiest_gpu(generation), generation.replicas)
        tell(f"starting {replica.plan.name} on {replica.plan.address}")
        try:
            await replica.start()
        except BaseException:
            await replica.stop()
            raise
        generation.replicas.append(replica)
        await self.point()
        tell(f"{replica.plan.name} gets requests")
        return replica

    async def _drain(self, replica: Replica, tell: Tell) -> None:
        generation = self.serving()
        others = [each for each in generation.replicas if each is not replica and each.state is State.SERVING]
        if not others:
            raise FleetError(f"{replica.plan.name} is the last that answers; add another one first: hstu-trt fleet add")
        replica.state = State.DRAINING
        await self.point()
        tell(f"{replica.plan.name} gets no new requests")
        await self.gateway.settled(_DRAIN_S)
        await asyncio.to_thread(wait_until_quiet, replica.plan.address)
        await replica.stop()
        generation.replicas.remove(replica)
        tell(f"{replica.plan.name} is stopped")

    def serving(self) -> Generation:
        if self.current is None:
            raise FleetError("the fleet is starting")
        return self.current

    def _named(self, name: str) -> Replica:
        replicas = {replica.plan.name: replica for replica in self.serving().replicas}
        if name not in replicas:
            raise ConfigError(f"no replica {name!r}; there are {', '.join(replicas)}")
        return replicas[name]

    def _plan(self, generation: Generation, gpu: str | None, beside: Sequence[Replica]) -> Replica:
        name = f"r{next(self._numbers)}"
        taken = {r.plan.port for each in (self.current, self.previous) if each for r in each.replicas}
        plan = ReplicaPlan(
            name=name, deployment=generation.deployment, version=generation.version, gpu=gpu,
            port=self._free_port(taken | {replica.plan.port for replica in beside}), options=self.settings.options,
            log=self._run / "replicas" / f"{name}.log",
        )  # fmt: skip
        return Replica(plan, self._tell)

    def _free_port(self, taken: set[int]) -> int:
        """The first that is free. Not any one that the kernel would give: a connection of ours could take it later."""
        for port in range(self.settings.first_port, self.settings.first_port + 200):
            if port not in taken:
                try:
                    return choose_port(LOOPBACK, port)
                except ConfigError:
                    continue
        raise FleetError(f"no free port for a replica from {self.settings.first_port} on")

    def _emptiest_gpu(self, generation: Generation) -> str | None:
        """The first of those with the fewest replicas: one that was drained leaves its GPU to the next."""
        used = Counter(replica.plan.gpu for replica in generation.replicas)
        return min(self.settings.gpus, key=used.__getitem__, default=None)

    def _write_record(self) -> None:
        names = ("current", "previous")
        record = {
            name: each and str(each.deployment.path)
            for name, each in zip(names, (self.current, self.previous), strict=True)
        }
        write_text_atomically(self._run / RECORD, json.dumps(record) + "\n")
