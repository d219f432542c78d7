"""PromptGroup: the PromptActors as one; a prompt whose actor died is grown again on another."""

import asyncio
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from actors.prompt import remote_prompt_actor
from trace_async.config import Config
from trace_async.metrics import EvalRollout
from trace_async.run_state import PendingPrompt
from trace_async.tree import RolloutTree
from trace_async.types import PrefixQuery, Task

log = logging.getLogger(__name__)
T = TypeVar("T")


class PromptLostError(Exception):
    """A prompt brought no tree, through no fault of the policy; `kind` is how the ledger counts it."""

    def __init__(self, kind: str) -> None:
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
        for attempt in range(self.config.actors.max_rollout_retries + 1):
            slot = (ticket + attempt) % len(self.actors)
            actor = self.actors[slot]
            try:
                async with asyncio.timeout(limit_s):
                    return await actor.run_prompt.remote(task, prompt)
            except TimeoutError:
                log.error("task %s: no tree within actors.tree_timeout_s=%s", task.id, limit_s)
                raise PromptLostError("tree_timeout") from None
            except RayActorError as error:
                log.error("task %s: its PromptActor died, attempt %d: %r", task.id, attempt + 1, error)
                await self._replace(slot, actor)
        raise PromptLostError("prompt_actor_died")

    async def _replace(self, slot: int, dead: ActorHandle) -> None:
        if self.actors[slot] is dead:
            self.actors[slot] = self._make()
            await self.actors[slot].announce.remote(self.generators)

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery]:
        """The predictor's question for every task: V after all tokens of its prompt."""
        shares = self._shares(tasks)
        calls = (actor.prompt_queries.remote(share) for actor, share in zip(self.actors, shares, strict=True))
        return _in_order(await asyncio.gather(*calls))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """For every task the rewards of `count` rollouts by the current policy, fewer where some broke down."""
        shares = self._shares(tasks)
        calls = (actor.measure.remote(share, count) for actor, share in zip(self.actors, shares, strict=True))
        return _in_order(await asyncio.gather(*calls))

    async def evaluate(self, tasks: Sequence[Task], temperature: float) -> list[EvalRollout]:
        """One rollout per task."""
        shares = self._shares(tasks)
        calls = (actor.evaluate.remote(share, temperature) for actor, share in zip(self.actors, shares, strict=True))
        parts: list[list[EvalRollout]] = await asyncio.gather(*calls)
        return list(itertools.chain.from_iterable(parts))

    def _shares(self, tasks: Sequence[Task]) -> list[Sequence[Task]]:
        return [tasks[index :: len(self.actors)] for index in range(len(self.actors))]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Puts the answers of `_shares` back into the order of the tasks."""
    answers = [iter(part) for part in parts]
    return [next(answers[index % len(answers)]) for index in range(sum(map(len, parts)))]
