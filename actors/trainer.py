"""The asynchronous loop.

┌── admission ─────────────────────────────────────────────────────────────────────────────┐
│ waits until the next round may start (max_staleness), then                               │
│ candidate tasks ─► PredictorActor: V(prompt) ─► Stage 1: m_i ─► one coroutine per prompt │
└────────────────────────────────────────────────────────────────────────┬─────────────────┘
   PromptActor.run_prompt: roots ─► values ─► Stage 2 ─► continuations   │ never waits for another prompt
┌── updates ─────────────────────────────────────────────────────────────▼─────────────────┐
│ waits for an update's worth of trees in the TreeBuffer, then                             │
│ LearnerGroup.update ∥ PredictorActor.train ─► weights, version + 1 ─► GeneratorPool      │
│ ─► admission may go on ─► evaluation, checkpoint, metrics                                │
└──────────────────────────────────────────────────────────────────────────────────────────┘
"""

import asyncio
import contextlib
import copy
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import ray
from ray.exceptions import RayActorError

from actors.evaluation import heldout_metrics
from actors.generator_pool import GeneratorPool
from actors.learner import LearnerGroup
from actors.predictor import remote_predictor
from actors.prompt_group import PromptGroup, PromptLostError
from envs import load_domain
from trace_async.allocation import is_trained_on, plan_roots
from trace_async.buffer import TreeBuffer
from trace_async.checkpoint import CheckpointStore
from trace_async.config import Config
from trace_async.dataset import TaskIterator
from trace_async.estimates import Estimates
from trace_async.metrics import tree_metrics
from trace_async.run_state import PendingPrompt, RunState, SavedTrainer, load_trainer, save_trainer
from trace_async.tree import RolloutTree
from trace_async.types import Task

log = logging.getLogger(__name__)
T = TypeVar("T")
MAX_UPDATES_WITHOUT_CREDIT = 20

OnMetrics = Callable[[int, Mapping[str, float], Sequence[RolloutTree]], None]


@dataclass(slots=True)
class Clock:
    """Seconds spent per phase since the last `read`."""

    phases: dict[str, float]

    async def time(self, phase: str, work: Awaitable[T]) -> T:
        start = time.monotonic()
        try:
            return await work
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - start

    def read(self) -> dict[str, float]:
        phases, self.phases = self.phases, {}
        return {f"time/{phase}_s": seconds for phase, seconds in phases.items()}


