"""Check a domain's tasks before a run: no id twice, nothing both trained on and held out, nothing that is odd.

What can be put right is put right, with a note (an id that comes twice is used once). The rest is refused before
anything starts.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar, overload

from envs import describe, load_domain
from trace_async.config import Config, ConfigError
from trace_async.env import Domain, EnvValueError
from trace_async.printable import one_line
from trace_async.rollout.values import checked_task
from trace_async.types import Split, Task

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_LOOKED_AT = 200_000
"""Tasks of a list that are all looked at before a run. Of a longer one, and of tasks that are made only when they are
asked for, a sample of LOOKED_AT is, and each of the others when it is drawn."""
LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class Splits:
    """The tasks of a domain."""

    train: Sequence[Task]
    """Those that may be trained on."""
    heldout: Sequence[Task]
    """Those for evaluations."""
    notes: tuple[str, ...] = ()
    """What was put right, in words."""


def load_splits(domain: Domain) -> Splits:
    """Return a domain's checked tasks. Raises ConfigError naming environment, split, task and what to do."""
    notes: list[str] = []
    train, heldout = (_checked_split(domain, split, notes) for split in ("train", "heldout"))
    _refuse_overlap(domain, train, heldout)
    for note in notes:
        log.warning("%s", note)
    return Splits(train, heldout, tuple(notes))


def heldout_sample(domain: Domain, tasks: Sequence[Task], count: int) -> list[Task]:
    """Return `count` of the held-out tasks, the same in every run.

    They are a sample, because a file may be sorted by difficulty. A domain whose tasks are drawn at random says so
    (`in_random_order = True`); of its tasks the first are taken.
    """
    if count >= len(tasks) or getattr(domain, "in_random_order", False):
        return list(tasks[:count])
    return [tasks[index] for index in sorted(Random(f"heldout of {len(tasks)}").sample(range(len(tasks)), count))]


def heldout_tasks(config: Config) -> dict[str, list[Task]]:
    """Return what an evaluation plays: the run's own held-out tasks ("") and those of each of `eval.sets`.

    Raises ConfigError naming the set whose environment will not do.
    """
    found: dict[str, list[Task]] = {}
    for set_name in ("", *config.eval.sets):
        try:
            domain = load_domain(config.env_of(set_name))
            found[set_name] = heldout_sample(domain, load_splits(domain).heldout, config.eval.num_tasks_of(set_name))
        except ConfigError as error:
            raise ConfigError(f"eval.sets.{set_name}: {error}" if set_name else str(error)) from error
    return found


class CheckedTasks(Sequence[Task]):
    """Tasks that are checked when they are asked for."""

    def __init__(self, where: str, tasks: Sequence[Task]) -> None:
        self._where = where
        self._tasks = tasks

    def __len__(self) -> int:
        return len(self._tasks)

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"task {index} of {len(self)}")
        return _checked(self._where, self._tasks, index)


def _checked_split(domain: Domain, split: Split, notes: list[str]) -> Sequence[Task]:
    where = f"environment {one_line(str(domain.name))}: tasks({split!r})"
    tasks: Sequence[Task] = _asked(where, lambda: domain.tasks(split))
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise ConfigError(f"{where} gives a {type(tasks).__name__} instead of a sequence of tasks")
    if not len(tasks):
        raise ConfigError(f"{where}: there are no {split} tasks")
    if not isinstance(tasks, list | tuple) or len(tasks) > MAX_LOOKED_AT:
        lazy = CheckedTasks(where, tasks)
        for index in Random(0).sample(range(len(tasks)), min(LOOKED_AT, len(tasks))):
            lazy[index]
        return lazy
    unique: dict[str, Task] = {}
    for index in range(len(tasks)):
        task = _checked(where, tasks, index)
        unique.setdefault(task.id, task)
    repeated = len(tasks) - len(unique)
    if repeated:
        notes.append(f"{where}: {repeated} of {len(tasks)} tasks have an id that another one has; each id is used once")
    return list(unique.values())


def _checked(where: str, tasks: Sequence[Task], index: int) -> Task:
    task = _asked(f"{where}[{index}]", lambda: tasks[index])
    try:
        return checked_task(task)
    except EnvValueError as error:
        name = f" (task {one_line(str(task.id))})" if isinstance(task, Task) else ""
        raise ConfigError(f"{where}[{index}]{name}: {error}") from error


def _refuse_overlap(domain: Domain, train: Sequence[Task], heldout: Sequence[Task]) -> None:
    if not all(isinstance(tasks, list) for tasks in (train, heldout)):
        return
    name = one_line(str(domain.name))
    ids = {task.id for task in train}
    both = [task for task in heldout if task.id in ids]
    if both:
        raise ConfigError(
            f"environment {name}: {len(both)} of {len(heldout)} held-out tasks are also trained on, such as "
            f"{one_line(both[0].id)}: an evaluation on them would show what was learnt by heart"
        )
    data = {_data(task) for task in train}
    # Data that most tasks share (a level) do not tell which task it is; data of its own do.
    if len(data) < len(train) / 2:
        return
    both = [task for task in heldout if task.data and _data(task) in data]
    if both:
        raise ConfigError(
            f"environment {name}: {len(both)} of {len(heldout)} held-out tasks hold the data of a task that is trained "
            f"on, such as {one_line(both[0].id)}: an evaluation on them would show what was learnt by heart"
        )


def _data(task: Task) -> str:
    return json.dumps([task.domain, task.data], sort_keys=True)


def _asked(where: str, call: Callable[[], T]) -> T:
    try:
        return call()
    except ConfigError:
        raise
    except Exception as error:  # somebody else's code
        raise ConfigError(f"{where} raised {describe(error)}") from error
