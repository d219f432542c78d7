"""Ctrl-C and SIGTERM: the first asks the run to stop at its next boundary, the second ends it at once."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


async def interrupted_by_signals(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; the first signal cancels it and raises KeyboardInterrupt, so that it closes what it has."""
    loop, running = asyncio.get_running_loop(), asyncio.ensure_future(work)
    with _signals(loop, running.cancel):
        try:
            return await running
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


async def run_until_stopped(work: Coroutine[Any, Any, object], stop: Callable[[], None]) -> None:
    """`work` to its end. The first signal calls `stop`, a second one raises KeyboardInterrupt.

    A spot instance, Kubernetes and Slurm send SIGTERM. Ray has a handler for it, too: ours replaces it.
    """
    loop, running = asyncio.get_running_loop(), asyncio.ensure_future(work)
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            running.cancel()
            return
        asked = True
        print("\nStopping at the next boundary, with a checkpoint; once more to stop at once.", file=sys.stderr)
        stop()

    with _signals(loop, on_signal):
        try:
            await running
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None


@contextlib.contextmanager
def _signals(loop: asyncio.AbstractEventLoop, handler: Callable[[], object]) -> Iterator[None]:
    for number in SIGNALS:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number in SIGNALS:
            loop.remove_signal_handler(number)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """Within the block, which is not in an event loop yet, SIGTERM raises KeyboardInterrupt as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
