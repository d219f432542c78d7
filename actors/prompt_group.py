"""PromptGroup: the PromptActors as one; a prompt whose actor died is grown again on another."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.prompt import remote_prompt_actor
from trace_async.config import Config
from trace_async.run.state import PendingPrompt
from trace_async.tracking.metrics import EvalRollout
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task

log = logging.getLogger(__name__)
T = TypeVar("T")


class PromptLostError(Exception):
    """A prompt brought no tree, through no fault of the policy; `kind` is how the ledger counts it."""

    def __init__(self, kind: LossKind) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(slots=True)
class PromptGroup:
    """Lives in the trainer's process. `generators`: those last announced by the pool."""

    config: Config
    policy_path: Path
    predictor: ActorHandle | None
    actors: list[ActorHandle] = field(default_factory=list)
    generators: Mapping[str, ActorHandle] = field(default_factory=dict)

    def start(self) -> None:
        self.actors = [self._make() for _ in range(self.config.actors.num_prompt_actors)]

    def _make(self) -> ActorHandle:
        return remote_prompt_actor(self.config, str(self.policy_path), self.predictor)

    async def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        """Tell every actor which generators are ready; a dead actor is told when it is replaced."""
        self.generators = dict(generators)
        calls = [actor.announce.remote(self.generators) for actor in self.actors]
        for result in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(result, BaseException) and not isinstance(result, RayActorError):
                raise result

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        """The prompt's finished tree. Raises PromptLostError when there is none within the limits."""
        limit_s = self.config.actors.tree_timeout_s

        async def grow(actor: ActorHandle) -> RolloutTree:
            async with asyncio.timeout(limit_s):
                return await actor.run_prompt.remote(task, prompt)

        try:
            return await self._on(ticket % len(self.actors), grow)
        except TimeoutError:
            log.error("task %s: no tree within actors.tree_timeout_s=%s", task.id, limit_s)
            raise PromptLostError(LossKind.TREE_TIMEOUT) from None
        except RayActorError:
            raise PromptLostError(LossKind.PROMPT_ACTOR_DIED) from None

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery]:
        """The predictor's question for every task: V after all tokens of its prompt."""
        return _in_order(await self._on_all("prompt_queries", tasks))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """For every task the rewards of `count` rollouts by the current policy, fewer where some broke down."""
        return _in_order(await self._on_all("measure", tasks, count))

    async def evaluate(self, tasks: Sequence[Task], temperature: float) -> list[EvalRollout]:
        """One rollout per task."""
        return list(itertools.chain.from_iterable(await self._on_all("evaluate", tasks, temperature)))

    async def _on_all(self, method: str, tasks: Sequence[Task], *arguments: object) -> list[Any]:
        """What every actor says to its share of the tasks."""

        async def ask(share: Sequence[Task], actor: ActorHandle) -> Any:
            return await getattr(actor, method).remote(share, *arguments)

        shares = [tasks[slot :: len(self.actors)] for slot in range(len(self.actors))]
        return await asyncio.gather(*(self._on(slot, partial(ask, share)) for slot, share in enumerate(shares)))

    async def _on(self, slot: int, call: Callable[[ActorHandle], Awaitable[T]]) -> T:
        """`call` on the slot's actor, and anew on the one in its place when it dies. Raises the last RayActorError
        when `actors.max_rollout_retries` more have died too."""
        retries_left = self.config.actors.max_rollout_retries
        while True:
            actor = self.actors[slot]
            try:
                return await call(actor)
            except RayActorError as error:
                log.error("PromptActor %d died, %d retries left: %r", slot, retries_left, error)
                await self._replace(slot, actor)
                if not retries_left:
                    raise
                retries_left -= 1

    async def _replace(self, slot: int, dead: ActorHandle) -> None:
        if self.actors[slot] is dead:
            ray.kill(dead)  # one that could not be reached may still be there
            self.actors[slot] = self._make()
            # It may have been put on a node that is dying itself: whoever calls it next replaces it again.
            with contextlib.suppress(RayActorError):
                await self.actors[slot].announce.remote(self.generators)

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Puts the answers to `_on_all` back into the order of the tasks."""
    answers = [iter(part) for part in parts]
    return [next(answers[index % len(answers)]) for index in range(sum(map(len, parts)))]
