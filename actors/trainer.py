"""The asynchronous loop.

┌── Admission.run ─────────────────────────────────────────────────────────────────────────┐
│ waits until the next round may start (max_staleness), then                               │
│ candidate tasks ─► PredictorActor: V(prompt) ─► Stage 1: m_i ─► one coroutine per prompt │
└────────────────────────────────────────────────────────────────────────┬─────────────────┘
   PromptActor.run_prompt: roots ─► values ─► Stage 2 ─► continuations   │ never waits for another prompt
┌── Trainer._updates ────────────────────────────────────────────────────▼─────────────────┐
│ waits for an update's worth of trees in the TreeBuffer, then                             │
│ LearnerGroup.update ∥ PredictorActor.train ─► weights, version + 1 ─► GeneratorPool      │
│ ─► admission may go on ─► evaluation, checkpoint, metrics                                │
└──────────────────────────────────────────────────────────────────────────────────────────┘
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import ray
from ray.exceptions import RayActorError

from actors.admission import Admission
from actors.evaluation import heldout_metrics
from actors.generator_pool import GeneratorPool
from actors.learner import LearnerGroup
from actors.predictor import remote_predictor
from actors.prompt_group import PromptGroup
from envs import load_domain
from trace_async.config import Config
from trace_async.run.checkpoint import CheckpointStore
from trace_async.run.state import RunState, load_trainer, save_trainer
from trace_async.tracking.metrics import tree_metrics
from trace_async.trees.tree import RolloutTree

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
    """Runs in the driver's process; every heavy part is an actor. `on_metrics`: update, figures, trees."""

    def __init__(self, config: Config, run_dir: Path, policy_path: Path, on_metrics: OnMetrics) -> None:
        self.config = config
        self.run_dir = run_dir
        self.on_metrics = on_metrics
        domain = load_domain(config.env)
        self.heldout_tasks = domain.tasks("heldout")[: config.eval.num_tasks]
        self.learner = LearnerGroup(config, policy_path)
        self.predictor = remote_predictor(config, str(policy_path))
        self.prompts = PromptGroup(config, policy_path, self.predictor)
        self.pool = GeneratorPool(config, policy_path, run_dir / "logs", self.prompts.announce)
        self.admission = Admission(config, domain.tasks("train"), self.prompts, self.predictor, run_dir / "logs")
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep)
        self.clock = Clock({})

    @property
    def state(self) -> RunState:
        return self.admission.state

    async def run(self, checkpoint: Path | None = None) -> RunState:
        """Train until the configured updates or tokens are spent; from `checkpoint` when resuming."""
        try:
            await self._start(checkpoint)
            if checkpoint is None:
                self.on_metrics(0, await self.evaluate(), [])
            await _race(self._updates(), self.admission.run(), self.pool.watch())
            if not self._evaluation_due():
                self.on_metrics(self.state.num_updates, await self.evaluate(), [])
            await self.save()
            await self.learner.export(self.run_dir / "policy")
            return self.state
        finally:
            await self._close()

    async def _start(self, checkpoint: Path | None) -> None:
        self.prompts.start()
        await asyncio.gather(self.pool.start(), self.learner.start(), self._predictor_ready())
        if checkpoint is not None:
            await self._restore(checkpoint)

    async def _predictor_ready(self) -> None:
        limit_s = self.config.engine.start_timeout_s
        try:
            async with asyncio.timeout(limit_s):
                await self.predictor.ready.remote()
        except TimeoutError:
            raise TimeoutError(
                f"the predictor did not start within engine.start_timeout_s={limit_s:g}: `ray status` shows whether "
                "there is room for it"
            ) from None

    async def _close(self) -> None:
        for close in (self.pool.close(), self.learner.close()):
            try:
                await asyncio.wait_for(close, 60)
            except (RayActorError, TimeoutError) as error:
                log.warning("while closing: %r", error)
        self.prompts.close()
        ray.kill(self.predictor)

    async def _updates(self) -> None:
        while self.state.num_updates < self.config.num_updates:
            started = time.monotonic()
            trees = await self.clock.time("wait_for_trees", self.admission.take())
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

    async def _update(self, trees: list[RolloutTree], started: float) -> None:
        version = self.state.policy_version
        learned, predicted = await asyncio.gather(
            self.clock.time("update", self.learner.update(trees, version)),
            self.clock.time("predictor", self._train_predictor(trees, version)),
        )
        updated = bool(learned["learner/updated"])
        if updated:
            weights = await self.clock.time("gather", self.learner.weights(version + 1))
            await self.clock.time("sync", self._sync(weights, version + 1))
        await self.admission.account(trees, updated=updated)
        step_s = time.monotonic() - started
        self.state.elapsed_s += step_s
        metrics = tree_metrics(trees, version) | learned | predicted | await self._run_metrics(step_s)
        self.on_metrics(self.state.num_updates, metrics, trees)
        if self.state.updates_without_credit >= MAX_UPDATES_WITHOUT_CREDIT:
            raise RuntimeError(
                f"in {MAX_UPDATES_WITHOUT_CREDIT} updates in a row no prompt had both outcomes: nothing can be learnt "
                "from these tasks with this policy; see train/reward, and choose easier or harder tasks (env.args)"
            )

    async def _sync(self, weights: Sequence[ray.ObjectRef], version: int) -> None:
        """Generators and the predictor that reads the policy's states: nothing goes on with older weights."""
        await asyncio.gather(self.pool.update_weights(weights, version), self._sync_predictor(weights, version))

    async def _sync_predictor(self, weights: Sequence[ray.ObjectRef], version: int) -> None:
        if self.config.predictor.trunk == "policy":
            serves = await self.predictor.receive_weights.remote(*weights)
            assert serves == version, f"the predictor reads with version {serves}, not {version}"

    async def _train_predictor(self, trees: list[RolloutTree], version: int) -> dict[str, float]:
        return await self.predictor.train.remote(trees, version)

    async def _run_metrics(self, step_s: float) -> dict[str, float]:
        stats = await self.pool.stats()
        phases = self.clock.read()
        ledger = self.state.ledger
        estimate_s, self.admission.estimate_s = self.admission.estimate_s, 0.0
        return (
            phases
            | self.admission.market.metrics()
            | {
                "time/step_s": step_s,
                "time/estimate_s": estimate_s,
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
        )

    async def evaluate(self) -> dict[str, float]:
        """Held-out success of the current weights, at every temperature of `eval.temperatures`."""
        started = time.monotonic()
        metrics = await heldout_metrics(self.prompts, self.heldout_tasks, self.config.eval.temperatures)
        return metrics | {
            "time/eval_s": time.monotonic() - started,
            "time/elapsed_s": self.state.elapsed_s,
            "tokens/generated_total": float(self.state.generated_tokens),
        }

    async def save(self) -> None:
        """A checkpoint of everything, at an update boundary; trees that arrive meanwhile belong to the next one."""
        saved = self.admission.snapshot()
        async with self.checkpoints.saving(saved.state.num_updates) as folder:
            save_trainer(folder, saved)
            (folder / "learner").mkdir()
            await self.learner.save(folder / "learner")
            await self.predictor.save.remote(str(folder / "predictor"))

    async def _restore(self, checkpoint: Path) -> None:
        saved = load_trainer(checkpoint)
        await asyncio.gather(
            self.learner.load(checkpoint / "learner"), self.predictor.load.remote(str(checkpoint / "predictor"))
        )
        version = saved.state.policy_version
        if version > 0:
            await self._sync(await self.learner.weights(version), version)
        self.admission.restore(saved)


async def _race(main: Awaitable[None], *background: Awaitable[None]) -> None:
    """Runs until `main` ends or any of them fails, then ends all."""
    tasks = [asyncio.ensure_future(work) for work in (main, *background)]
    try:
        while not tasks[0].done():
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
