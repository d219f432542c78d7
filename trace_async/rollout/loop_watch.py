"""Find out which environment holds up the event loop that all prompts of a process share.

A method that waits with `await` lets the others go on. One that calls `time.sleep` or `requests.get` lets nobody: all
prompts of the process, its heartbeats and its limits stand still until it returns, and no time-out can end it.

On a busy machine the loop's thread also waits for a core. That is nobody's fault and does not count, where the kernel
says how long it was (Linux: /proc/thread-self/schedstat).
"""

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")

SLOW_S = 0.5
"""A method that holds the loop for so long is reported. Building a small index takes less, a request more."""


class LoopWatch:
    """Measures every stretch that environments keep the loop to themselves.

    `on_slow(where, seconds)` is called in the loop after a stretch of at least `slow_s`. `patrol` also looks from
    outside, since a stretch that never ends is never measured.
    """

    def __init__(self, on_slow: Callable[[str, float], None], *, slow_s: float = SLOW_S) -> None:
        self._on_slow = on_slow
        self._slow_s = slow_s
        self._core_wait: _CoreWait | None = None
        self._held: tuple[str, float, float] | None = None

    async def drive(self, where: str, awaitable: Awaitable[T]) -> T:
        """Return the answer of `awaitable`, every stretch of which is measured."""
        return await _Driven(self, where, awaitable)

    def enter(self, where: str) -> None:
        """Note that `where` has the loop to itself from now on."""
        if self._core_wait is None:
            self._core_wait = _CoreWait()  # here, in the thread of the loop
        self._held = (where, time.monotonic(), self._core_wait.seconds())

    def leave(self) -> None:
        """Note that it has not any more, and report a slow stretch."""
        held, self._held = self._held, None
        if held is not None and (held_s := self._held_s(held)) >= self._slow_s:
            self._on_slow(held[0], held_s)

    def _held_s(self, held: tuple[str, float, float]) -> float:
        """Return the seconds since it was entered, but for those in which the thread could have run and had no core."""
        assert self._core_wait is not None
        return time.monotonic() - held[1] - (self._core_wait.seconds() - held[2])

    def patrol(self, stuck_s: float, on_stuck: Callable[[str, float], None]) -> None:
        """From a thread of its own, call `on_stuck(where, seconds)` once for each stretch longer than `stuck_s`."""
        reported: tuple[str, float, float] | None = None

        def look() -> None:
            nonlocal reported
            while True:
                time.sleep(min(1.0, stuck_s / 4))
                held = self._held
                if held is not None and held is not reported and (held_s := self._held_s(held)) > stuck_s:
                    reported = held
                    on_stuck(held[0], held_s)

        threading.Thread(target=look, name="loop-watch", daemon=True).start()


class _CoreWait:
    """How long the thread that made this has waited for a core so far; 0 for ever where the kernel does not tell."""

    def __init__(self) -> None:
        try:
            self._file: int | None = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        except OSError:
            self._file = None

    def seconds(self) -> float:
        if self._file is None:
            return 0.0
        try:
            return int(os.pread(self._file, 100, 0).split()[1]) / 1e9  # time on a core, time waiting for one, turns
        except (OSError, ValueError, IndexError):  # the thread is gone, or the kernel keeps no such figures
            return 0.0

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)


class _Driven(Awaitable[T]):
    """Hands everything on between a coroutine and the loop, and measures what lies between two waits."""

    def __init__(self, watch: LoopWatch, where: str, awaitable: Awaitable[T]) -> None:
        self._watch = watch
        self._where = where
        self._awaitable = awaitable

    def __await__(self) -> Generator[Any, Any, T]:
        inner: Any = self._awaitable.__await__()
        resume, value = inner.send, None
        while True:
            self._watch.enter(self._where)
            try:
                waits_for = resume(value)
            except StopIteration as end:
                answer: T = end.value
                return answer
            finally:
                self._watch.leave()
            try:
                value = yield waits_for
                resume = inner.send
            except GeneratorExit:
                # Nobody waits for it any more. What was collected with it may be closed already, which close() allows.
                inner.close()
                raise
            except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001 - handed on as it is
                resume, value = inner.throw, error
