"""A guard around every method of an environment: what somebody else's code does is an EnvError with words, or plain.

Whatever an environment raises costs one rollout and never the run.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

from trace_async.env import (
    AskingEnv,
    Env,
    EnvError,
    EnvTimeoutError,
    EnvValueError,
    PromptTooLongError,
    ReplayDivergedError,
)
from trace_async.types import LossKind, PolicyTurn, Prompt, StepResult, Task, TurnLimits

T = TypeVar("T")

# What an environment raises may be of a class of its own; of ours is the class that counts in the same way.
_OURS: dict[LossKind, type[EnvError]] = {
    kind.loss: kind for kind in (EnvTimeoutError, EnvValueError, PromptTooLongError, ReplayDivergedError)
}


class EnvGuard:
    """Makes guarded environments. Every error names the environment, the task and the method."""

    def __init__(self, make_env: Callable[[Task], Env]) -> None:
        self._make_env = make_env

    async def make(self, task: Task) -> "GuardedEnv":
        async def make() -> Env:
            return self._make_env(task)

        return GuardedEnv(self, task, await self.call(task, "make_env", make))

    async def call(self, task: Task, method: str, call: Callable[[], Awaitable[T]]) -> T:
        """The answer of one method. Raises EnvError."""
        where = f"environment {task.domain}, task {task.id}: {method}()"
        try:
            return await call()
        except EnvError as error:
            raise _OURS.get(error.loss, EnvError)(f"{where} broke down: {error}", method=method) from error
        except Exception as error:  # somebody else's code: it may raise anything
            raise EnvError(f"{where} raised {error!r}", method=method) from error


class GuardedEnv:
    """One environment of a task, behind its guard."""

    def __init__(self, guard: EnvGuard, task: Task, env: Env) -> None:
        self._guard = guard
        self._task = task
        self._env = env
        self._asking = env if isinstance(env, AskingEnv) else None

    async def init(self) -> Prompt:
        return await self._guard.call(self._task, "init", self._env.init)

    async def next_limits(self) -> TurnLimits:
        """What the environment asks of the next turn; nothing where it leaves all to the run."""
        asking = self._asking
        if asking is None:
            return TurnLimits()

        async def ask() -> TurnLimits:
            return asking.next_limits()

        return await self._guard.call(self._task, "next_limits", ask)

    async def step(self, turn: PolicyTurn) -> StepResult:
        """Carry out one turn of the policy."""
        if self._asking is not None:
            return await self._guard.call(self._task, "answer", partial(self._asking.answer, turn))
        step = partial(self._env.step, turn.text, truncated=turn.truncated)
        return await self._guard.call(self._task, "step", step)

    async def fork(self) -> "GuardedEnv":
        return GuardedEnv(self._guard, self._task, await self._guard.call(self._task, "fork", self._env.fork))

    async def close(self) -> None:
        await self._guard.call(self._task, "close", self._env.close)
