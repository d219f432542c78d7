"""Tasks in an endless, resumable order, and rows read from JSON files with errors that name file and line."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from trace_async.types import Json, Task


class TaskIterator:
    """Endless passes over `tasks`, each in a new order that depends only on `seed` and the pass (epoch).

    A task may be made only when it is asked for. One that cannot be made is left out, and `refused` says why.
    """

    def __init__(self, tasks: Sequence[Task], *, seed: int) -> None:
        if not tasks:
            raise ValueError("TaskIterator: there are no tasks")
        self._tasks = tasks
        self._seed = seed
        self._epoch = 0
        self._position = 0
        self._held_back: list[int] = []
        self._order = self._shuffled()
        self.refused: list[str] = []
        """Why tasks that were drawn are left out; whoever reads it clears it."""

    def take(self, n: int) -> list[Task]:
        """Return the next `n` tasks; every task comes once per epoch."""
        drawn: list[int] = []
        while len(drawn) < n:
            if self._position == len(self._order):
                self._next_epoch([])
            indices = self._order[self._position : self._position + n - len(drawn)]
            self._position += len(indices)
            drawn += indices
        return self._made(drawn)

    def pool(self, n: int) -> list[Task]:
        """Return the next `n` tasks, none of them twice; all there are where there are fewer.

        A pool may need the end of one epoch and the beginning of the next. The tasks that it has from the end then come
        last in the new epoch.
        """
        n = min(n, len(self._tasks))
        ending = self._order[self._position :]
        if len(ending) >= n:
            return self.take(n)
        self._next_epoch(ending)
        self._position = n - len(ending)
        return self._made([*ending, *self._order[: self._position]])

    def find(self, task_ids: Collection[str]) -> dict[str, Task]:
        """Return id → task for those of these ids that are in the data."""
        wanted, found = set(task_ids), {}
        for index in range(len(self._tasks) if wanted else 0):
            for task in self._made([index]):
                if task.id in wanted:
                    found[task.id] = task
            if len(found) == len(wanted):
                break
        return found

    def _made(self, indices: Sequence[int]) -> list[Task]:
        made: list[Task] = []
        for index in indices:
            try:
                made.append(self._tasks[index])
            except Exception as error:  # noqa: BLE001 - somebody else's code makes it now
                self.refused.append(str(error))
        return made

    def state(self) -> dict[str, Any]:
        """Return where it stands, in plain numbers, for a checkpoint."""
        return {
            "seed": self._seed,
            "num_tasks": len(self._tasks),
            "epoch": self._epoch,
            "position": self._position,
            "held_back": self._held_back,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to another seed or data set."""
        for name, own in (("seed", self._seed), ("num_tasks", len(self._tasks))):
            if state[name] != own:
                raise ValueError(f"the checkpoint's task order has {name}={state[name]}, this run has {own}")
        self._epoch, self._position = state["epoch"], state["position"]
        self._held_back = list(state.get("held_back", []))
        self._order = self._shuffled()

    def _next_epoch(self, held_back: list[int]) -> None:
        self._epoch, self._position, self._held_back = self._epoch + 1, 0, held_back
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        """Return the order of this epoch; what was held back comes last, in its new order."""
        order = list(range(len(self._tasks)))
        Random(f"{self._seed}/{self._epoch}").shuffle(order)
        late = set(self._held_back)
        return [i for i in order if i not in late] + [i for i in order if i in late]


def read_json(path: str | Path) -> Json:
    """Read one JSON document. Raises ValueError naming the file, and the line of a syntax error."""
    return _parse(_read(path), f"{path}")


def read_rows(path: str | Path, required: Mapping[str, type | tuple[type, ...]]) -> list[dict[str, Json]]:
    """Read the objects of a JSON array or of JSON lines, each with the `required` fields of the given types.

    Raises ValueError naming the file and the line (JSON lines) or row (array).
    """
    text = _read(path)
    if text.lstrip().startswith("["):
        document = _parse(text, f"{path}")
        assert isinstance(document, list)
        rows = [(f"{path}, row {number}", row) for number, row in enumerate(document, 1)]
    else:
        # Not splitlines(): it would also split at U+2028 and the like inside a string.
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _parse(line, where)) for where, line in lines]
    if not rows:
        raise ValueError(f"{path}: no rows")
    return [_checked(row, required, where) for where, row in rows]


def _checked(row: Json, required: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Json]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
    for name, kind in required.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r} is missing; there are {', '.join(row)}")
        if not isinstance(row[name], kind):
            wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            raise ValueError(f"{where}: field {name!r} must be {wanted}, found {type(row[name]).__name__}")
    return row


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error}") from error


def _parse(text: str, where: str) -> Json:
    try:
        parsed: Json = json.loads(text)
        return parsed
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text.strip() else ""
        raise ValueError(f"{where}{line}: not JSON: {error.msg} (column {error.colno})") from error
