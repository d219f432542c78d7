"""A run's figures on their way: to MLflow and metrics.jsonl, to the live table, trees to disk."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from actors.gauges import Gauges
from scripts.viewer.source import RunSource, decoder
from trace_async.config import Config
from trace_async.method.market import DECISIONS_LOG
from trace_async.run.scaling import SIZES_FILE, Size
from trace_async.run.state import RunState
from trace_async.tracking.log import read_metrics, write_whole
from trace_async.tracking.mlflow_tracker import saved_run_id
from trace_async.tracking.progress import Progress
from trace_async.tracking.records import dataset_record, sample_rollouts
from trace_async.tracking.run_log import RunLog
from trace_async.tracking.tracker import RunStatus
from trace_async.trees.io import tree_files, trees_path, write_trees
from trace_async.trees.text import Decode
from trace_async.trees.tree import RolloutTree
from trace_async.types import Task

log = logging.getLogger(__name__)


DECISIONS_FILE = "decisions.txt"


def progress_of(config: Config, run_dir: Path, first: RunState | None) -> Progress:
    """The display of a run that begins, or of one that goes on from `first`, with what its updates took until then."""
    progress = Progress(
        config.num_updates,
        token_budget=config.max_generated_tokens,
        first_update=first.num_updates if first else 0,
        tokens_before=first.generated_tokens if first else 0,
        # With more generators one is lent to an evaluation, and training goes on beside it.
        eval_every=config.eval.every_updates if config.actors.most_generators == 1 else 0,
    )
    if first is not None:
        for point in read_metrics(run_dir):
            if point.step <= first.num_updates:
                progress.recall(point.step, point.metrics)
    return progress


class Recorder:
    """What a trainer reports to. `policy_path`: the folder of the start policy. `first`: the state of the checkpoint
    that a resumed run goes on from. `progress`: the display, where one is shown already."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        policy_path: Path,
        *,
        resume: bool,
        first: RunState | None,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self._policy_path = policy_path
        # A run that was killed before its first checkpoint starts anew, so none of its points stay.
        step = (first.num_updates if first else -1) if resume else None
        self._log = self._start_log(step)
        self.progress = progress or progress_of(config, run_dir, first)
        self._gauges = Gauges(config.name)
        self._update = first.num_updates if first else 0
        self._decisions = _Decisions(self.on_decision)
        logging.getLogger(DECISIONS_LOG).addHandler(self._decisions)

    def on_metrics(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        self._update = step
        self._log.log(metrics, step)
        self.progress.update(step, metrics)
        self._gauges.show(step, metrics)
        if trees and self.config.tracking.trees_per_artifact:
            path = trees_path(self.run_dir, step)
            write_trees(path, trees[: self.config.tracking.trees_per_artifact])
            self._log.log_artifact(path, "trees")
        if trees and self.config.tracking.traces_per_update:
            count, seed = self.config.tracking.traces_per_update, self.config.seed
            self._log.log_rollouts(sample_rollouts(trees, count, self._decode, update=step, seed=seed))

    def on_tasks(self, train: Sequence[Task], heldout: Sequence[Task]) -> None:
        """What the run trains on, and what it is evaluated with."""
        name, args = self.config.env.name, self.config.env.args
        uses = (("training", train), ("evaluation", heldout))
        self._log.log_datasets([dataset_record(name, args, tasks, use) for use, tasks in uses])

    def on_rollback(self, step: int, error: BaseException) -> None:
        """The run lost a part and went back to the checkpoint of update `step`; points of later ones come again."""
        self.progress.message(f"{error}: going on from {f'update {step}' if step >= 0 else 'the beginning'}")
        self._log.finish("KILLED")
        self._log = self._start_log(step)

    def on_resize(self, size: Size) -> None:
        """The number of generators changes: said in the terminal, and kept with its reason beside the figures."""
        self.progress.message(f"after update {size.update}: {size.num_generators} generators, {size.reason}")
        self._log.log_artifact(self.run_dir / SIZES_FILE)

    def on_decision(self, words: str) -> None:
        """A rule of the method decided something about the rest of the run: said in the terminal, and kept in words."""
        line = f"after update {self._update}: {words}"
        self.progress.message(line)
        path = self.run_dir / DECISIONS_FILE
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        self._log.log_text(path.read_text(encoding="utf-8"), DECISIONS_FILE)

    def finish(self, status: RunStatus) -> None:
        logging.getLogger(DECISIONS_LOG).removeHandler(self._decisions)
        self._keep_page()
        policy = self.run_dir / "policy"
        if status == "FINISHED" and self.config.tracking.log_model and policy.is_dir():
            self._log.log_policy(policy)
        self._log.finish(status)

    def _keep_page(self) -> None:
        """Keep the viewer's page of the run's trees and curves, in its directory and as an artifact."""
        if not tree_files(self.run_dir):
            return
        page = self.run_dir / "trees.html"
        try:
            write_whole(page, RunSource(self.run_dir).page())
        except (ValueError, OSError):  # a run that ended well, or of something else, does not fail of a page about it
            log.exception("the page of the run's trees could not be written")
            return
        self._log.log_artifact(page)

    @cached_property
    def _decode(self) -> Decode:
        return decoder(self._policy_path)

    def _start_log(self, step: int | None) -> RunLog:
        run_id = None if step is None else saved_run_id(self.run_dir)
        return RunLog.start(self.config, self.run_dir, resume_run_id=run_id, resume_step=step)


class _Decisions(logging.Handler):
    """Hands on what is logged of decisions, wherever in the process they were made."""

    def __init__(self, on_decision: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._on_decision = on_decision

    def emit(self, record: logging.LogRecord) -> None:
        self._on_decision(record.getMessage())
