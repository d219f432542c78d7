"""A limit on a call that stands still while the call waits for room, such as one of few processes.

    async with waits_for_room():
        await slots.acquire()

Every clock starts when the work does: waiting behind others is no failure of who waits.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

T = TypeVar("T")


class LimitClock:
    """Seconds in which a call worked."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._waited_s = 0.0
        self._waits_since: float | None = None

    @property
    def waits(self) -> bool:
        return self._waits_since is not None

    def pause(self) -> None:
        self._waits_since = time.monotonic()

    def resume(self) -> None:
        assert self._waits_since is not None
        self._waited_s += time.monotonic() - self._waits_since
        self._waits_since = None

    def worked_s(self) -> float:
        """Return the seconds since the start in which it did not wait for room."""
        now = time.monotonic() if self._waits_since is None else self._waits_since
        return now - self._started - self._waited_s


_CLOCK: ContextVar[LimitClock | None] = ContextVar("limit_clock", default=None)


@asynccontextmanager
async def waits_for_room() -> AsyncIterator[None]:
    """Let the limit of the call that this runs in stand still inside. Without such a limit it does nothing."""
    clock = _CLOCK.get()
    if clock is None or clock.waits:
        yield
        return
    clock.pause()
    try:
        yield
    finally:
        clock.resume()


def begun(work: Coroutine[Any, Any, T]) -> "tuple[asyncio.Task[T], LimitClock]":
    """Start `work` in a task. Returns the task and its clock, which `waits_for_room` finds in it."""
    clock = LimitClock()
    token = _CLOCK.set(clock)
    try:
        return asyncio.ensure_future(work), clock
    finally:
        _CLOCK.reset(token)


async def wait_for_work(task: "asyncio.Task[Any]", clock: LimitClock, limit_s: float) -> None:
    """Wait until `task` has ended, or has worked for `limit_s` seconds."""
    # While it waits for room it uses up no time: look again after `limit_s`.
    while not task.done() and (left_s := limit_s - clock.worked_s()) > 0:
        await asyncio.wait({task}, timeout=limit_s if clock.waits else left_s)
