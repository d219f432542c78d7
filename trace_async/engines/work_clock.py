"""Limit an engine's working time without counting the time in which we hold it ourselves."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
MIN_WAIT_S = 0.05


class WorkClock:
    """Counts the seconds in which the engine may work. It stands still during weight updates.

    Example: a request with a limit of 60 s starts, 10 s later an update holds the engine for 30 s. The request times
    out 90 s after its start.
    """

    def __init__(self) -> None:
        self._num_holds = 0
        self._held_since = 0.0
        self._held_s = 0.0

    def now(self) -> float:
        """Return the seconds since an arbitrary zero."""
        return (self._held_since if self._num_holds else time.monotonic()) - self._held_s

    @contextmanager
    def held(self) -> Iterator[None]:
        """Stand still inside the block. Blocks may overlap."""
        if not self._num_holds:
            self._held_since = time.monotonic()
        self._num_holds += 1
        try:
            yield
        finally:
            self._num_holds -= 1
            if not self._num_holds:
                self._held_s += time.monotonic() - self._held_since

    async def until_done(self, task: asyncio.Future[T], limit_s: float) -> None:
        """Wait until `task` has ended. Raises TimeoutError after `limit_s` seconds of this clock; `task` runs on."""
        deadline = self.now() + limit_s
        while not task.done():
            await asyncio.wait({task}, timeout=max(MIN_WAIT_S, deadline - self.now()))
            if not task.done() and self.now() >= deadline:
                raise TimeoutError
