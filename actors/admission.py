"""Admission: which prompts start, when, with how many root rollouts; and the trees that come of them.

        next candidates ─► V(prompt) ─► Stage 1: m_i ─► one coroutine per prompt ─► ledger ─► TreeBuffer

A round spends M root rollouts over a pool of candidates; it starts as soon as `max_staleness` allows.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ray.actor import ActorHandle

from actors.prompt_group import PromptGroup, PromptLostError
from trace_async.config import Config
from trace_async.method.market import Market
from trace_async.method.posterior import Estimates
from trace_async.method.registry import stage1_rule
from trace_async.run.buffer import TreeBuffer
from trace_async.run.dataset import TaskIterator
from trace_async.run.state import PendingPrompt, RunState, SavedTrainer
from trace_async.trees.tree import RolloutTree
from trace_async.types import LossKind, Task


class Admission:
    """Owns the run's counters, the buffer, and the prompts under way. `run` beside the updates, which call `take`."""

    def __init__(
        self, config: Config, tasks: Sequence[Task], prompts: PromptGroup, predictor: ActorHandle, log_dir: Path
    ) -> None:
        self.config = config
        self.prompts = prompts
        self.predictor = predictor
        self.log_dir = log_dir
        self.tasks = tasks
        self.iterator = TaskIterator(tasks, seed=config.seed)
        # Where the data stands once the prompts of the last round are under way: a checkpoint skips none.
        self.position = self.iterator.state()
        self.state = RunState()
        self.rule = stage1_rule(config.budget)
        self.market = Market(config.budget)
        self.buffer = TreeBuffer(config.budget.root_rollouts, config.actors.max_staleness)
        self.pending: dict[int, PendingPrompt] = {}
        self.changed = asyncio.Condition()
        self.learner_waits = False
        self.growers: set[asyncio.Task[None]] = set()
        self.grower_error: BaseException | None = None
        self.last_tree_at = time.monotonic()
        self.failed_before_update = 0
        self.estimate_s = 0.0

    # ── Stage 1 ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Start rounds for ever, each as soon as it may; the trainer cancels this at the end."""
        try:
            while True:
                async with self.changed:
                    await self.changed.wait_for(self._may_admit)
                await self._admit_round()
        finally:
            for grower in self.growers:
                grower.cancel()
            await asyncio.gather(*self.growers, return_exceptions=True)

    def _may_admit(self) -> bool:
        if self._spent():
            return False
        if self.learner_waits and self.buffer.exhausted():
            return True  # whatever the count says: failures and filters may have left too little for an update
        enough = self.state.admitted_roots >= self.config.num_updates * self.config.budget.root_rollouts
        return not enough and self.buffer.may_admit(self.state.admitted_roots, self.state.num_updates)

    def _spent(self) -> bool:
        """The run's updates are done, or its tokens are generated."""
        limit = self.config.max_generated_tokens
        return self.state.num_updates >= self.config.num_updates or 0 < limit <= self.state.generated_tokens

    async def _admit_round(self) -> None:
        """Draw candidates, estimate them, spend M root rollouts on them; the others are skipped for this round."""
        rule = stage1_rule(self.config.budget, self.state.num_rounds)
        tasks = self.iterator.take(self.config.budget.pool_size)
        estimates = await self._estimates(tasks) if rule.needs_estimates else Estimates.unknown(len(tasks))
        rng = np.random.default_rng((self.config.seed, self.state.num_rounds))
        counts = rule.plan(estimates, self.config.budget.root_rollouts, rng)
        for task, count, success in zip(tasks, counts, estimates.mean, strict=True):
            if count:
                prompt = PendingPrompt(
                    task_id=task.id,
                    num_roots=int(count),
                    policy_version=self.state.policy_version,
                    root_value=float(success),
                    seed=int(rng.integers(2**31)),
                )
                self.state.ledger.allocate_roots(prompt.num_roots)
                self._grow_in_background(self.state.num_prompts, prompt, task)
                self.state.num_prompts += 1
        self.state.num_rounds += 1
        self.state.admitted_roots += int(counts.sum())
        self.position = self.iterator.state()

    async def _estimates(self, tasks: Sequence[Task]) -> Estimates:
        started = time.monotonic()
        if self.config.budget.oracle_rollouts:
            rewards = await self.prompts.measure(tasks, self.config.budget.oracle_rollouts)
            return Estimates.of_outcomes(rewards)
        queries = await self.prompts.prompt_queries(tasks)
        estimates: Estimates = await self.predictor.estimate.remote([task.id for task in tasks], queries)
        self.estimate_s += time.monotonic() - started
        return estimates

    # ── prompts under way ────────────────────────────────────────────────────────────────────────────────────────

    def _grow_in_background(self, ticket: int, prompt: PendingPrompt, task: Task) -> None:
        self.pending[ticket] = prompt
        self.buffer.admit(ticket, prompt.policy_version)
        grower = asyncio.create_task(self._grow(ticket, prompt, task))
        self.growers.add(grower)
        grower.add_done_callback(self._grower_ended)

    def _grower_ended(self, grower: asyncio.Task[None]) -> None:
        self.growers.discard(grower)
        if not grower.cancelled() and grower.exception() is not None:
            self.grower_error = grower.exception()

    async def _grow(self, ticket: int, prompt: PendingPrompt, task: Task) -> None:
        try:
            await self._arrive(
                ticket, prompt, await self.prompts.run(ticket, replace(prompt, offer=self.market.offer()), task)
            )
        except PromptLostError as loss:
            await self._arrive(ticket, prompt, None, loss.kind)

    async def _arrive(
        self, ticket: int, prompt: PendingPrompt, tree: RolloutTree | None, loss: LossKind | None = None
    ) -> None:
        async with self.changed:
            del self.pending[ticket]
            if tree is None:
                assert loss is not None
                self.state.ledger.lose_tree(prompt.num_roots, loss)
            else:
                self.state.ledger.arrive(tree)
                self.market.observe(tree)
                self.state.generated_tokens += tree.num_generated_tokens
                if tree.rollouts and not self.rule.trains_on(tree):
                    self.state.ledger.filter(tree)
                    self.state.admitted_roots -= prompt.num_roots
                    tree = None
            self.buffer.finish(ticket, tree)
            self.last_tree_at = time.monotonic()
            self.changed.notify_all()

    # ── what the updates see ─────────────────────────────────────────────────────────────────────────────────────

    async def take(self) -> list[RolloutTree]:
        """The trees of the next update; none when the budget is spent. RuntimeError when nothing comes any more."""
        async with self.changed:
            self.learner_waits = True
            self.changed.notify_all()
            try:
                while not self.buffer.ready(self.state.policy_version, more_to_come=self._may_admit()):
                    if self.grower_error is not None:
                        raise self.grower_error
                    if self._spent() and self.buffer.exhausted():
                        return []
                    self._check_progress()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(5.0):
                            await self.changed.wait()
                return self.buffer.take(self.state.policy_version)
            finally:
                self.learner_waits = False

    def _check_progress(self) -> None:
        failed = sum(self.state.ledger.failed.values())
        if failed - self.failed_before_update >= 4 * self.config.budget.root_rollouts:
            raise RuntimeError(
                f"nearly every rollout breaks down ({dict(self.state.ledger.failed)} so far); the causes are in "
                f"{self.log_dir} and in Ray's logs"
            )
        waited = time.monotonic() - self.last_tree_at
        if waited > self.config.actors.tree_timeout_s * (self.config.actors.max_rollout_retries + 2):
            raise RuntimeError(
                f"no tree has ended for {waited:.0f} s: {len(self.pending)} prompts are under way; see {self.log_dir}"
            )

    async def account(self, trees: Sequence[RolloutTree], *, updated: bool) -> None:
        """Enter a finished update. Without a token of credit no weight has changed, and the version stays."""
        async with self.changed:
            for tree in trees:
                self.state.ledger.train(tree)
            self.state.ledger.check(
                waiting=self.buffer.num_waiting_rollouts,
                in_flight_roots=sum(prompt.num_roots for prompt in self.pending.values()),
            )
            self.state.num_updates += 1
            self.state.policy_version += updated
            self.state.updates_without_credit = 0 if updated else self.state.updates_without_credit + 1
            self.failed_before_update = sum(self.state.ledger.failed.values())
            self.changed.notify_all()

    def snapshot(self) -> SavedTrainer:
        """For a checkpoint; nothing of it changes afterwards."""
        return SavedTrainer(
            state=self.state.copy(),
            dataset=self.position,
            pending=list(self.pending.values()),
            waiting=list(self.buffer.waiting),
        )

    def restore(self, saved: SavedTrainer) -> None:
        """Go on from a snapshot; prompts that were under way are grown again at once."""
        self.state = saved.state
        self.iterator.load_state(saved.dataset)
        self.position = self.iterator.state()
        self.buffer.waiting = list(saved.waiting)
        by_id = {task.id: task for task in self.tasks} if saved.pending else {}
        for number, prompt in enumerate(saved.pending):
            # Tickets below 0, so that they cannot meet those of new prompts.
            self._grow_in_background(-1 - number, prompt, by_id[prompt.task_id])
