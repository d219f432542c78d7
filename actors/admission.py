"""Admission: prompts start, grow and arrive; what may happen when is decided by the books (trace_async/run/rounds.py).

What each part waits for, and what unblocks it:

| part             | waits for                               | unblocked by                                        |
|------------------|-----------------------------------------|-----------------------------------------------------|
| `_plan_rounds`   | a round to be wanted                    | a start (few planned prompts are left), an update   |
| `_start_planned` | a planned prompt that may start         | a planned round, a prompt that ended, an update     |
| a grower         | its prompt's tree                       | the PromptActor, within its limit                   |
| `take`           | an update's worth of trees, all due ones | a prompt that ended; silence for too long is an error |
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from actors.calls import PromptLostError
from trace_async.config import Config
from trace_async.method.market import Market
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_rule
from trace_async.run.dataset import TaskIterator
from trace_async.run.rounds import NothingToLearnError, Rounds, RunLimits
from trace_async.run.schedule import Arrival
from trace_async.run.state import PendingPrompt, PlannedPrompt, RunState, SavedTrainer
from trace_async.tracking.faults import FaultBook
from trace_async.trees.tree import Fault, RolloutTree
from trace_async.types import LossKind, PrefixQuery, Task

log = logging.getLogger(__name__)


class Prompts(Protocol):
    """What admission asks of the PromptActors; see `PromptGroup`."""

    async def run(self, ticket: int, prompt: PendingPrompt, task: Task) -> RolloutTree:
        """Return the finished tree. Raises PromptLostError when there is none."""
        ...

    async def prompt_queries(self, tasks: Sequence[Task]) -> Sequence[PrefixQuery | LossKind]:
        """Return the predictor's question about each task's prompt, or why it cannot be asked."""
        ...

    async def measure(self, tasks: Sequence[Task], count: int) -> Sequence[Sequence[float]]:
        """Return the rewards of `count` rollouts of each task, fewer where some broke down."""
        ...


class Estimator(Protocol):
    """What admission asks of the predictor; see `Predictor`."""

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Return what is believed of each candidate prompt."""
        ...


