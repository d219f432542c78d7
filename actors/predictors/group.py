"""PredictorGroup: one PredictorActor that learns and `predictor.num_replicas` that answer, as one predictor.

    trees ─► the learning one ─► what it learnt ─► replicas ─► values for PromptActors
                                              └──► PromptActors, which have states of the engine (trunk=policy)
    weights (version, checksum) ─► all of them, before anything goes on

Without replicas the learning one answers too. When a process dies, Ray starts it anew and the calls that were under way
are made again: whoever asked waits a little longer. The learning one goes on from the newest checkpoint of the run, a
replica from what was learnt last, and both from the newest weights; until these have come they answer nothing. Values
only steer where budget goes, so the few updates that the new one has not seen cost precision, not correctness.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from actors.calls import CallError, CallTimeoutError, ask
from actors.predictors.predictor import remote_predictor
from trace_async.config import Config
from trace_async.method.posterior import Estimates
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery

log = logging.getLogger(__name__)
WATCH_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Answering:
    """The actors that answer, as prompts see them; can be sent to other actors, and outlives restarts of its own."""

    actors: tuple[ActorHandle, ...]
    limit_s: float
    """For a call, a restart of the process included."""

    async def values(self, queries: Sequence[PrefixQuery]) -> Sequence[np.ndarray]:
        """Return V at each position of each query (see `ValuePredictor.predict`); one actor answers the whole call.

        Raises ActorLostError or CallTimeoutError when no answer can be had.
        """
        if not queries:
            return []
        number = hash(queries[0].token_ids) % len(self.actors)
        reply = self.actors[number].values.remote(list(queries))
        return await ask(reply, who=f"predictor {number}", limit_s=self.limit_s)


@dataclass(slots=True)
class PredictorGroup:
    """All predictors as one, in the trainer's process.

    Methods raise ActorLostError or CallTimeoutError when no answer can be had.
    """

    actor: ActorHandle
    """The one that learns."""
    replicas: tuple[ActorHandle, ...]
    start_limit_s: float
    """Until the model is loaded, the first time."""
    limit_s: float
    """For every other call, a restart of the process included."""
    weights: Sequence[ObjectRef] = ()
    """The newest, as they were sent: buckets and, last, their manifest."""
    learnt: ObjectRef | None = None
    """What the learning one has learnt last, for replicas and for `share`."""
    share: Callable[[ObjectRef], Awaitable[None]] | None = None
    """Called with what was learnt, for whoever answers questions without asking: with trunk=policy, PromptActors."""
    num_caught_up: int = field(default=0)
    """How many times an actor that was started anew was brought up to date."""

    @classmethod
    def start(cls, config: Config, policy_path: Path, checkpoints: Path) -> "PredictorGroup":
        """Begin to start the actors; `ready` waits for them. `checkpoints`: of the run, where a restarted one looks."""
        actor = remote_predictor(config, str(policy_path), str(checkpoints))
        replicas = tuple(
            remote_predictor(config, str(policy_path), str(checkpoints), learns=False)
            for _ in range(config.predictor.num_replicas)
        )
        start_s = config.engine.start_timeout_s
        return cls(actor, replicas, start_s, start_s + config.learner.step_timeout_s)

    @property
    def answering(self) -> Answering:
        """Return the actors that answer, for those who ask for values."""
        return Answering(self.replicas or (self.actor,), self.limit_s)

    async def ready(self) -> None:
        """Wait until all have loaded their models. Raises CallTimeoutError."""
        try:
            async with asyncio.timeout(self.start_limit_s):
                await asyncio.gather(*(self._ask(one, one.ready.remote()) for one in self._all))
        except TimeoutError:
            raise CallTimeoutError(
                f"the predictor did not start within engine.start_timeout_s={self.start_limit_s:g}: `ray status` shows "
                "whether there is room for it"
            ) from None

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Return Beta posteriors of candidate prompts; see `ValuePredictor.estimate`. Replicas share the questions."""
        if not self.replicas:
            return await self._ask(self.actor, self.actor.estimate.remote(list(task_ids), list(queries)))
        shares = [list(queries[number :: len(self.replicas)]) for number in range(len(self.replicas))]
        asked = (self._ask(one, one.values.remote(share)) for one, share in zip(self.replicas, shares, strict=True))
        values = np.empty(len(queries))
        for number, found in enumerate(await asyncio.gather(*asked)):
            values[number :: len(self.replicas)] = [value[-1] for value in found]
        return await self._ask(self.actor, self.actor.posteriors.remote(list(task_ids), values))

    async def train(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Learn from the trees of one update, and hand on what was learnt. Returns `predictor/…` metrics."""
        metrics: dict[str, float] = await self._ask(self.actor, self.actor.train.remote(list(trees), policy_version))
        await self._hand_on()
        return metrics | {"predictor/restarts": float(self.num_caught_up)}

    async def _hand_on(self) -> None:
        if self.replicas or self.share:
            learnt = self.learnt = self.actor.learnt.remote()
            await asyncio.gather(*(self._ask(one, one.take_learnt.remote(learnt)) for one in self.replicas))
            if self.share:
                await self.share(learnt)

    async def receive_weights(self, weights: Sequence[ObjectRef]) -> int:
        """Let all read with these weights, and return their version; see `PredictorActor.receive_weights`."""
        self.weights = weights
        found = await asyncio.gather(*(self._ask(one, one.receive_weights.remote(*weights)) for one in self._all))
        (version,) = set(found)
        return int(version)

    async def watch(self) -> None:
        """Bring every actor that was started anew up to date, without end, beside the trainer."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            for one in self._all:
                try:
                    if not await self._ask(one, one.is_current.remote()):
                        await self._catch_up(one)
                except CallError as error:
                    log.warning("%s", error)  # whoever needs an answer from it has a limit and an error of its own

    async def _catch_up(self, one: ActorHandle) -> None:
        learnt = None if one is self.actor else self.learnt
        await self._ask(one, one.catch_up.remote(learnt, *self.weights))
        self.num_caught_up += 1
        log.warning("%s was started anew and is up to date", self._name(one))

    async def checksum(self) -> str:
        """Return the checksum of what the learning one has learnt."""
        found: str = await self._ask(self.actor, self.actor.checksum.remote())
        return found

    async def taught(self) -> Mapping[str, np.ndarray] | None:
        """Return what the last trees taught the learning one; see `PredictorActor.taught`."""
        found: Mapping[str, np.ndarray] | None = await self._ask(self.actor, self.actor.taught.remote())
        return found

    async def save(self, folder: Path) -> None:
        """Write what the learning one has learnt into `folder`."""
        await self._ask(self.actor, self.actor.save.remote(str(folder)))

    async def load(self, folder: Path) -> None:
        """Go on from a checkpoint; weights follow, where the policy has any but its first."""
        await self._ask(self.actor, self.actor.load.remote(str(folder)))
        await self._hand_on()

    def close(self) -> None:
        for one in self._all:
            ray.kill(one)

    @property
    def _all(self) -> tuple[ActorHandle, ...]:
        return self.actor, *self.replicas

    def _name(self, one: ActorHandle) -> str:
        return "the predictor" if one is self.actor else f"predictor replica {self.replicas.index(one)}"

    async def _ask(self, one: ActorHandle, reply: Awaitable[Any]) -> Any:
        return await ask(reply, who=self._name(one), limit_s=self.limit_s)
