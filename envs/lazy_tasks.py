"""Splits of tasks: held out as a sample, or made only when they are asked for, so that a large one costs nothing."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import overload

from trace_async.config import ConfigError
from trace_async.types import Task


def check_shares(setting: str, shares: Mapping[str, float], levels: Sequence[str]) -> dict[str, float]:
    """Return `shares` of `levels`. Raises ConfigError naming the setting when nothing can be drawn by them."""
    if set(shares) - set(levels) or min(shares.values()) < 0 or not sum(shares.values()) > 0:
        raise ConfigError(f"env.args.{setting}={dict(shares)}: positive shares of {', '.join(levels)}")
    return dict(shares)


def hold_out(tasks: Sequence[Task], count: int) -> tuple[list[Task], list[Task]]:
    """Return (train, held out), both in their order. `count` tasks are held out, the same in every run.

    A sample and not the last ones: files are often sorted, by difficulty or by source.
    """
    chosen = set(Random(0).sample(range(len(tasks)), count))
    return (
        [task for index, task in enumerate(tasks) if index not in chosen],
        [task for index, task in enumerate(tasks) if index in chosen],
    )


class LazyTasks(Sequence[Task]):
    """`make(i)` makes task i of `count`, the same one each time."""

    def __init__(self, count: int, make: Callable[[int], Task]) -> None:
        self._count = count
        self._make = make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Task: ...
    @overload
    def __getitem__(self, index: slice) -> list[Task]: ...
    def __getitem__(self, index: int | slice) -> Task | list[Task]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(f"task {index} of {self._count}")
        return self._make(index % self._count)
