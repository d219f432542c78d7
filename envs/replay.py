"""Fork environments that cannot copy their state: do again, in a fresh one, what was done.

    def make_env(self, task):
        return ReplayEnv(lambda: MyEnv(task))    # MyEnv needs no fork

A fork is only a record of the turns so far, which costs nothing. The fresh environment is made when the fork is first
stepped, so a state from which nothing is continued is never made again. Every answer must be as it was the first time.
Where it is not, the fork has another history than the policy saw, and nothing may be continued from it:
ReplayDivergedError.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from trace_async.env import ReplayDivergedError
from trace_async.types import Prompt, StepResult


class Steps(Protocol):
    """An `Env` without `fork`."""

    async def init(self) -> Prompt: ...
    async def step(self, action: str, *, truncated: bool = False) -> StepResult: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of an environment."""

    action: str
    """What the policy said."""
    truncated: bool
    """It was cut at its limit of tokens."""
    result: StepResult
    """What the environment answered."""


class ReplayEnv:
    """An `Env` around what `make` makes. It must answer the same turns with the same words every time."""

    def __init__(self, make: Callable[[], Steps]) -> None:
        self._make = make
        self._env: Steps | None = None
        self._prompt: Prompt | None = None
        self._turns: tuple[Turn, ...] = ()

    async def init(self) -> Prompt:
        self._env = self._make()
        self._prompt = await self._env.init()
        return self._prompt

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        """Raises ReplayDivergedError when this is a fork's first step and the turns before it come out otherwise."""
        if self._env is None:
            await self._replay()
        assert self._env is not None
        result = await self._env.step(action, truncated=truncated)
        self._turns += (Turn(action, truncated, result),)
        return result

    async def fork(self) -> "ReplayEnv":
        assert self._prompt is not None, "init comes first"
        twin = type(self)(self._make)
        twin._prompt, twin._turns = self._prompt, self._turns
        return twin

    async def close(self) -> None:
        env, self._env = self._env, None
        if env is not None:
            await env.close()

    async def _replay(self) -> None:
        env = self._make()
        try:
            if await env.init() != self._prompt:
                raise ReplayDivergedError("the prompt is another one than the first time")
            for number, turn in enumerate(self._turns, 1):
                if await env.step(turn.action, truncated=turn.truncated) != turn.result:
                    raise ReplayDivergedError(
                        f"turn {number} of {len(self._turns)} is answered otherwise than the first time: something in "
                        "the environment is not deterministic (time, chance without a seed, a server's state)"
                    )
        except BaseException:
            await env.close()
            raise
        self._env = env
