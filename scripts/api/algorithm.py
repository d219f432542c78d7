"""TraceAlgorithm: a run that goes on update by update, as its owner asks.

The trainer's loop lives in a thread of its own and waits before every update until `train` is called; generation goes
on meanwhile as far as `actors.max_staleness` allows. All methods are called from one thread; none is a coroutine, so
they work in a script, in a notebook and in a Ray Tune trial alike.
"""

import asyncio
import concurrent.futures
import contextlib
import shutil
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from scripts.api.config import Callbacks, TraceConfig
from trace_async.config import Config, ConfigError, config_to_yaml, load_config
from trace_async.run.session import at_work, claim_new
from trace_async.trees.tree import RolloutTree

T = TypeVar("T")
CHECKPOINT_CONFIG = "config.yaml"
STOP_LIMIT_S = 120.0


class AlgorithmStoppedError(RuntimeError):
    """The algorithm cannot do that any more; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """One update."""

    update: int
    """Its number, from 1."""
    policy_version: int
    """Of the weights after it; the same as before when no prompt had both outcomes."""
    metrics: Mapping[str, float]
    """All figures of the update by name, as in metrics.jsonl (`train/reward`, `learner/loss`, `time/step_s`, …)."""
    generated_tokens: int
    """Of the whole run so far, evaluation apart."""
    done: bool
    """No update is left: `num_updates` are made or `max_generated_tokens` are spent."""


class _OneByOne:
    """The trainer's pace: one update for every call of `one_update`. Lives in the loop."""

    def __init__(self, ready: concurrent.futures.Future[None]) -> None:
        self._permits = asyncio.Semaphore(0)
        self._ready = ready
        self._made: asyncio.Queue[tuple[int, Mapping[str, float], Sequence[RolloutTree]]] = asyncio.Queue()

    def started(self) -> None:
        if not self._ready.done():  # it may start anew after a rollback
            self._ready.set_result(None)

    async def before_update(self) -> None:
        await self._permits.acquire()

    def made(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        self._made.put_nowait((step, metrics, trees))

    async def one_update(self) -> tuple[int, Mapping[str, float], Sequence[RolloutTree]]:
        self._permits.release()
        return await self._made.get()


class TraceAlgorithm:
    """Made by `TraceConfig.build`. Use it as a context manager, or call `stop` at the end.

    Raises ConfigError when a setting is wrong, and what ended the run otherwise, from whichever method is called next.
    """

    def __init__(
        self,
        config: Config,
        *,
        callbacks: Callbacks | None = None,
        run_dir: str | Path | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        from scripts.commands.train import check_run, ensure_policy

        check_run(config)
        self.config = config
        self.callbacks = callbacks or Callbacks()
        wanted = Path(run_dir) if run_dir is not None else Path(config.output_dir) / config.name
        self.run_dir = claim_new(wanted.absolute(), config_to_yaml(config))
        self._policy_path = ensure_policy(config)
        self._started_ray = False
        self._ended = False
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(at_work(self.run_dir))
        self._start(checkpoint)

    def __repr__(self) -> str:
        state = "stopped" if self._ended else f"after {self._trainer.state.num_updates} updates"
        return f"TraceAlgorithm({self.run_dir}, {state})"

    # ── what its owner asks ──────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> UpdateResult:
        """Make one update. AlgorithmStoppedError when none is left."""
        if self._is_done():
            raise AlgorithmStoppedError(
                f"all {self.config.num_updates} updates are made (or the run's tokens are spent); raise num_updates"
            )
        step, metrics, trees = self._ask(self._pace.one_update())
        state = self._trainer.state
        result = UpdateResult(
            update=step,
            policy_version=state.policy_version,
            metrics=dict(metrics),
            generated_tokens=state.generated_tokens,
            done=self._is_done(),
        )
        if self.callbacks.on_tree is not None:
            for tree in trees:
                self.callbacks.on_tree(tree)
        if self.callbacks.on_update is not None:
            self.callbacks.on_update(result)
        return result

    def evaluate(self) -> dict[str, float]:
        """Held-out success of the current weights (`heldout/…`), which is also kept in the run's figures."""
        metrics = self._ask(self._trainer.evaluate())
        self._recorder.on_metrics(self._trainer.state.num_updates, metrics, [])
        if self.callbacks.on_evaluate is not None:
            self.callbacks.on_evaluate(metrics)
        return metrics

    def save(self, path: str | Path) -> Path:
        """Write a checkpoint that `from_checkpoint` goes on from into the new or empty folder `path`."""
        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(f"{target}: a checkpoint is written into a new or empty folder")
        self._ask(self._trainer.save())
        newest = self._trainer.checkpoints.newest()
        assert newest is not None, "it was just saved"
        shutil.copytree(newest, target, dirs_exist_ok=True)
        (target / CHECKPOINT_CONFIG).write_text(config_to_yaml(self.config), encoding="utf-8")
        return target

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, *, overrides: Sequence[str] = (), callbacks: Callbacks | None = None
    ) -> "TraceAlgorithm":
        """Go on from what `save` wrote, in a run folder of its own; `overrides` as on the command line."""
        folder = Path(path).absolute()
        if not (folder / CHECKPOINT_CONFIG).is_file():
            raise ConfigError(f"{folder}: no checkpoint of an algorithm there ({CHECKPOINT_CONFIG} is missing)")
        return cls(load_config(folder / CHECKPOINT_CONFIG, overrides), callbacks=callbacks, checkpoint=folder)

    def scale(self, num_generators: int) -> None:
        """Have so many generators from now on; those that leave hand their requests on."""
        self._ask(self._trainer.pool.resize(num_generators))

    def export(self, path: str | Path) -> Path:
        """Write the policy as a Hugging Face folder."""
        self._ask(self._trainer.parts.learner.export(Path(path).absolute()))
        return Path(path)

    def stop(self) -> None:
        """End all processes of the run; may be called twice. Nothing is saved: call `save` before."""
        if self._ended:
            return
        self._ended = True
        done = self._is_done()
        self._loop.call_soon_threadsafe(self._task.cancel)
        concurrent.futures.wait([self._main], STOP_LIMIT_S)
        self._thread.join(STOP_LIMIT_S)
        self._shut("FINISHED" if done else "KILLED")

    def __enter__(self) -> "TraceAlgorithm":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ── the loop's thread ────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, checkpoint: Path | None) -> None:
        import ray

        from actors.ray_cluster import start_ray
        from actors.trainer import Trainer
        from scripts.commands.recording import Recorder
        from trace_async.run.placement import place
        from trace_async.run.state import load_trainer

        first = load_trainer(checkpoint).state if checkpoint else None
        self._recorder = Recorder(self.config, self.run_dir, self._policy_path, resume=False, first=first)
        if ray.is_initialized():  # a Tune trial and a notebook may have their own
            placed = place(self.config, ray.cluster_resources().get("GPU", 0.0))
        else:
            placed = start_ray(self.config)
            self._started_ray = True
        self._main: concurrent.futures.Future[None] = concurrent.futures.Future()
        ready: concurrent.futures.Future[None] = concurrent.futures.Future()

        async def live() -> None:
            self._loop = asyncio.get_running_loop()
            task = asyncio.current_task()
            assert task is not None
            self._task = task
            self._pace = _OneByOne(ready)
            self._trainer = Trainer(
                placed,
                self.run_dir,
                self._policy_path,
                self._on_metrics,
                on_rollback=self._recorder.on_rollback,
                on_resize=self._recorder.on_resize,
                pace=self._pace,
            )
            self._recorder.on_tasks(self._trainer.train_tasks, self._trainer.heldout_tasks)
            await self._trainer.run(checkpoint)

        def main() -> None:
            try:
                asyncio.run(live())
                self._main.set_result(None)
            except BaseException as error:  # noqa: BLE001  (handed to the thread that asks next)
                self._main.set_exception(error)

        self._thread = threading.Thread(target=main, name="trace_async", daemon=True)
        self._thread.start()
        try:
            self._first_of(ready)
        except BaseException:
            self._ended = True
            self._shut("FAILED")
            raise

    def _on_metrics(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        self._recorder.on_metrics(step, metrics, trees)
        if trees:  # an evaluation that the run makes by itself has none
            self._pace.made(step, metrics, trees)

    def _ask(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work` in the loop; raises what ended the run, if that comes first."""
        if self._ended or self._main.done():
            work.close()
            self._first_of()
        return self._first_of(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _first_of(self, asked: "concurrent.futures.Future[T] | None" = None) -> Any:
        if self._ended:
            raise AlgorithmStoppedError(f"{self.run_dir}: the algorithm was stopped")
        waiting: list[concurrent.futures.Future[Any]] = [self._main, *([asked] if asked is not None else [])]
        concurrent.futures.wait(waiting, return_when=concurrent.futures.FIRST_COMPLETED)
        if asked is not None and asked.done():
            return asked.result()
        self._main.result()
        raise AlgorithmStoppedError(f"{self.run_dir}: the run has ended")

    def _is_done(self) -> bool:
        return self._trainer.admission.rounds.spent()

    def _shut(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        import ray

        self._recorder.finish(status)
        self._closing.close()
        if self._started_ray:
            ray.shutdown()


__all__ = ["AlgorithmStoppedError", "TraceAlgorithm", "TraceConfig", "UpdateResult"]
