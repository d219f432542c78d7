"""Run model-written Python in `pydantic-monty`, an interpreter in worker processes without files or network.

Between two snippets a program is only bytes (a snapshot of the interpreter, about 1 kB), and no worker is held. A
snippet borrows a worker, loads the snapshot, runs, and takes the next snapshot. So a fork of a program is a copy of its
bytes, and a few workers serve any number of rollouts (0.5 ms a snippet, measured).
"""

import asyncio
from dataclasses import dataclass, field
from datetime import datetime
from reprlib import Repr

from pydantic_monty import (
    AsyncMonty,
    MontyCrashedError,
    MontyRuntimeError,
    MontySyntaxError,
    OSPolicy,
    ResourceLimits,
)

from trace_async.config import ConfigError
from trace_async.env import CUT_MARK, EnvError

_LIMIT_ERRORS = (TimeoutError, MemoryError)


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """What one snippet may use. One that wants more ends with an error and leaves no trace."""

    seconds: float = 1.0
    """Running time."""
    memory_mb: int = 32
    """Heap of the interpreter."""
    state_kb: int = 256
    """Size of the snapshot that is kept for a turn."""
    output_chars: int = 2000
    """Characters of printed text and value that are kept."""
    recursion_depth: int = 200
    """Calls within calls."""
    num_workers: int = 2
    """Processes that run snippets."""
    wait_s: float = 120.0
    """The longest wait for one of them."""

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "state_kb", "output_chars", "recursion_depth", "num_workers", "wait_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits.{name}={getattr(self, name)}: must be > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeResult:
    """What came of a snippet."""

    output: str
    """Printed text, then the value of the last expression."""
    error_type: str
    """The name of the exception; empty: none."""
    error: str
    """Its message."""
    state: bytes | None = field(repr=False)
    """The snapshot to go on from. After an ordinary error it holds what was assigned before the error, as in Python;
    after a limit was hit, it is the state before the snippet."""


class Sandbox:
    """A pool of workers, started at the first snippet. `close` ends them; they also end with this process."""

    def __init__(self, limits: SandboxLimits | None = None) -> None:
        self._limits = limits or SandboxLimits()
        self._starting: asyncio.Future[AsyncMonty] | None = None
        self._resource_limits: ResourceLimits = {
            "max_feed_duration_secs": self._limits.seconds,
            "max_memory": self._limits.memory_mb * 2**20,
            "max_recursion_depth": self._limits.recursion_depth,
            "max_suspensions": 100,
        }
        # The same program gives the same output at every time and place.
        self._os_policy: OSPolicy = {"sleep": "zero", "random_start": {"seed": 0}, "datetime": datetime(2026, 1, 1)}

    async def run(self, code: str, state: bytes | None) -> CodeResult:
        """Run a snippet on a snapshot (None: an empty program). Raises EnvError where the sandbox itself is lost."""
        pool = await self._started_pool()
        printed = _Printed(self._limits.output_chars)
        try:
            async with pool.checkout(limits=self._resource_limits, os_policy=self._os_policy) as session:
                if state is not None:
                    await session.load_session(state)
                try:
                    value = await session.feed_run(code, print_callback=printed.write)
                except (MontyRuntimeError, MontySyntaxError) as error:
                    if isinstance(error.exception(), _LIMIT_ERRORS):
                        return _failed(printed, error, state)
                    return _failed(printed, error, self._kept(await session.dump(), state))
                return self._finished(printed, value, await session.dump(), state)
        except MontyRuntimeError as error:  # the snapshot could not be taken: no memory was left for it
            return _failed(printed, error, state)
        except MontyCrashedError as error:
            if error.timed_out:  # the program held the interpreter beyond its limit, and the watchdog ended the worker
                message = f"time limit exceeded: {self._limits.seconds:g} s"
                return CodeResult(output=printed.text(), error_type="TimeoutError", error=message, state=state)
            raise EnvError(f"a sandbox worker died: {error}") from error
        except TimeoutError as error:
            raise EnvError(f"no sandbox worker was free for {self._limits.wait_s:g} s") from error

    async def close(self) -> None:
        """End the workers; a later `run` starts new ones."""
        starting, self._starting = self._starting, None
        if starting is not None:
            await (await starting).__aexit__(None, None, None)

    async def _started_pool(self) -> AsyncMonty:
        if self._starting is None:
            self._starting = asyncio.ensure_future(self._start())
        try:
            return await asyncio.shield(self._starting)  # whoever stops waiting does not stop the others
        except (OSError, RuntimeError, LookupError) as error:
            # IndexError: pydantic-monty seeks its program in vain, and lies near the root of the disk.
            self._starting = None
            raise EnvError(
                f"the sandbox cannot start: {type(error).__name__}: {error}; the program `monty`, which pip installs "
                "with pydantic-monty, must be on the PATH or named by MONTY_BIN"
            ) from error

    async def _start(self) -> AsyncMonty:
        pool = AsyncMonty(
            max_processes=self._limits.num_workers,
            checkout_timeout=self._limits.wait_s,
            request_timeout=self._limits.seconds + 30.0,
        )
        return await pool.__aenter__()

    def _finished(self, printed: "_Printed", value: object, new_state: bytes, state: bytes | None) -> CodeResult:
        if len(new_state) > self._limits.state_kb * 1024:
            message = f"the variables take more than {self._limits.state_kb} kB and are forgotten"
            return CodeResult(output=printed.text(), error_type="MemoryError", error=message, state=state)
        if value is not None:
            printed.write("stdout", _show(value, self._limits.output_chars))
        return CodeResult(output=printed.text(), error_type="", error="", state=new_state)

    def _kept(self, new_state: bytes, state: bytes | None) -> bytes | None:
        return new_state if len(new_state) <= self._limits.state_kb * 1024 else state


class _Printed:
    """Printed text, of which the first `max_chars` are kept."""

    def __init__(self, max_chars: int) -> None:
        self._parts: list[str] = []
        self._room = max_chars
        self._cut = False

    def write(self, _stream: str, text: str) -> None:
        self._cut = self._cut or len(text) > self._room
        if self._room > 0:
            self._parts.append(text[: self._room])
            self._room -= len(self._parts[-1])

    def text(self) -> str:
        return "".join(self._parts).strip() + (CUT_MARK if self._cut else "")


def _failed(printed: _Printed, error: MontyRuntimeError | MontySyntaxError, state: bytes | None) -> CodeResult:
    error_type, _, message = error.display("type-msg").partition(": ")
    return CodeResult(output=printed.text(), error_type=error_type[:100], error=message[:500], state=state)


def _show(value: object, max_chars: int) -> str:
    """Return the value as Python shows it, at a bounded cost."""
    shower = Repr()
    shower.maxlevel = 20
    shower.maxlist = shower.maxtuple = shower.maxset = shower.maxdict = shower.maxfrozenset = shower.maxdeque = 1000
    shower.maxstring = shower.maxlong = shower.maxother = max_chars + 1
    try:
        return shower.repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python turns into text
        return f"a value of type {type(value).__name__} that is too large to show"
