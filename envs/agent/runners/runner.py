"""Run an agent: a coroutine, a plain function, or a command. It knows its task and where its model is, nothing else.

Coroutines of all rollouts share one event loop in a thread of its own, so that an agent that blocks its loop stops
neither the endpoint nor the engine; plain functions get a thread each; commands a process group each.
"""

import asyncio
import contextlib
import inspect
import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from envs.agent.runners.keeper import GRACE_S, Keeper
from trace_async.env import EnvError
from trace_async.rollout.limit_clock import waits_for_room
from trace_async.types import Json

log = logging.getLogger(__name__)

_KEPT_OUTPUT = 1_000_000  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Where an agent finds its model."""

    base_url: str
    """Ends with /v1."""
    api_key: str


def access_variables(access: Access) -> dict[str, str]:
    """Return the environment variables by which clients find their model."""
    return {
        "OPENAI_BASE_URL": access.base_url,
        "OPENAI_API_KEY": access.api_key,
        "ANTHROPIC_BASE_URL": access.base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": access.api_key,
    }


class AgentFailed(Exception):
    """The agent ended with an error. `names`: the classes of the exception, the most specific one first."""

    def __init__(self, names: Sequence[str], text: str) -> None:
        super().__init__(text)
        self.names = tuple(names)


class Running(Protocol):
    """An agent under way."""

    async def result(self) -> Json:
        """Wait for the end and return what the agent returned. Raises AgentFailed."""
        ...

    async def stop(self) -> None:
        """End the agent. May be called twice."""
        ...


class Runner(Protocol):
    """Starts agents of one kind."""

    async def start(self, task: Mapping[str, Json], access: Access) -> Running:
        """Start the agent on `task`, once there is room for it. Raises EnvError when it cannot be started."""
        ...

    async def close(self) -> None:
        """End what the rollouts of this runner share."""
        ...


def _failed(error: BaseException) -> AgentFailed:
    names = [kind.__name__ for kind in type(error).__mro__]
    return AgentFailed(names, f"{type(error).__name__}: {error}")


class FunctionRunner:
    """Runs `agent: package.module:function`, called with those that it takes of `task`, `base_url` and `api_key`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        parameters = inspect.signature(function).parameters.values()
        takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        known = {parameter.name for parameter in parameters}
        self._names = [name for name in ("task", "base_url", "api_key") if takes_all or name in known]
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self, task: Mapping[str, Json], access: Access) -> Running:
        values = {"task": task, "base_url": access.base_url, "api_key": access.api_key}
        call = partial(self._function, **{name: values[name] for name in self._names})
        if not inspect.iscoroutinefunction(self._function):
            return _RunningThread(call)
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, daemon=True, name="agents").start()
        return _RunningCoroutine(call, self._loop)

    async def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None


class _RunningFunction:
    """What a coroutine and a thread have in common: their end comes from another thread."""

    def __init__(self) -> None:
        # The error is a value here: the future of a rollout that was closed is read by nobody.
        self._ended: Future[tuple[Json, BaseException | None]] = Future()

    def _end(self, result: Json = None, error: BaseException | None = None) -> None:
        self._ended.set_result((result, error))

    async def result(self) -> Json:
        result, error = await asyncio.shield(asyncio.wrap_future(self._ended))
        if error is not None:
            raise _failed(error) from error
        return result

    async def _wait_until_ended(self) -> None:
        await asyncio.wait([asyncio.wrap_future(self._ended)], timeout=GRACE_S)
        if not self._ended.done():
            log.warning("an agent still runs %g s after its rollout was closed; it is left to itself", GRACE_S)