class Trainer:
    """Runs in the driver's process; every heavy part is an actor. `on_metrics`: step, figures, trees."""

    def __init__(self, config: Config, run_dir: Path, policy_path: Path, on_metrics: OnMetrics) -> None:
        self.config = config
        self.run_dir = run_dir
        self.policy_path = policy_path
        self.on_metrics = on_metrics
        domain = load_domain(config.env)
        self.all_train_tasks = domain.tasks("train")
        self.train_tasks = TaskIterator(self.all_train_tasks, seed=config.seed)
        self.heldout_tasks = domain.tasks("heldout")
        self.state = RunState()
        self.buffer = TreeBuffer(config.budget.root_rollouts, config.actors.max_staleness)
        self.pending: dict[int, PendingPrompt] = {}
        self.learner = LearnerGroup(config, policy_path)
        self.predictor = remote_predictor(config, str(policy_path))
        self.prompts = PromptGroup(config, policy_path, self.predictor)
        self.pool = GeneratorPool(config, policy_path, run_dir / "logs", self.prompts.announce)
        self.changed = asyncio.Condition()
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep)
        self.clock = Clock({})
        self.growers: set[asyncio.Task[None]] = set()
        self.grower_error: BaseException | None = None
        self.dataset_position = self.train_tasks.state()
        self.last_tree_at = time.monotonic()

    # ── a run from start to end ──────────────────────────────────────────────────────────────────────────────────

    async def run(self, checkpoint: Path | None = None) -> RunState:
        """Train until the configured updates or tokens are spent; from `checkpoint` when resuming."""
        try:
            await self._start(checkpoint)
            if checkpoint is None:
                self.on_metrics(0, await self.evaluate(), [])
            await self._race(self._updates(), self._admissions(), self.pool.watch())
            if not self._evaluation_due():
                self.on_metrics(self.state.num_updates, await self.evaluate(), [])
            await self.save()
            await self.learner.export(self.run_dir / "policy")
            return self.state
        finally:
            await self._close()

    async def _race(self, main: Awaitable[None], *background: Awaitable[None]) -> None:
        """Runs until `main` ends or any of them fails, then ends all."""
        tasks = [asyncio.ensure_future(work) for work in (main, *background)]
        try:
            while not tasks[0].done():
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                tasks = [tasks[0], *(task for task in tasks[1:] if not task.done())]
        finally:
            for task in (*tasks, *self.growers):
                task.cancel()
            await asyncio.gather(*tasks, *self.growers, return_exceptions=True)

    async def _start(self, checkpoint: Path | None) -> None:
        self.prompts.start()
        await asyncio.gather(self.pool.start(), self.learner.start(), self.predictor.ready.remote())
        if checkpoint is not None:
            await self._restore(checkpoint)

    async def _close(self) -> None:
        for close in (self.pool.close(), self.learner.close()):
            try:
                await asyncio.wait_for(close, 60)
            except (RayActorError, TimeoutError) as error:
                log.warning("while closing: %r", error)
        self.prompts.close()
        ray.kill(self.predictor)

    # ── admission: Stage 1 ───────────────────────────────────────────────────────────────────────────────────────

    async def _admissions(self) -> None:
        while not self._spent():
            async with self.changed:
                await self.changed.wait_for(self._may_admit)
            await self._admit_round()

    def _may_admit(self) -> bool:
        return not self._spent() and self.buffer.may_admit(self.state.admitted_roots, self.state.num_updates)

    def _spent(self) -> bool:
        """No further round is needed: by updates, or by generated tokens."""
        limit = self.config.max_generated_tokens
        updates_left = self.config.num_updates - self.state.num_updates
        enough = self.state.admitted_roots >= self.config.num_updates * self.config.budget.root_rollouts
        return updates_left <= 0 or (enough and not self.buffer.exhausted()) or 0 < limit <= self.state.generated_tokens

    async def _admit_round(self) -> None:
        """Draw candidates, estimate them, spend M root rollouts on them; the others are skipped for this round."""
        budget = self.config.budget
        if self.state.num_rounds < budget.warmup_rounds:
            budget = replace(budget, stage1="uniform")
        tasks = self.train_tasks.take(budget.pool_size)
        estimates = await self.clock.time("estimate", self._estimates(tasks, budget.stage1))
        rng = np.random.default_rng((self.config.seed, self.state.num_rounds))
        counts = plan_roots(budget, estimates, rng)
        for task, count, success in zip(tasks, counts, estimates.mean, strict=True):
            if count:
                self._admit(
                    PendingPrompt(
                        task_id=task.id,
                        num_roots=int(count),
                        policy_version=self.state.policy_version,
                        root_value=float(success),
                        seed=int(rng.integers(2**31)),
                    ),
                    task,
                )
        self.state.num_rounds += 1
        self.state.admitted_roots += int(counts.sum())
        self.dataset_position = self.train_tasks.state()

    async def _estimates(self, tasks: Sequence[Task], rule: str) -> Estimates:
        if rule in ("uniform", "dapo"):
            return Estimates(np.ones(len(tasks)), np.ones(len(tasks)))
        queries = await self.prompts.prompt_queries(tasks)
        return await self.predictor.estimate.remote([task.id for task in tasks], queries)

    def _admit(self, prompt: PendingPrompt, task: Task) -> None:
        ticket = self.state.num_prompts
        self.state.num_prompts += 1
        self.state.ledger.allocate_roots(prompt.num_roots)
        self._grow_in_background(ticket, prompt, task)

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
            await self._arrive(ticket, prompt, await self.prompts.run(ticket, prompt, task))
        except PromptLostError as loss:
            await self._arrive(ticket, prompt, None, loss.kind)

    async def _arrive(self, ticket: int, prompt: PendingPrompt, tree: RolloutTree | None, loss: str = "") -> None:
        async with self.changed:
            del self.pending[ticket]
            if tree is None:
                self.state.ledger.lose_tree(prompt.num_roots, loss)
            else:
                self.state.ledger.arrive(tree)
                self.state.generated_tokens += tree.num_generated_tokens
                if tree.rollouts and not is_trained_on(self.config.budget, tree):
                    self.state.ledger.filter(tree)
                    self.state.admitted_roots -= prompt.num_roots
                    tree = None
            self.buffer.finish(ticket, tree)
            self.last_tree_at = time.monotonic()
            self.changed.notify_all()

    # ── updates ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _updates(self) -> None:
        while self.state.num_updates < self.config.num_updates:
            started = time.monotonic()
            trees = await self.clock.time("wait_for_trees", self._take())
            if not trees:
                return
            await self._update(trees, started)
            if self._evaluation_due():
                self.on_metrics(self.state.num_updates, await self.evaluate(), [])
            every = self.config.checkpoint.every_updates
            if every and self.state.num_updates % every == 0:
                await self.clock.time("checkpoint", self.save())

    def _evaluation_due(self) -> bool:
        every = self.config.eval.every_updates
        return bool(every) and self.state.num_updates % every == 0

    async def _take(self) -> list[RolloutTree]:
        """The trees of the next update; none when the budget is spent. RuntimeError when nothing comes any more."""
        limit = self.config.actors.tree_timeout_s * (self.config.actors.max_rollout_retries + 2)
        async with self.changed:
            while not self.buffer.ready(self.state.policy_version, more_to_come=self._may_admit()):
                if self.grower_error is not None:
                    raise self.grower_error
                if self._spent() and self.buffer.exhausted():
                    return []
                self._check_progress(limit)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5.0):
                        await self.changed.wait()
            return self.buffer.take(self.state.policy_version)

    def _check_progress(self, limit_s: float) -> None:
        failed = sum(self.state.ledger.failed.values())
        if failed >= self.config.budget.root_rollouts and not sum(self.state.ledger.trained.values()):
            raise RuntimeError(
                f"every rollout so far broke down ({dict(self.state.ledger.failed)}); the causes are in "
                f"{self.run_dir / 'logs'} and in Ray's logs"
            )
        waited = time.monotonic() - self.last_tree_at
        if waited > limit_s:
            raise RuntimeError(
                f"no tree has ended for {waited:.0f} s: {len(self.pending)} prompts are under way, "
                f"{len(self.pool.ready)} generators are ready; see {self.run_dir / 'logs'}"
            )

    async def _update(self, trees: list[RolloutTree], started: float) -> None:
        version = self.state.policy_version
        metrics = tree_metrics(trees, version)
        learned, predicted = await asyncio.gather(
            self.clock.time("update", self.learner.update(trees, version)),
            self.clock.time("predictor", self._train_predictor(trees, version)),
        )
        if learned["learner/updated"]:
            weights = await self.clock.time("gather", self.learner.weights(version + 1))
            await self.clock.time("sync", self.pool.update_weights(weights, version + 1))
        async with self.changed:
            self._account(trees, updated=bool(learned["learner/updated"]))
            self.changed.notify_all()
        step_s = time.monotonic() - started
        self.state.elapsed_s += step_s
        metrics |= learned | predicted | await self._run_metrics(step_s)
        self.on_metrics(self.state.num_updates, metrics, trees)

    def _account(self, trees: Sequence[RolloutTree], *, updated: bool) -> None:
        """Enter a finished update. Without a token of credit no weight has changed, and the version stays."""
        for tree in trees:
            self.state.ledger.train(tree)
        self._check_ledger()
        self.state.num_updates += 1
        self.state.policy_version += updated
        self.state.updates_without_credit = 0 if updated else self.state.updates_without_credit + 1
        if self.state.updates_without_credit >= MAX_UPDATES_WITHOUT_CREDIT:
            raise RuntimeError(
                f"in {MAX_UPDATES_WITHOUT_CREDIT} updates in a row no prompt had both outcomes: nothing can be learnt "
                "from these tasks with this policy; see train/reward, and choose easier or harder tasks (env.args)"
            )

    async def _train_predictor(self, trees: list[RolloutTree], version: int) -> dict[str, float]:
        return await self.predictor.train.remote(trees, version)

    def _check_ledger(self) -> None:
        self.state.ledger.check(
            waiting=self.buffer.num_waiting_rollouts,
            in_flight_roots=sum(prompt.num_roots for prompt in self.pending.values()),
        )

    async def _run_metrics(self, step_s: float) -> dict[str, float]:
        stats = await self.pool.stats()
        phases = self.clock.read()
        ledger = self.state.ledger
        return phases | {
            "time/step_s": step_s,
            "time/elapsed_s": self.state.elapsed_s,
            "idle/learner_share": phases.get("time/wait_for_trees_s", 0.0) / step_s,
            "idle/generator_share": 1 - sum(s.busy_s for s in stats) / max(1e-9, sum(s.alive_s for s in stats)),
            "generators/ready": float(len(self.pool.ready)),
            "generators/lost": float(self.pool.num_lost),
            "tokens/generated_total": float(self.state.generated_tokens),
            "budget/failed_rollouts": float(sum(ledger.failed.values())),
            "budget/filtered_rollouts": float(sum(ledger.filtered.values())),
            "budget/trained_rollouts": float(sum(ledger.trained.values())),
        }

    # ── evaluation, checkpoints ──────────────────────────────────────────────────────────────────────────────────

    async def evaluate(self) -> dict[str, float]:
        """Held-out success of the current weights, at every temperature of `eval.temperatures`."""
        started = time.monotonic()
        tasks = self.heldout_tasks[: self.config.eval.num_tasks]
        metrics = await heldout_metrics(self.prompts, tasks, self.config.eval.temperatures)
        return metrics | {
            "time/eval_s": time.monotonic() - started,
            "time/elapsed_s": self.state.elapsed_s,
            "tokens/generated_total": float(self.state.generated_tokens),
        }

    async def save(self) -> None:
        """A checkpoint of everything, at an update boundary; trees that arrive meanwhile belong to the next one."""
        saved = SavedTrainer(
            state=copy.deepcopy(self.state),
            dataset=self.dataset_position,
            pending=list(self.pending.values()),
            waiting=list(self.buffer.waiting),
        )
        async with self.checkpoints.saving(saved.state.num_updates) as folder:
            save_trainer(folder, saved)
            (folder / "learner").mkdir()
            await self.learner.save(folder / "learner")
            await self.predictor.save.remote(str(folder / "predictor"))

    async def _restore(self, checkpoint: Path) -> None:
        saved = load_trainer(checkpoint)
        self.state = saved.state
        self.train_tasks.load_state(saved.dataset)
        self.dataset_position = dict(saved.dataset)
        self.buffer.waiting = list(saved.waiting)
        await asyncio.gather(
            self.learner.load(checkpoint / "learner"), self.predictor.load.remote(str(checkpoint / "predictor"))
        )
        if self.state.policy_version > 0:
            version = self.state.policy_version
            await self.pool.update_weights(await self.learner.weights(version), version)
        by_id = {task.id: task for task in self.all_train_tasks}
        for ticket, prompt in enumerate(saved.pending):
            self._grow_in_background(-1 - ticket, prompt, by_id[prompt.task_id])
