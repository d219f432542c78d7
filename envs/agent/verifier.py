"""Judge an agent's work by `package.module:function(task, outcome) → reward`, or by a command."""

import asyncio
import contextlib
import inspect
import json
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trace_async.env import EnvError, EnvTimeoutError, EnvValueError
from trace_async.types import Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a verifier judges."""

    result: Json
    """What the agent returned or printed."""
    error: str
    """How it failed by the model's doing; empty when it did not."""
    answer: str
    """The model's last words."""
    num_turns: int
    """How often the model was asked."""


class FunctionVerifier:
    """Calls `function(task, outcome)`, plain (in a thread) or a coroutine."""

    def __init__(self, function: Callable[..., Any], timeout_s: float) -> None:
        self._function = function
        self._timeout_s = timeout_s

    async def reward(self, task: Mapping[str, Json], outcome: Outcome) -> float:
        """Return the reward, in [0, 1]. Raises EnvError when the verifier fails, is too slow or gives anything else."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if inspect.iscoroutinefunction(self._function):
                    found = await self._function(task, outcome)
                else:
                    found = await asyncio.to_thread(self._function, task, outcome)
        except TimeoutError:
            raise EnvTimeoutError(
                f"the verifier took longer than env.args.verifier_timeout_s={self._timeout_s:g}"
            ) from None
        except Exception as error:  # somebody else's code
            raise EnvError(f"the verifier raised {type(error).__name__}: {error}") from error
        return _checked(found)


class CommandVerifier:
    """Runs a command with {"task": …, "outcome": …} on its standard input.

    The last line that it prints is the reward. When it prints nothing, exit code 0 is a success and 1 a failure.
    """

    def __init__(self, command: Sequence[str], timeout_s: float) -> None:
        self._command = tuple(command)
        self._timeout_s = timeout_s

    async def reward(self, task: Mapping[str, Json], outcome: Outcome) -> float:
        """Return the reward, in [0, 1]. Raises EnvError when the verifier fails, is too slow or gives anything else."""
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            raise EnvError(f"env.args.verifier={list(self._command)} cannot be started: {error}") from error
        asked = json.dumps({"task": task, "outcome": asdict(outcome)}, default=str).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                out, err = await process.communicate(asked)
        except TimeoutError:
            raise EnvTimeoutError(
                f"the verifier took longer than env.args.verifier_timeout_s={self._timeout_s:g}"
            ) from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return self._read(process.returncode or 0, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def _read(self, code: int, out: str, err: str) -> float:
        lines = out.strip().splitlines()
        if not lines and code in (0, 1):
            return 1.0 - code
        if code:
            raise EnvError(f"the verifier ended with exit code {code}: {(err or out).strip()[-500:]}")
        try:
            return _checked(float(lines[-1]))
        except ValueError:
            raise EnvValueError(f"the verifier's last line is no number: {lines[-1][:200]!r}") from None


def _checked(reward: object) -> float:
    """Return the reward as a float. Raises EnvValueError unless it is a number in [0, 1]."""
    if not isinstance(reward, bool | int | float) or not 0 <= reward <= 1:
        raise EnvValueError(f"the verifier gave {reward!r}; a reward is a number from 0 to 1")
    return float(reward)
