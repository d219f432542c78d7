"""The schedule of a run: what each update was given, so that it can be made again (`trace-async replay`).

    RUN/schedule/
      000012.trees.jsonl   the trees of update 12 in the order in which the learner was given them, every one
      000012.taught.safetensors    with predictor.trunk=policy: what they taught the predictor, which no tree holds
      000012.json          the version and seed of the update; which prompts arrived since the one before it, when and
                           in which order; checksums of the weights that came out

Trees hold the versions that wrote their tokens. The files of an update are written while it is made, so they are there
when it ends the process; the checksums come afterwards. Once there are `checkpoint.keep` checkpoints, the updates since
the oldest of them are kept: an older one could not be made again.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from trace_async.config import ConfigError
from trace_async.run.checkpoint import CheckpointStore, check
from trace_async.tracking.log import write_whole
from trace_async.trees.io import read_trees, write_trees
from trace_async.trees.tree import RolloutTree

log = logging.getLogger(__name__)
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A prompt that has ended."""

    ticket: int
    """Its number in the run."""
    task_id: str
    at: float
    """Unix seconds."""
    policy_version: int
    """The learner's version at that moment."""
    fate: str
    """`kept`, `filtered`, or the kind of loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateRecord:
    """One update of the run."""

    update: int
    """Its number; the first is 1."""
    policy_version: int
    """The learner's version before it."""
    seed: int
    """The run's seed, from which learner and predictor draw all that is random in an update."""
    arrivals: tuple[Arrival, ...]
    """What has ended since the update before, in order. The update's trees are among these and those of before."""
    weights: str = ""
    """Checksum of the policy's weights after it, as they were sent; empty where no weight changed or none was sent."""
    predictor: str = ""
    """Checksum of the predictor's weights after it; empty where the update has not ended."""

    @property
    def ended(self) -> bool:
        return bool(self.predictor)


class Schedule:
    """The schedule of one run. What cannot be written is told once, and the run goes on."""

    def __init__(self, run_dir: Path, *, records: bool = True) -> None:
        """`records` false: nothing is added to what is there."""
        self.folder = run_dir / "schedule"
        self.records = records
        self._failed = False

    def begin(self, record: UpdateRecord, trees: Sequence[RolloutTree]) -> None:
        """Keep what an update is given."""
        try:
            write_trees(self._trees(record.update), trees)
            self._write(record)
        except (OSError, ValueError) as error:  # of a tree that cannot be written
            self._tell(error)

    def end(
        self, record: UpdateRecord, *, weights: str, predictor: str, taught: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Keep the checksums of what came out of it, and what its trees `taught` that they do not hold."""
        try:
            if taught is not None:
                write_whole(self._taught(record.update), save(dict(taught)))
            self._write(replace(record, weights=weights, predictor=predictor))
        except OSError as error:
            self._tell(error)

    def forget(self, *, before: int = 0, after: int | None = None) -> None:
        """Drop updates up to `before`, which cannot be made again, and those after `after`, which come again."""
        for number in self.updates():
            if number <= before or (after is not None and number > after):
                self._record(number).unlink(missing_ok=True)
                self._trees(number).unlink(missing_ok=True)
                self._taught(number).unlink(missing_ok=True)

    def updates(self) -> list[int]:
        """Return the numbers of the updates that are kept, in order."""
        return sorted(int(path.stem) for path in self.folder.glob("*.json") if path.stem.isdigit())

    def read(self, number: int) -> UpdateRecord:
        """Return the record of an update. Raises ConfigError, which names the file."""
        path = self._record(number)
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError(f"not in format {FORMAT}, the one this version reads")
            arrivals = tuple(Arrival(**arrival) for arrival in content.pop("arrivals"))
            return UpdateRecord(**content, arrivals=arrivals)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}: no record of an update ({error})") from error

    def read_trees(self, number: int) -> list[RolloutTree]:
        """Return the trees that the update was given, in order. Raises ConfigError, which names the file."""
        try:
            return list(read_trees(self._trees(number)))
        except (OSError, ValueError) as error:
            raise ConfigError(str(error)) from error

    def read_taught(self, number: int) -> dict[str, np.ndarray] | None:
        """Return what the update's trees taught the predictor; None: nothing that they do not hold.

        Raises ConfigError, which names the file.
        """
        path = self._taught(number)
        try:
            return load_file(path) if path.is_file() else None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: not what an update taught the predictor ({error})") from error

    def _record(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def _trees(self, number: int) -> Path:
        return self.folder / f"{number:06d}.trees.jsonl"

    def _taught(self, number: int) -> Path:
        return self.folder / f"{number:06d}.taught.safetensors"

    def _write(self, record: UpdateRecord) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self._record(record.update), json.dumps({"format": FORMAT, **asdict(record)}) + "\n")

    def _tell(self, error: Exception) -> None:
        if not self._failed:
            log.warning("an update could not be kept for trace-async replay under %s: %s", self.folder, error)
        self._failed = True


@dataclass(frozen=True, slots=True)
class Plan:
    """How an update is made again: from `checkpoint` (None: the run's beginning), then these updates."""

    checkpoint: Path | None
    updates: tuple[int, ...]


def plan_replay(run_dir: Path, update: int) -> Plan:
    """Plan the way from the newest checkpoint before `update` to it. Raises ConfigError when something is gone."""
    kept = Schedule(run_dir).updates()
    saved = CheckpointStore(run_dir / "checkpoints", keep=1).all()
    checkpoints = {int(path.name.partition(".")[0]): path for path in saved}
    if update not in kept:
        there = f"{kept[0]} to {kept[-1]} are there" if kept else "none is there"
        raise ConfigError(
            f"--update {update}: {run_dir} holds no record of it; {there}. Updates are kept with "
            "tracking.record_schedule=true, since the oldest checkpoint (checkpoint.keep)"
        )
    start = max((number for number in checkpoints if number < update), default=0)
    missing = set(range(start + 1, update)) - set(kept)
    if missing:
        raise ConfigError(
            f"--update {update}: the updates from {start} on are needed to make it again, and that of update "
            f"{min(missing)} is not kept in {run_dir / 'schedule'}; the next one that can be made again is the first "
            f"after a checkpoint: {', '.join(map(str, _first_ones(checkpoints, kept))) or 'none'}"
        )
    checkpoint = check(checkpoints[start]) if start else None
    return Plan(checkpoint, tuple(range(start + 1, update + 1)))


def _first_ones(checkpoints: dict[int, Path], kept: Sequence[int]) -> Iterator[int]:
    return (number + 1 for number in sorted(checkpoints) if number + 1 in kept)