class Admission:
    """Carries out what the books ask for. `run` goes on beside the updates, which call `take` and `account`."""

    def __init__(
        self,
        config: Config,
        tasks: Sequence[Task],
        prompts: Prompts,
        predictor: Estimator,
        log_dir: Path,
        *,
        faults: FaultBook | None = None,
        doing: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.predictor = predictor
        self.log_dir = log_dir
        self.tasks = tasks
        self.iterator = TaskIterator(tasks, seed=config.seed)
        self.rule = stage1_rule(config.budget)
        self.market = Market(config.budget)
        limits = RunLimits(
            roots_per_update=config.budget.root_rollouts,
            max_staleness=config.actors.max_staleness,
            num_updates=config.num_updates,
            max_generated_tokens=config.max_generated_tokens,
        )
        self.rounds = Rounds(limits, self.iterator.state())
        self.estimate_s = 0.0
        self.faults = faults or FaultBook()
        self.doing = doing
        self.arrivals: list[Arrival] = []
        """What has ended since the last update, in order; an update takes it away."""
        self._by_id: dict[str, Task] = {}  # of the tasks that were drawn: naming all of a large split takes long
        self._changed = asyncio.Event()
        self._now = now
        self._progress_at = now()

    @property
    def state(self) -> RunState:
        return self.rounds.state

    async def run(self) -> None:
        """Plan and start for ever; the trainer cancels this at the end. Raises what a part of it raised first."""
        try:
            async with asyncio.TaskGroup() as group:
                for ticket, prompt in self.rounds.pending.items():  # of a checkpoint: grown again at once
                    group.create_task(self._grow(ticket, prompt))
                group.create_task(self._plan_rounds())
                group.create_task(self._start_planned(group))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    # ── Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _plan_rounds(self) -> None:
        while True:
            await self._until(self.rounds.wants_round)
            with self.doing("stage1"):
                prompts = await self._plan_round()
            self.rounds.add_round(prompts, self.iterator.state())
            self._notify()

    async def _plan_round(self) -> list[PlannedPrompt]:
        """Draw candidates, estimate them, spend M root rollouts on them; the others are skipped for this round."""
        budget, number = self.config.budget, self.state.num_rounds
        rule = stage1_rule(budget, number)
        # No task twice in one pool, even where the pool is larger than the data or runs over the end of a pass.
        tasks = self.iterator.pool(budget.pool_size)
        self._leave_out_refused(len(tasks))
        if not tasks:
            return []
        self._by_id |= {task.id: task for task in tasks}
        estimates = Estimates.unknown(len(tasks))
        if rule.needs_estimates:
            tasks, estimates = await self._estimates(tasks)
            if not tasks:
                return []
        tokens = self.market.root_tokens([task.id for task in tasks])
        estimates = replace(estimates, tokens=tokens, price=self.market.price())
        rng = np.random.default_rng((self.config.seed, number))
        counts = rule.plan(estimates, budget.root_rollouts, rng)
        self.market.observe_round(estimates, counts)
        return [
            PlannedPrompt(
                task_id=task.id,
                num_roots=int(count),
                root_value=float(success),
                root_strength=float(strength),
                seed=int(rng.integers(2**31)),
            )
            for task, count, success, strength in zip(tasks, counts, estimates.mean, estimates.strength, strict=True)
            if count
        ]

    def _leave_out_refused(self, num_good: int) -> None:
        """Count the candidates that turned out to be no tasks when they were drawn."""
        refused, self.iterator.refused = self.iterator.refused, []
        if refused:
            self.faults.enter({f"tasks.{LossKind.ENV}": Fault(len(refused), refused[0])})
            self.rounds.lose_candidates([LossKind.ENV] * len(refused), of=num_good + len(refused))

    async def _estimates(self, tasks: list[Task]) -> tuple[list[Task], Estimates]:
        """Return the candidates that can be asked about, and what is believed of them; the others are counted."""
        started = self._now()
        if self.config.budget.oracle_rollouts:
            rewards = await self.prompts.measure(tasks, self.config.budget.oracle_rollouts)
            return tasks, Estimates.of_outcomes(rewards)
        asked = list(zip(tasks, await self.prompts.prompt_queries(tasks), strict=True))
        found = [(task, query) for task, query in asked if not isinstance(query, LossKind)]
        self.rounds.lose_candidates([query for _, query in asked if isinstance(query, LossKind)], of=len(tasks))
        if not found:
            return [], Estimates.unknown(0)
        able = [task for task, _ in found]
        estimates = await self.predictor.estimate([task.id for task in able], [query for _, query in found])
        self.estimate_s += self._now() - started
        return able, estimates

    # ── prompts under way ────────────────────────────────────────────────────────────────────────────────────────

    async def _start_planned(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self._until(self.rounds.may_start)
            if not self.rounds.pending:
                self._progress_at = self._now()  # nothing was under way: the clock starts with this prompt
            ticket, prompt = self.rounds.start()
            self._notify()
            group.create_task(self._grow(ticket, prompt))

    async def _grow(self, ticket: int, prompt: PendingPrompt) -> None:
        try:
            tree = await self.prompts.run(
                ticket, replace(prompt, offer=self.market.offer()), self._by_id[prompt.task_id]
            )
        except PromptLostError as loss:
            self.rounds.lose(ticket, loss.kind)
            self.market.lose()
            self._note_arrival(ticket, prompt, loss.kind)
        else:
            keep = self.rule.trains_on(tree)
            self.faults.enter(tree.faults)
            self.rounds.arrive(ticket, tree, keep=keep)
            self.market.observe(tree, root_strength=prompt.root_strength)
            lost = "" if tree.rollouts else ", ".join(tree.failures)
            self._note_arrival(ticket, prompt, lost or ("kept" if keep else "filtered"))
        self._progress_at = self._now()
        self._notify()

    def _note_arrival(self, ticket: int, prompt: PendingPrompt, fate: str) -> None:
        self.arrivals.append(
            Arrival(
                ticket=ticket,
                task_id=prompt.task_id,
                at=time.time(),
                policy_version=self.state.policy_version,
                fate=fate,
            )
        )

    # ── what the updates see ─────────────────────────────────────────────────────────────────────────────────────

    async def take(self) -> list[RolloutTree]:
        """Wait for the trees of the next update, and return them; none when the budget is spent.

        Raises NothingToLearnError when the run leads nowhere.
        """
        began = self._now()
        while not self.rounds.ready():
            if self.rounds.finished():
                return []
            example = self.faults.example()
            self.rounds.check_worth(f"{self.log_dir} and in Ray's logs" + (f", such as: {example}" if example else ""))
            self._check_progress(began)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(5.0):  # silence wakes nobody, so look for it every 5 s
                    await self._changed.wait()
        return self.rounds.take()

    def _check_progress(self, began: float) -> None:
        """Raise NothingToLearnError when no prompt has ended for too long.

        Prompts end or are given up within their limits, so silence for longer means that something hangs.

        The clock starts with the first prompt, with the last that ended, or with this wait, whichever is latest.
        """
        waited = self._now() - max(began, self._progress_at)
        limit = self.config.actors.tree_timeout_s * (self.config.actors.max_rollout_retries + 2)
        if self.rounds.pending and waited > limit:
            raise NothingToLearnError(
                f"no tree has ended for {waited:.0f} s: {len(self.rounds.pending)} prompts are under way; see "
                f"{self.log_dir}"
            )

    def account(
        self, trees: Sequence[RolloutTree], *, updated: bool, finite: bool = True, elapsed_s: float = 0.0
    ) -> None:
        """Enter a finished update; more prompts may start."""
        self.rounds.account(trees, updated=updated, finite=finite, elapsed_s=elapsed_s)
        self._notify()

    def snapshot(self) -> SavedTrainer:
        """Return what a checkpoint keeps; see `Rounds.snapshot`."""
        return self.rounds.snapshot()

    def restore(self, saved: SavedTrainer) -> None:
        """Go on from a snapshot, before `run`. Raises ValueError when its tasks are not this run's."""
        self.iterator.load_state(saved.dataset)
        wanted = {p.task_id for p in saved.pending.values()} | {p.task_id for p in saved.planned}
        self._by_id |= self.iterator.find(wanted)
        unknown = wanted - self._by_id.keys()
        if unknown:
            raise ValueError(f"the checkpoint has prompts of tasks that are not in the data any more: {min(unknown)} …")
        self.rounds.restore(saved)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        """Wake whoever waits at this moment. All runs in one event loop: nothing changes between check and wait."""
        self._changed.set()
        self._changed = asyncio.Event()
