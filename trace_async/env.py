"""Define what an environment must offer: its tasks, its tools and its verifier.

`envs/example.py` is a complete environment to copy.
"""

from collections.abc import Sequence
from random import Random
from typing import ClassVar, Protocol, runtime_checkable

from trace_async.types import LossKind, PolicyTurn, Prompt, Split, StepResult, Task, TurnLimits

CUT_MARK = " [ cut ]"
"""Ends an observation that was cut, so that the model sees the cut. Environments cut by characters, the renderer by
tokens."""


class EnvError(Exception):
    """Report that the environment itself broke down, for example because a tool server or a sandbox is gone.

    This is never the model's fault, so it never becomes a reward. The rollout is tried again; if that fails too, it is
    dropped and counted as lost.
    """

    loss: ClassVar[LossKind] = LossKind.ENV
    """How the ledger counts a rollout that ends with this error."""

    def __init__(self, *args: object, method: str = "") -> None:
        """`method`: the method of the environment that failed; the guard (rollout/guard.py) fills it in."""
        super().__init__(*args)
        self.method = method


class EnvTimeoutError(EnvError):
    """Report that a method of the environment did not end within its limit."""

    loss = LossKind.ENV_TIMEOUT


class EnvValueError(EnvError):
    """Report that the environment gave something without a plain meaning, such as a reward that is not finite."""

    loss = LossKind.ENV_VALUE


class PromptTooLongError(EnvError):
    """Report that a task's prompt leaves no room in the context. Trying again cannot help."""

    loss = LossKind.PROMPT_TOO_LONG


class ReplayDivergedError(EnvError):
    """Report that a fork by replay did not reach the state that it was forked from.

    Something in the environment is not deterministic. Trying again would not help, so nothing more is continued from
    that turn.
    """

    loss = LossKind.REPLAY_DIVERGED


class Env(Protocol):
    """One running task with its state, its tools and its verifier. It holds its state until `close`."""

    async def init(self) -> Prompt:
        """Start the task and return what the policy sees first. Called once, before everything else."""
        ...

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        """Carry out one turn of the model. `truncated` says that the turn hit its token limit.

        Answer whatever the model did wrong by an observation or a reward, never by an exception. Raise EnvError only
        when the environment itself broke down.
        """
        ...

    async def fork(self) -> "Env":
        """Return an independent copy of the state after the last turn.

        Neither copy may see the other's later steps.
        """
        ...

    async def close(self) -> None:
        """Give back what the state holds. May be called twice."""
        ...


@runtime_checkable
class AskingEnv(Protocol):
    """An Env around a program that asks for turns by itself, such as an agent over HTTP.

    It says how long the next turn may be. It receives each turn through `answer` instead of `step`, because it needs
    the turn's tokens and log-probabilities too.
    """

    def next_limits(self) -> TurnLimits:
        """Return the limits that the program sets for the next turn."""
        ...

    async def answer(self, turn: PolicyTurn) -> StepResult:
        """Carry out one turn, as `Env.step` does."""
        ...


class Domain(Protocol):
    """A kind of environment together with its tasks. The setting `env.name` chooses one."""

    name: str

    def tasks(self, split: Split) -> Sequence[Task]:
        """Return all tasks of a split in a fixed order. Train and heldout must not overlap."""
        ...

    def make_env(self, task: Task) -> Env:
        """Make a fresh environment for `task`.

        This must be cheap, because every rollout calls it: heavy parts (an index, a server) belong to the domain.
        """
        ...


@runtime_checkable
class Demonstrator(Protocol):
    """A domain that can also show how its tasks are solved. `make-policy` warm-starts a small policy with it."""

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        """Return the turns (actions) of one demonstration; the environment supplies the observations.

        It should sometimes fail, so that the warm-started policy has something left to learn.
        """
        ...

    def vocabulary(self) -> Sequence[str]:
        """Return every word that prompts, observations and demonstrations may contain, for a small tokenizer."""
        ...


@runtime_checkable
class DemonstrationSource(Protocol):
    """A Demonstrator whose demonstrations are of other tasks than its train split, such as another mix of kinds."""

    def demonstration_tasks(self) -> Sequence[Task]:
        """Return the tasks to demonstrate. None of them may be held out."""
        ...
