"""Run the methods of an environment that blocks off the event loop, each call on a thread of its own.

Threads are daemons and made per call: one that cannot be stopped (it sleeps inside a C function) then costs a thread
and nothing else. It keeps no slot of a pool, and no process waits for it at its end.
"""

import asyncio
import ctypes
import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

log = logging.getLogger(__name__)
T = TypeVar("T")

STOP_GRACE_S = 2.0


class OutranLimitError(Exception):
    """A call did not end within its limit; ours, so that no TimeoutError of an environment is taken for it."""


class CallStoppedError(BaseException):
    """Raised inside a thread whose call outran its limit. Not an Exception, so that `except Exception` lets it pass."""


class CallThreads:
    """Runs at most `at_once` calls. Further ones wait for their turn, which does not count against their limit."""

    def __init__(self, at_once: int = 64) -> None:
        self._free = asyncio.Semaphore(at_once)
        self.num_abandoned = 0

    async def run(self, call: Callable[[], Awaitable[T] | T], limit_s: float) -> T:
        """Return the answer of `call`, awaited in its thread's own loop. Raises OutranLimitError after `limit_s`."""
        async with self._free:
            job = _Job(call, asyncio.get_running_loop())
            try:
                await asyncio.wait({job.answer}, timeout=limit_s)
            finally:
                ended = job.answer.done()
                if not ended:
                    await self._stop(job)
            if not ended:
                raise OutranLimitError
            answer: T = job.answer.result()
            return answer

    async def _stop(self, job: "_Job") -> None:
        for stop, grace_s in ((job.cancel, STOP_GRACE_S / 4), (job.interrupt, STOP_GRACE_S)):
            stop()
            await asyncio.wait({job.answer}, timeout=grace_s)
            if job.answer.done():
                job.answer.exception()  # looked at, so that nobody complains of it
                return
        job.answer.cancel()
        self.num_abandoned += 1
        log.error(
            "a blocking call of an environment could not be stopped: %d threads are left behind so far",
            self.num_abandoned,
        )


class _Job:
    """One call on one thread; `answer` belongs to the loop that asked."""

    def __init__(self, call: Callable[[], Any], asked_by: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._asked_by = asked_by
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[Any] | None = None
        self.answer: asyncio.Future[Any] = asked_by.create_future()
        self._thread = threading.Thread(target=self._work, name="environment", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            result, error = asyncio.run(self._main()), None
        except BaseException as raised:  # noqa: BLE001 - somebody else's code; it goes to who asked
            result, error = None, raised
        # These would end the loop of whoever asked, or be taken for its own cancellation.
        if isinstance(
            error, CallStoppedError | asyncio.CancelledError | SystemExit | KeyboardInterrupt | GeneratorExit
        ):
            error = RuntimeError(f"the call ended with {type(error).__name__}")
        if not self._asked_by.is_closed():
            self._asked_by.call_soon_threadsafe(self._settle, result, error)

    async def _main(self) -> Any:
        self._loop, self._task = asyncio.get_running_loop(), asyncio.current_task()
        result = self._call()
        return await result if isinstance(result, Awaitable) else result

    def _settle(self, result: Any, error: BaseException | None) -> None:
        if self.answer.done():
            return
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)

    def cancel(self) -> None:
        """End what waits with `await`."""
        if self._loop is not None and self._task is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._task.cancel)

    def interrupt(self) -> None:
        """Break off what computes in Python; a call inside C goes on until it returns."""
        if self._thread.ident is not None and self._thread.is_alive():
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(CallStoppedError)
            )
