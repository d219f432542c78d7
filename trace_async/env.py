"""The seam to environments: what a task, its tools and its verifier must offer.

A complete environment of one's own is `envs/example.py`.
"""

from collections.abc import Sequence
from random import Random
from typing import ClassVar, Protocol, runtime_checkable

from trace_async.types import LossKind, PolicyTurn, Prompt, Split, StepResult, Task, TurnLimits

CUT_MARK = " [ cut ]"
"""Ends an observation that was cut, in characters by an environment or in tokens by the renderer: the model sees it."""


class EnvError(Exception):
    """The environment itself broke down (a tool server gone, a sandbox lost): never the model's fault, never a reward.

    The rollout is tried again, then dropped and counted as failed, under its `loss`. `method`: of the environment where
    it happened, filled in by the guard (rollout/guard.py).
    """

    loss: ClassVar[LossKind] = LossKind.ENV

    def __init__(self, *args: object, method: str = "") -> None:
        super().__init__(*args)
        self.method = method


class EnvTimeoutError(EnvError):
    """A method of the environment did not end within its limit."""

    loss = LossKind.ENV_TIMEOUT


class EnvValueError(EnvError):
    """The environment gave something that has no plain meaning, such as a reward that is no finite number."""

    loss = LossKind.ENV_VALUE


class PromptTooLongError(EnvError):
    """A task's prompt leaves no room in the context; trying again cannot help."""

    loss = LossKind.PROMPT_TOO_LONG


class ReplayDivergedError(EnvError):
    """A fork by replay did not come back to the state that it was made from: something in it is not deterministic.

    Trying again would only do the same, so nothing more is continued from that turn.
    """

    loss = LossKind.REPLAY_DIVERGED


class Env(Protocol):
    """One running task: its state, its tools, its verifier. Holds its state until `close`."""

    async def init(self) -> Prompt:
        """Start the task; called once, first."""
        ...

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        """Carry out one turn of the model. `truncated`: the turn hit its token limit.

        Whatever the model did wrong is answered by an observation or a reward, never by an exception;
        raises EnvError only where the environment itself broke down.
        """
        ...

    async def fork(self) -> "Env":
        """An independent copy of the state after the last turn; neither sees the other's later steps."""
        ...

    async def close(self) -> None:
        """Give back what the state holds; may be called twice."""
        ...


@runtime_checkable
class AskingEnv(Protocol):
    """An Env around a program that asks for turns by itself (an agent over HTTP): it says how long the next turn may
    be, and is told each turn with its tokens and log-probabilities through `answer`, in place of `step`."""

    def next_limits(self) -> TurnLimits:
        """What the program asks of the turn that comes next."""
        ...

    async def answer(self, turn: PolicyTurn) -> StepResult:
        """As `Env.step`."""
        ...


class Domain(Protocol):
    """A kind of environment with its tasks: what `env.name` in the config names."""

    name: str

    def tasks(self, split: Split) -> Sequence[Task]:
        """All tasks of a split, in a fixed order; train and heldout do not overlap."""
        ...

    def make_env(self, task: Task) -> Env:
        """A fresh environment for `task`; cheap: heavy parts (an index, a server) belong to the domain."""
        ...


@runtime_checkable
class Demonstrator(Protocol):
    """A domain that can also show how its tasks are solved, to warm-start a small policy (`make-policy`)."""

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        """The turns (actions) of one demonstration, imperfect on purpose; the environment supplies observations."""
        ...

    def vocabulary(self) -> Sequence[str]:
        """Every word that prompts, observations and demonstrations may contain, for a small own tokenizer."""
        ...


@runtime_checkable
class DemonstrationSource(Protocol):
    """A Demonstrator that demonstrates other tasks than its train split, for example in another mix of kinds."""

    def demonstration_tasks(self) -> Sequence[Task]:
        """Tasks to be demonstrated; none of them held out."""
        ...
