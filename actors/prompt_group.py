"""PromptGroup: the PromptActors as one; a prompt whose actor died or hangs is grown again on another."""

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

from actors.calls import ActorLostError, CallError, CallTimeoutError, PromptLostError, ask, ask_all
from actors.predictor_group import Answering
from actors.predictor_handle import Predictor
from actors.prompt import remote_prompt_actor
from actors.router import RouterStats
from trace_async.config import Config
from trace_async.run.state import PendingPrompt
from trace_async.tracking.metrics import EvalRollout
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task

log = logging.getLogger(__name__)
T = TypeVar("T")
WATCH_EVERY_S = 5.0
ANNOUNCE_LIMIT_S = 10.0


@dataclass(slots=True)
class PromptGroup:
    """Lives in the trainer's process."""

    config: Config
    policy_path: Path
    predictor: Predictor | Answering | None
    actors: list[ActorHandle] = field(default_factory=list)
    generators: Mapping[str, ActorHandle] = field(default_factory=dict)
    """Those last announced by the pool."""

    def start(self) -> None:
        self.actors = [self._make() for _ in range(self.config.actors.num_prompt_actors)]

    def _make(self) -> ActorHandle:
        return remote_prompt_actor(self.config, str(self.policy_path), self.predictor)

    async def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        """Tell every actor which generators are ready.

        A dead or hung actor is told when it is replaced; the pool announces again every few seconds.
        """
        self.generators = dict(generators)
        replies = [actor.announce.remote(self.generators) for actor in self.actors]
        for answer in await ask_all(replies, who=self._names(), limit_s=ANNOUNCE_LIMIT_S):
            if isinstance(answer, CallError):
                log.warning("not told which generators are ready: %s", answer)
            elif isinstance(answer, BaseException):
                raise answer

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        """The prompt's finished tree. Raises PromptLostError when there is none within the limits.

        `actors.tree_timeout_s` runs in the actor, from when the prompt has a slot there: waiting for one is no failure.
        """

        async def grow(actor: ActorHandle, who: str) -> RolloutTree:
            return await ask(actor.run_prompt.remote(task, prompt), who=who)

        try:
            return await self._on(ticket % len(self.actors), grow)
        except PromptLostError as error:
            log.error("task %s is lost: %s", task.id, error.kind)
            raise PromptLostError(error.kind) from None
        except ActorLostError:
            raise PromptLostError(LossKind.PROMPT_ACTOR_DIED) from None

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
        """The predictor's question for every task: V after all tokens of its prompt; or why it cannot be asked."""
        return _in_order(await self._on_all("prompt_queries", tasks))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """For every task the rewards of `count` rollouts by the current policy, fewer where some broke down."""
        return _in_order(await self._on_all("measure", tasks, count))

    async def evaluate(self, tasks: Sequence[Task], temperature: float) -> list[EvalRollout]:
        """One rollout per task."""
        return list(itertools.chain.from_iterable(await self._on_all("evaluate", tasks, temperature)))

    async def router_stats(self) -> RouterStats:
        """Totals over the actors that are alive, each since its own start."""
        replies = [actor.router_stats.remote() for actor in self.actors]
        answers = await ask_all(replies, who=self._names(), limit_s=ANNOUNCE_LIMIT_S)
        alive = [answer for answer in answers if isinstance(answer, RouterStats)]
        return RouterStats(sum(a.num_spilled for a in alive), sum(a.num_retried for a in alive))

    async def watch(self, every_s: float = WATCH_EVERY_S) -> None:
        """Replaces an actor that answers nothing for as long as a whole tree may take; what it grew is grown anew."""
        while True:
            await asyncio.sleep(every_s)
            limit_s = self.config.actors.tree_timeout_s
            actors = list(self.actors)
            answers = await ask_all([a.router_stats.remote() for a in actors], who=self._names(), limit_s=limit_s)
            for slot, (actor, answer) in enumerate(zip(actors, answers, strict=True)):
                if isinstance(answer, CallTimeoutError):
                    log.error("%s: something in it blocks its loop; it is replaced", answer)
                    await self._replace(slot, actor)

    async def _on_all(self, method: str, tasks: Sequence[Task], *arguments: object) -> list[Any]:
        """What every actor says to its share of the tasks."""

        async def call(share: Sequence[Task], actor: ActorHandle, who: str) -> Any:
            return await ask(getattr(actor, method).remote(share, *arguments), who=who)

        shares = [tasks[slot :: len(self.actors)] for slot in range(len(self.actors))]
        return await asyncio.gather(*(self._on(slot, partial(call, share)) for slot, share in enumerate(shares)))

    async def _on(self, slot: int, call: Callable[[ActorHandle, str], Awaitable[T]]) -> T:
        """`call` on the slot's actor, and anew on the one in its place when it dies. Raises the last ActorLostError
        when `actors.max_rollout_retries` more have died too."""
        retries_left = self.config.actors.max_rollout_retries
        while True:
            actor = self.actors[slot]
            try:
                return await call(actor, f"PromptActor {slot}")
            except ActorLostError as error:
                log.error("%s; %d retries left", error, retries_left)
                await self._replace(slot, actor)
                if not retries_left:
                    raise
                retries_left -= 1

    async def _replace(self, slot: int, dead: ActorHandle) -> None:
        if self.actors[slot] is dead:
            ray.kill(dead)  # one that could not be reached may still be there
            self.actors[slot] = self._make()
            # It may have been put on a node that is dying itself: whoever calls it next replaces it again.
            with contextlib.suppress(CallError):
                await ask(self.actors[slot].announce.remote(self.generators), who=f"PromptActor {slot}", limit_s=60)

    def _names(self) -> list[str]:
        return [f"PromptActor {slot}" for slot in range(len(self.actors))]

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Puts the answers to `_on_all` back into the order of the tasks."""
    answers = [iter(part) for part in parts]
    return [next(answers[index % len(answers)]) for index in range(sum(map(len, parts)))]
