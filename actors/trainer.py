"""The asynchronous loop.

┌── Admission.run ─────────────────────────────────────────────────────────────────────────┐
│ plans rounds (Stage 1: V(prompt) ─► m_i) and starts their prompts one by one, as soon as │
│ max_staleness allows and others have ended: one coroutine per prompt                     │
└────────────────────────────────────────────────────────────────────────┬─────────────────┘
   PromptActor.run_prompt: roots ─► values ─► Stage 2 ─► continuations   │ never waits for another prompt
┌── Trainer._updates ────────────────────────────────────────────────────▼─────────────────┐
│ waits for an update's worth of trees in the TreeBuffer, then                             │
│ LearnerGroup.update ∥ PredictorActor.train ─► weights, version + 1 ─► GeneratorPool      │
│ ─► admission may go on ─► metrics, checkpoint, evaluation                                │
└──────────────────────────────────────────────────────────────────────────────────────────┘

What is lost is replaced: a generator or a PromptActor by its manager's watch, the predictor by Ray, a learner rank by
a new session, which starts all parts anew and goes on from the newest checkpoint, within this process.
"""

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import ray

from actors.admission import Admission
from actors.calls import CallError
from actors.evaluation import Evaluations, Moment
from actors.figures import Clock, RunFigures
from actors.generators.pool import GeneratorPool
from actors.generators.scaling import Scaling
from actors.learner import DeltaRef
from actors.parts import Parts
from actors.prompts.group import PromptGroup
from envs import load_domain
from envs.tasks import heldout_tasks, load_splits
from trace_async.config import Config
from trace_async.run.checkpoint import CheckpointStore, latest_checkpoint
from trace_async.run.rounds import NothingToLearnError
from trace_async.run.scaling import Size
from trace_async.run.schedule import Schedule, UpdateRecord
from trace_async.run.session import Phases
from trace_async.run.state import RunState, load_trainer, save_trainer
from trace_async.tracking.faults import FaultBook
from trace_async.tracking.metrics import tree_metrics
from trace_async.trees.tree import RolloutTree
from trace_async.types import Task

log = logging.getLogger(__name__)

OnMetrics = Callable[[int, Mapping[str, float], Sequence[RolloutTree]], None]
OnRollback = Callable[[int, BaseException], None]
OnResize = Callable[[Size], None]
OnPhase = Callable[[Collection[str]], None]


class Pace(Protocol):
    """Who says when the next update is made. A run by itself needs none; the Python API's goes on as it is asked."""

    def started(self) -> None:
        """All parts are ready, and a checkpoint is loaded. Called anew after a rollback."""
        ...

    async def before_update(self) -> None:
        """Returns when the next update may be made."""
        ...


class StopRequestedError(Exception):
    """The run was asked to stop, and has; `checkpoint` is the newest, None when there is none."""

    def __init__(self, checkpoint: Path | None) -> None:
        super().__init__(f"stopped on request; the newest checkpoint is {checkpoint}")
        self.checkpoint = checkpoint


