"""Write a run's figures for TensorBoard, to `<run_dir>/tensorboard`: `tensorboard --logdir runs`."""

from collections.abc import Sequence
from pathlib import Path

from trace_async.tracking.records import DatasetRecord, RolloutRecord
from trace_async.tracking.tracker import Artifact, RunStatus, TrackedRun
from trace_async.types import Point

FOLDER = "tensorboard"


class TensorBoardTracker:
    """Writes figures as scalars and rollouts as texts. All else stays in the run's directory."""

    def __init__(self, run: TrackedRun) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "tracking.backends names tensorboard, which is not installed: pip install 'trace-async[tensorboard]'"
            ) from error
        last = max((point.step for point in run.kept), default=-1)
        # Points beyond the checkpoint that a run goes on from come again; TensorBoard hides the old ones.
        self._writer = SummaryWriter(str(run.run_dir / FOLDER), purge_step=last + 1)

    def log(self, point: Point) -> None:
        for name, value in point.metrics.items():
            self._writer.add_scalar(name, value, point.step, walltime=point.time)
        self._writer.flush()

    def keep(self, artifact: Artifact) -> None:
        return None

    def show(self, rollouts: Sequence[RolloutRecord]) -> None:
        for number, rollout in enumerate(rollouts):
            turns = [part for turn in rollout.turns for part in (turn.said, turn.observation)]
            parts = [f"task {rollout.task_id}, {rollout.kind}, reward {rollout.reward:g}", rollout.prompt, *turns]
            # Markdown: as code blocks, so that what a model wrote is shown and not obeyed.
            text = "\n\n".join("    " + part.replace("\n", "\n    ") for part in parts if part)
            self._writer.add_text(f"rollouts/{number}", text, rollout.update)

    def use(self, datasets: Sequence[DatasetRecord]) -> None:
        return None

    def keep_policy(self, folder: Path) -> None:
        return None

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        return None

    def finish(self, status: RunStatus) -> None:
        self._writer.close()
