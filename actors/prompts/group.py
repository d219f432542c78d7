"""Use all PromptActors as one.

A prompt whose actor died or hangs is grown again on the actor that takes its place.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.actor import ActorHandle

from actors.calls import ActorLostError, CallError, CallTimeoutError, PromptLostError, ask, ask_all
from actors.generators.router import Generators, RouterStats, loads_of_others
from actors.predictors.group import Answering
from actors.predictors.handle import Predictor
from actors.prompts.prompt import HeldOut, remote_prompt_actor
from actors.ray_cluster import on_draining_nodes
from trace_async.config import Config
from trace_async.run.state import PendingPrompt
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task

log = logging.getLogger(__name__)
T = TypeVar("T")
WATCH_EVERY_S = 5.0
ANNOUNCE_LIMIT_S = 10.0


@dataclass(slots=True)
class PromptGroup:
    """Holds the PromptActors. It lives in the trainer's process, and all its methods run in one event loop."""

    config: Config
    policy_path: Path
    predictor: Predictor | Answering | None
    """Where the actors ask for V(H) (None: the method needs no predictor)."""
    actors: list[ActorHandle] = field(default_factory=list)
    """One per slot. The actor of a slot changes when it is replaced; the number of slots does not."""
    generators: Generators = field(default_factory=lambda: Generators({}))
    """As the pool announced them last."""
    learnt: ray.ObjectRef | None = None
    """The heads that the predictor learnt last, with predictor.trunk=policy."""
    loads: dict[ActorHandle, Mapping[str, int]] = field(default_factory=dict)
    """For every actor that has answered, the rollouts that it had on each generator then."""
    leaving: list[ActorHandle] = field(default_factory=list)
    """On nodes that are being drained: others have their slots, and they finish the prompts that they have."""
    under_way: Counter[ActorHandle] = field(default_factory=Counter)
    """Calls that an actor has not answered."""

    def start(self) -> None:
        """Start `actors.num_prompt_actors` actors. Returns at once."""
        self.actors = [self._make() for _ in range(self.config.actors.num_prompt_actors)]

    def _make(self) -> ActorHandle:
        return remote_prompt_actor(self.config, str(self.policy_path), self.predictor)

    async def announce(self, generators: Generators) -> None:
        """Tell every actor which generators are ready, and how loaded they are by the other actors.

        One that is dead or hangs only causes a warning here. Its replacement is told when it starts, and the pool
        announces again every few seconds.
        """
        self.generators = generators
        actors, others = self._all(), self._loads_of_others()
        replies = [actor.announce.remote(generators, load) for actor, load in zip(actors, others, strict=True)]
        for actor, answer in zip(actors, await self._told("which generators are ready", replies), strict=True):
            if isinstance(answer, dict) and actor in self._all():  # it may have been replaced meanwhile
                self.loads[actor] = answer

    async def take_learnt(self, learnt: ray.ObjectRef) -> None:
        """Hand every actor what the predictor has learnt. One that is dead or hangs only causes a warning here."""
        self.learnt = learnt
        await self._told("what the predictor has learnt", [actor.take_learnt.remote(learnt) for actor in self._all()])

    async def _told(self, what: str, replies: Sequence[Awaitable[Any]]) -> list[Any]:
        """Return the actors' answers, a CallError for each that gave none; in the order of `_all`."""
        answers = await ask_all(replies, who=self._names(), limit_s=ANNOUNCE_LIMIT_S)
        for answer in answers:
            if isinstance(answer, CallError):
                log.warning("not told %s: %s", what, answer)
            elif isinstance(answer, BaseException):
                raise answer
        return answers

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        """Return the prompt's finished tree. Raises PromptLostError when there is none within the limits.

        The limit `actors.tree_timeout_s` runs in the actor, from when it begins the prompt. Waiting for a free slot
        there is no failure.
        """

        async def grow(actor: ActorHandle, who: str) -> RolloutTree:
            return await ask(actor.run_prompt.remote(task, prompt), who=who)

        try:
            return await self._on(ticket % len(self.actors), grow)
        except PromptLostError as error:
            log.error("task %s is lost: %s", task.id, error.kind)
            # Made anew, because the one from Ray drags the actor's whole traceback along.
            raise PromptLostError(error.kind) from None
        except ActorLostError:
            raise PromptLostError(LossKind.PROMPT_ACTOR_DIED) from None

    async def prompt_queries(self, tasks: Sequence[Task]) -> list[PrefixQuery | LossKind]:
        """Return, for every task, the question to the predictor about its prompt, or why it cannot be asked."""
        return _in_order(await self._on_all("prompt_queries", tasks))

    async def measure(self, tasks: Sequence[Task], count: int) -> list[list[float]]:
        """Return, for every task, the rewards of `count` rollouts by the current policy; fewer if some broke down."""
        return _in_order(await self._on_all("measure", tasks, count))

    async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> list[RolloutTree]:
        """Return one tree per task, in the order of the tasks."""
        return _in_order(await self._on_all("evaluate", tasks, wanted))

    async def router_stats(self) -> RouterStats:
        """Return the totals of all actors that are alive, each since its own start."""
        replies = [actor.router_stats.remote() for actor in self._all()]
        answers = await ask_all(replies, who=self._names(), limit_s=ANNOUNCE_LIMIT_S)
        alive = [answer for answer in answers if isinstance(answer, RouterStats)]
        return RouterStats(sum(a.num_moved for a in alive), sum(a.num_retried for a in alive))

    async def watch(self, every_s: float = WATCH_EVERY_S) -> None:
        """Replace every actor that does not answer for as long as a whole tree may take, without end.

        What it was growing is grown anew, because its death ends the calls that wait for it. One whose node is being
        drained only gets no new prompt.
        """
        while True:
            await asyncio.sleep(every_s)
            limit_s = self.config.actors.tree_timeout_s
            actors = self._all()
            answers = await ask_all([a.router_stats.remote() for a in actors], who=self._names(), limit_s=limit_s)
            for slot, (actor, answer) in enumerate(zip(actors, answers, strict=True)):
                if isinstance(answer, CallTimeoutError):
                    log.error("%s: something in it blocks its loop; it is replaced", answer)
                    await self._replace(slot, actor)
            await self._leave_draining_nodes()

    async def _leave_draining_nodes(self) -> None:
        slots = {str(slot): actor for slot, actor in enumerate(self.actors)}
        for slot in sorted(await on_draining_nodes(slots)):
            old = slots[slot]
            if self.actors[int(slot)] is not old:
                continue  # it died meanwhile and was replaced
            log.warning("PromptActor %s is on a node that is being drained: another one takes its place", slot)
            self.leaving.append(old)
            await self._put_new(int(slot))
            self._let_go(old)

    async def _on_all(self, method: str, tasks: Sequence[Task], *arguments: object) -> list[Any]:
        """Call `method` on every actor with its share of the tasks. Returns the answers in the order of the slots."""

        async def call(share: Sequence[Task], actor: ActorHandle, who: str) -> Any:
            return await ask(getattr(actor, method).remote(share, *arguments), who=who)

        shares = [tasks[slot :: len(self.actors)] for slot in range(len(self.actors))]
        return await asyncio.gather(*(self._on(slot, partial(call, share)) for slot, share in enumerate(shares)))

    async def _on(self, slot: int, call: Callable[[ActorHandle, str], Awaitable[T]]) -> T:
        """Make `call` on the slot's actor, and again on its replacement if it dies.

        Raises the last ActorLostError when it died more often than `actors.max_rollout_retries` allows.
        """
        retries_left = self.config.actors.max_rollout_retries
        while True:
            actor = self.actors[slot]
            self.under_way[actor] += 1
            try:
                return await call(actor, f"PromptActor {slot}")
            except ActorLostError as error:
                log.error("%s; %d retries left", error, retries_left)
                await self._replace(slot, actor)
                if not retries_left:
                    raise
                retries_left -= 1
            finally:
                self.under_way[actor] -= 1
                self._let_go(actor)

    async def _replace(self, slot: int, dead: ActorHandle) -> None:
        """Put a new actor into the slot, unless somebody else has done so already."""
        # Every call that waited for the dead actor comes here, and only the first one replaces it.
        if dead in self.leaving:
            self._end_leaving(dead)
        elif slot < len(self.actors) and self.actors[slot] is dead:
            ray.kill(dead)  # an actor that could not be reached may still be alive
            await self._put_new(slot)

    async def _put_new(self, slot: int) -> None:
        self.loads.pop(self.actors[slot], None)
        new = self.actors[slot] = self._make()
        # The new one may be on a node that is dying too. Then the next call to it replaces it again.
        with contextlib.suppress(CallError):
            reply = new.announce.remote(self.generators, self._loads_of_others()[slot])
            self.loads[new] = await ask(reply, who=f"PromptActor {slot}", limit_s=60)
            if self.learnt is not None:
                await ask(new.take_learnt.remote(self.learnt), who=f"PromptActor {slot}", limit_s=60)

    def _let_go(self, actor: ActorHandle) -> None:
        """End an actor that is leaving once it has answered everything."""
        if not self.under_way[actor]:
            del self.under_way[actor]
            if actor in self.leaving:
                self._end_leaving(actor)

    def _end_leaving(self, actor: ActorHandle) -> None:
        self.leaving.remove(actor)
        self.loads.pop(actor, None)
        ray.kill(actor)

    def _all(self) -> list[ActorHandle]:
        """Return all actors: in the order of the slots, then those that leave."""
        return [*self.actors, *self.leaving]

    def _loads_of_others(self) -> list[dict[str, int]]:
        """Return for every actor, in the order of `_all`, what all the others have on each generator."""
        return loads_of_others([self.loads.get(actor, {}) for actor in self._all()])

    def _names(self) -> list[str]:
        return [f"PromptActor {slot}" for slot in range(len(self.actors))] + ["a PromptActor that leaves"] * len(
            self.leaving
        )

    def close(self) -> None:
        """Kill all actors. They hold nothing that must be given back."""
        for actor in self._all():
            ray.kill(actor)


def _in_order(parts: Sequence[Sequence[T]]) -> list[T]:
    """Put the answers to `_on_all` back into the order of the tasks, which were dealt out in turn."""
    answers = [iter(part) for part in parts]
    return [next(answers[index % len(answers)]) for index in range(sum(map(len, parts)))]