class Trainer:
    """Runs in the driver's process; every heavy part is an actor."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        policy_path: Path,
        on_metrics: OnMetrics,
        *,
        on_rollback: OnRollback = lambda step, error: None,
        on_resize: OnResize = lambda size: None,
        on_phase: OnPhase = lambda names: None,
        make_parts: Callable[[Config, Path, Path], Parts] = Parts.make,
        pace: Pace | None = None,
    ) -> None:
        """`on_metrics`: update, figures, trees. `on_rollback`: the update to which the run went back (-1: its
        beginning), and why; figures of later ones come again. `on_resize`: how many generators there are from now on,
        and why. `on_phase`: the names of all that goes on, whenever something begins or ends. `pace`: whoever gives one
        also evaluates at the beginning and the end, and ends the run, which stays alive after its last update."""
        self.config = config
        self.run_dir = run_dir
        self.policy_path = policy_path
        self.on_metrics = on_metrics
        self.on_rollback = on_rollback
        self.on_resize = on_resize
        self.make_parts = make_parts
        self.pace = pace
        self.train_tasks = load_splits(load_domain(config.env)).train
        self.evaluated_tasks = heldout_tasks(config)
        self.faults = FaultBook()
        self.checkpoints = CheckpointStore(run_dir / "checkpoints", config.checkpoint.keep)
        self.schedule = Schedule(run_dir, records=config.tracking.record_schedule)
        self.doing = Phases(run_dir, on_phase)
        self.clock = Clock(self.doing)
        self._stop = asyncio.Event()
        self._between_updates = asyncio.Event()
        self._begin_session()

    def _begin_session(self) -> None:
        self.parts = self.make_parts(self.config, self.run_dir, self.policy_path)
        self.admission = Admission(
            self.config,
            self.train_tasks,
            self.parts.prompts,
            self.parts.predictor,
            self.run_dir / "logs",
            faults=self.faults,
            doing=self.doing.during,
        )
        self.figures = RunFigures(self.parts, self.admission, self.clock, self.faults)
        self.scaling = Scaling(self.config, self.parts.pool, self.run_dir, on_change=self.on_resize)
        self.evaluations = Evaluations(
            self.config,
            self.evaluated_tasks,
            self.parts.prompts,
            self.parts.pool,
            self.faults,
            self.run_dir,
            report=lambda update, metrics: self.on_metrics(update, metrics, []),
            doing=self.doing.during,
        )
        self._started = False
        self._saved_updates = -1
        self._updates_in_session = 0
        self._between_updates.set()

    @property
    def state(self) -> RunState:
        return self.admission.state

    @property
    def heldout_tasks(self) -> Sequence[Task]:
        """Those of the run's own environment."""
        return self.evaluated_tasks[""]

    @property
    def pool(self) -> GeneratorPool:
        return self.parts.pool

    @property
    def prompts(self) -> PromptGroup:
        return self.parts.prompts

    def stop(self) -> None:
        """Ask the run to save a checkpoint at the next update boundary and to end with StopRequestedError."""
        self._stop.set()

    async def run(self, checkpoint: Path | None = None) -> RunState:
        """Train until the configured updates or tokens are spent; from `checkpoint` when resuming."""
        may_begin_anew = True
        while True:
            try:
                return await self._session(checkpoint)
            except CallError as error:
                may_begin_anew = may_begin_anew or self._updates_in_session > 0
                if not self._started or not may_begin_anew:
                    raise
                log.exception("a part of the run was lost; going on from the newest checkpoint")
                may_begin_anew = False  # until an update shows that it was not the work itself that killed it
                checkpoint = await asyncio.to_thread(latest_checkpoint, self.run_dir / "checkpoints")
                step = load_trainer(checkpoint).state.num_updates if checkpoint else -1
                await asyncio.to_thread(self.on_rollback, step, error)
                self._begin_session()

    async def _session(self, checkpoint: Path | None) -> RunState:
        try:
            with self.doing.during("start"):
                await _race(self._start(checkpoint), self._stop_asked())
            self.schedule.forget(after=self.state.num_updates)  # these come again, otherwise
            self._started = True
            await _race(self._train(checkpoint), self.parts.watch(), self.scaling.watch(), self._stop_asked())
            return self.state
        except _StopAsked:
            raise StopRequestedError(await self._save_at_stop()) from None
        finally:
            with self.doing.during("close"):
                await self.parts.close()

    async def _start(self, checkpoint: Path | None) -> None:
        await self.parts.start()
        if checkpoint is not None:
            await self._restore(checkpoint)

    async def _train(self, checkpoint: Path | None) -> None:
        if self.pace is not None:
            self.pace.started()
            await self.figures.begin()
            await self._train_and_evaluate()
            return
        if checkpoint is None:
            await self._evaluate_and_wait()
        else:
            self.evaluations.resume()
            await self.figures.begin()
        if self.evaluations.due(self.state.num_updates):
            await self._evaluate_and_wait()  # the run ended between this checkpoint and its evaluation
        await self._train_and_evaluate()
        await self._save_once()
        if self.evaluations.newest != self.state.num_updates:
            await self._evaluate_and_wait()
        with self.doing.during("export"):
            await self._export()

    async def _train_and_evaluate(self) -> None:
        """All updates, and the evaluations between them."""

        async def updates() -> None:
            await self._updates()
            await self.evaluations.finish()

        await _race(updates(), self.admission.run(), self.evaluations.run())

    async def _updates(self) -> None:
        while True:
            if self.pace is not None:
                await self.pace.before_update()
            if self.state.num_updates >= self.config.num_updates:
                return
            if self._stop.is_set():
                raise _StopAsked
            started = time.monotonic()
            trees = await self.clock.time("wait_for_trees", self.admission.take())
            if not trees:
                return
            self._between_updates.clear()
            await self._update(trees, started)
            self._updates_in_session += 1
            self._between_updates.set()
            every = self.config.checkpoint.every_updates
            if every and self.state.num_updates % every == 0:
                await self.clock.time("checkpoint", self._save_once())
            if self.evaluations.due(self.state.num_updates):
                spent = self.admission.rounds.spent()  # nothing is left to train beside it
                if spent or not await self.evaluations.begin(self._moment()):
                    await self._evaluate_and_wait()
            await self._check_worth()

    async def _check_worth(self) -> None:
        """NothingToLearnError when going on is pointless; what the run has is saved before."""
        try:
            self.admission.rounds.check_worth(str(self.run_dir / "logs"))
        except NothingToLearnError:
            await self._save_once()
            raise

    async def _update(self, trees: list[RolloutTree], started: float) -> None:
        version = self.state.policy_version
        learner, predictor = self.parts.learner, self.parts.predictor
        arrivals, self.admission.arrivals = tuple(self.admission.arrivals), []
        record = UpdateRecord(
            update=self.state.num_updates + 1, policy_version=version, seed=self.config.seed, arrivals=arrivals
        )
        learned, predicted, _ = await asyncio.gather(
            self.clock.time("update", learner.update(trees, version)),
            self.clock.time("predictor", predictor.train(trees, version)),
            self._begin_record(record, trees),
        )
        updated, weights = bool(learned["learner/updated"]), None
        if updated:
            weights = await self.clock.time("gather", learner.weights(version + 1))
            delta = await self.clock.time("gather", learner.delta()) if self.config.engine.weight_delta else None
            await self.clock.time("sync", self._sync(weights, version + 1, delta))
        await self._end_record(record, weights)
        step_s = time.monotonic() - started
        finite = not learned.get("learner/skipped_steps")
        self.admission.account(trees, updated=updated, finite=finite, elapsed_s=step_s)
        metrics = tree_metrics(trees, version) | learned | predicted | await self.figures.of_update(step_s)
        self.on_metrics(self.state.num_updates, metrics, trees)
        await self.scaling.after_update(self.state.num_updates, metrics)

    async def _begin_record(self, record: UpdateRecord, trees: Sequence[RolloutTree]) -> None:
        if self.schedule.records:
            await asyncio.to_thread(self.schedule.begin, record, trees)

    async def _end_record(self, record: UpdateRecord, weights: Sequence[ray.ObjectRef] | None) -> None:
        if self.schedule.records:
            checksum = await self.parts.learner.checksum(weights) if weights is not None else ""
            predictor, taught = await asyncio.gather(self.parts.predictor.checksum(), self.parts.predictor.taught())
            await asyncio.to_thread(self.schedule.end, record, weights=checksum, predictor=predictor, taught=taught)

    async def _sync(self, weights: Sequence[ray.ObjectRef], version: int, delta: DeltaRef | None = None) -> None:
        """Generators and the predictor that reads the policy's states: nothing goes on with older weights."""
        await asyncio.gather(self.pool.update_weights(weights, version, delta), self._sync_predictor(weights, version))

    async def _sync_predictor(self, weights: Sequence[ray.ObjectRef], version: int) -> None:
        if self.config.predictor_trunk == "policy":
            serves = await self.parts.predictor.receive_weights(weights)
            assert serves == version, f"the predictor reads with version {serves}, not {version}"

    # ── evaluations ──────────────────────────────────────────────────────────────────────────────────────────────

    def _moment(self) -> Moment:
        state = self.state
        return Moment(state.num_updates, state.policy_version, state.elapsed_s, state.generated_tokens)

    async def _evaluate_and_wait(self) -> None:
        """Evaluate on all generators, while training waits."""
        await self.evaluations.finish()
        await self.evaluations.play(self._moment())
        await self.figures.begin()

    async def evaluate(self) -> dict[str, float]:
        """Held-out success of the current weights, at every temperature of `eval.temperatures`. Updates must wait."""
        await self.evaluations.finish()
        return await self.evaluations.figures(self._moment())

    # ── checkpoints ──────────────────────────────────────────────────────────────────────────────────────────────

    async def _save_once(self) -> None:
        if self._saved_updates == self.state.num_updates:
            return
        self._between_updates.clear()  # a stop waits for this checkpoint instead of beginning its own
        try:
            await self.save()
        finally:
            self._between_updates.set()

    async def save(self) -> None:
        """A checkpoint of everything, at an update boundary; trees that arrive meanwhile belong to the next one."""
        saved = self.admission.snapshot()
        async with self.checkpoints.saving(saved.state.num_updates) as folder:
            save_trainer(folder, saved)
            (folder / "learner").mkdir()
            await self.parts.learner.save(folder / "learner")
            await self.parts.predictor.save(folder / "predictor")
        self._saved_updates = saved.state.num_updates
        kept = self.checkpoints.all()
        if len(kept) == self.config.checkpoint.keep:
            self.schedule.forget(before=int(kept[0].name.partition(".")[0]))

    async def _export(self) -> None:
        """The policy as a Hugging Face folder, in place of that of an earlier end when the run went on after it."""
        target, new, old = (self.run_dir / name for name in ("policy", "policy.new", "policy.old"))
        for left_over in (new, old):
            await asyncio.to_thread(shutil.rmtree, left_over, ignore_errors=True)
        await self.parts.learner.export(new)
        if target.exists():
            target.rename(old)
        new.rename(target)
        await asyncio.to_thread(shutil.rmtree, old, ignore_errors=True)

    async def _restore(self, checkpoint: Path) -> None:
        saved = load_trainer(checkpoint)
        await asyncio.gather(
            self.parts.learner.load(checkpoint / "learner"), self.parts.predictor.load(checkpoint / "predictor")
        )
        version = saved.state.policy_version
        if version > 0:
            await self._sync(await self.parts.learner.weights(version), version)
        self.admission.restore(saved)

    async def _stop_asked(self) -> None:
        await self._stop.wait()
        try:
            async with asyncio.timeout(self.config.checkpoint.stop_within_s):
                await self._between_updates.wait()
        except TimeoutError:
            log.warning("no update boundary within checkpoint.stop_within_s: the update under way is given up")
        raise _StopAsked

    async def _save_at_stop(self) -> Path | None:
        """Save what the run has, within the limit; returns the newest checkpoint either way."""
        if self._started and self._between_updates.is_set():
            try:
                async with asyncio.timeout(self.config.checkpoint.stop_within_s):
                    await self._save_once()
            except (TimeoutError, CallError) as error:
                log.error("the last checkpoint could not be saved: %r", error)
        return self.checkpoints.newest()


class _StopAsked(Exception):
    """`stop` was called, and no update is under way."""


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