class _RunningCoroutine(_RunningFunction):
    def __init__(self, call: Callable[[], Coroutine[Any, Any, Json]], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._loop = loop
        self._task: asyncio.Task[Json] | None = None
        loop.call_soon_threadsafe(self._start, call)

    def _start(self, call: Callable[[], Coroutine[Any, Any, Json]]) -> None:
        self._task = self._loop.create_task(call())
        self._task.add_done_callback(self._note_end)

    def _note_end(self, task: "asyncio.Task[Json]") -> None:
        if task.cancelled():
            self._end(error=asyncio.CancelledError("the agent was cancelled"))
        elif (error := task.exception()) is not None:
            self._end(error=error)
        else:
            self._end(task.result())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def stop(self) -> None:
        if not self._ended.done():
            self._loop.call_soon_threadsafe(self._cancel)
            await self._wait_until_ended()


class _RunningThread(_RunningFunction):
    def __init__(self, call: Callable[[], Json]) -> None:
        super().__init__()
        threading.Thread(target=self._run, args=(call,), daemon=True, name="agent").start()

    def _run(self, call: Callable[[], Json]) -> None:
        try:
            result = call()
        except BaseException as error:  # noqa: BLE001 somebody else's code, SystemExit of a script too
            self._end(error=error)
        else:
            self._end(result)

    async def stop(self) -> None:
        # A thread cannot be ended from outside: its next request is refused, which ends it.
        if not self._ended.done():
            await self._wait_until_ended()


class CommandRunner:
    """Runs `command: [python, my_agent.py]`. What the command prints is its result.

    It finds its task as JSON on standard input and in TRACE_TASK, and its model in OPENAI_BASE_URL, OPENAI_API_KEY,
    ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY.
    """

    def __init__(self, command: Sequence[str], cwd: str, max_running: int) -> None:
        self._command = tuple(command)
        self._cwd = cwd or None
        self._slots = asyncio.Semaphore(max_running)
        self._keeper = Keeper()

    async def start(self, task: Mapping[str, Json], access: Access) -> Running:
        text = json.dumps(task)
        added = {
            **access_variables(access),
            # The limit of Linux is 128 KiB for one variable; a longer task is on standard input alone.
            "TRACE_TASK": text if len(text) < 100_000 else "",
        }
        self._keeper.start()
        async with waits_for_room():
            await self._slots.acquire()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, **added},
                cwd=self._cwd,
                start_new_session=True,
            )
        except OSError as error:
            self._slots.release()
            raise EnvError(f"env.args.command={list(self._command)} cannot be started: {error}") from error
        except BaseException:
            self._slots.release()
            raise
        self._keeper.started(process.pid)
        return _RunningCommand(process, text.encode(), partial(self._ended, process.pid))

    def _ended(self, group: int) -> None:
        self._keeper.ended(group)
        self._slots.release()

    async def close(self) -> None:
        self._keeper.close()


class _RunningCommand:
    def __init__(self, process: asyncio.subprocess.Process, task: bytes, on_end: Callable[[], None]) -> None:
        self._process = process
        self._on_end: Callable[[], None] | None = on_end
        self._work = asyncio.create_task(self._run(task))

    async def _run(self, task: bytes) -> tuple[int, str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read its task
            self._process.stdin.write(task)
            await self._process.stdin.drain()
            self._process.stdin.close()
        out, err = await asyncio.gather(_read_tail(self._process.stdout), _read_tail(self._process.stderr))
        return await self._process.wait(), out, err

    async def result(self) -> Json:
        code, out, err = await asyncio.shield(self._work)
        self._note_end()
        if code:
            last = err.strip().splitlines()[-1:] or ["no word on standard error"]
            # The last line of a Python traceback is `package.Kind: message`.
            name = last[0].partition(":")[0].rpartition(".")[2]
            raise AgentFailed([name, f"exit_{code}"], f"exit code {code}: {last[0][:500]}")
        return out.strip()

    async def stop(self) -> None:
        if not self._work.done():  # also children that it left behind with its pipes
            for number in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, number)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(GRACE_S):
                        await asyncio.shield(self._work)
                        break
        self._work.cancel()
        self._note_end()

    def _note_end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()


async def _read_tail(stream: asyncio.StreamReader) -> str:
    """Read all that comes and return its last part, so that a chatty agent does not fill the memory."""
    kept = b""
    while block := await stream.read(65536):
        kept = (kept + block)[-_KEPT_OUTPUT:]
    return kept.decode("utf-8", "replace")
