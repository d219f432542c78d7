"""Play a game of a text world: each turn is a command, and each observation is what the simulator says."""

import asyncio
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Literal, Protocol, TypeVar

from envs.actions import MAX_ACTION_CHARS, NO_BLOCK, TOO_LONG, TRUNCATED, Malformed, cut_text
from envs.text_worlds.pool import Game, Position, Simulator, SimulatorPool
from trace_async.config import ConfigError
from trace_async.types import Message, Prompt, Split, StepResult, Task

T = TypeVar("T")
Reward = Literal["progress", "success"]

INSTRUCTIONS = (
    "You are in a text world. Each turn ends with one command on its last line, such as look around. The command help "
    "lists what you can do."
)
MAX_COMMAND_CHARS = 200
"""Nobody means a longer command, and the simulator's parser takes its time over it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSettings:
    """What both worlds let their user set."""

    max_turns: int = 50
    """A game ends after so many turns."""
    reward: Reward = "progress"
    """progress: the game's score in [0, 1] | success: 1 for a full score, else 0."""
    max_observation_chars: int = 2000
    """Longer observations are cut."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_observation_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"env.args.{name}={getattr(self, name)}: must be ≥ 1")
        if self.reward not in ("progress", "success"):
            raise ConfigError(f"env.args.reward={self.reward}: progress or success")


class TextWorldEnv:
    """One game. Its whole state is its position, so a fork is a copy. The pool's simulators do the rest."""

    def __init__(self, pool: SimulatorPool[Any], game: Game, settings: WorldSettings) -> None:
        self._pool = pool
        self._position = Position(game)
        self._settings = settings
        self._score = 0.0
        self._turns = 0
        self._malformed = 0

    async def init(self) -> Prompt:
        seen = await self._in_thread(lambda: self._pool.start(self._position.game))
        task = Message(role="user", content=self._cut(seen.text))
        return Prompt(messages=(Message(role="system", content=INSTRUCTIONS), task))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self._turns += 1
        command = Malformed(TRUNCATED) if truncated else parse_command(action)
        done = False
        if isinstance(command, Malformed):
            self._malformed += 1
            answer = f"error ; {command.reason} ; write help for what you can do"
        elif command == "help":
            answer = await self._in_thread(lambda: self._pool.valid_actions(self._position))
        else:
            seen = await self._in_thread(lambda: self._pool.step(self._position, command))
            self._position = self._position.after(command, seen)
            self._score, answer, done = seen.score, seen.text, seen.done
        if done or self._turns >= self._settings.max_turns:
            return self._end()
        return StepResult(messages=(Message(role="tool", content=self._cut(answer)),))

    async def fork(self) -> "TextWorldEnv":
        return copy.copy(self)

    async def close(self) -> None:
        return None

    def _end(self) -> StepResult:
        success = float(self._score >= 1)
        metrics = {
            "success": success,
            "progress": self._score,
            "turns": float(self._turns),
            "malformed_turns": float(self._malformed),
        }
        return StepResult(
            done=True, reward=success if self._settings.reward == "success" else self._score, metrics=metrics
        )

    def _cut(self, text: str) -> str:
        return cut_text(text, max_chars=self._settings.max_observation_chars) or "nothing"

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool.threads, call)


class GuidedSimulator(Simulator, Protocol):
    """A simulator that also knows a way to the full score."""

    def gold_actions(self, game: Game) -> list[str]:
        """Return a way to the full score."""
        ...


G = TypeVar("G", bound=GuidedSimulator)


class TextWorld(ABC, Generic[G]):
    """What both worlds share as domains: their tasks are listed once, by a simulator, and played from one pool."""

    def __init__(self, pool: SimulatorPool[G], settings: WorldSettings) -> None:
        self._pool = pool
        self._settings = settings

    @abstractmethod
    def list_tasks(self) -> dict[Split, list[Task]]:
        """Ask a simulator for the tasks. Raises ConfigError."""

    @abstractmethod
    def game_of(self, task: Task) -> Game:
        """Return the game that a task names."""

    @cached_property
    def _tasks(self) -> dict[Split, list[Task]]:
        return self.list_tasks()

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def make_env(self, task: Task) -> TextWorldEnv:
        return TextWorldEnv(self._pool, self.game_of(task), self._settings)

    def gold_actions(self, task: Task) -> list[str]:
        """Return a way to the full score, for a scripted agent."""
        return self._pool.ask(lambda simulator: simulator.gold_actions(self.game_of(task)))

    async def close(self) -> None:
        self._pool.close()


def parse_command(turn: str) -> str | Malformed:
    """Return the last line of a turn, or what stands behind its last `>`, with single blanks. Never raises."""
    if len(turn) > MAX_ACTION_CHARS:
        return Malformed(TOO_LONG)
    lines = [line for line in turn.splitlines() if line.strip()]
    words = lines[-1].rpartition(">")[2] if lines else ""
    command = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    if len(command) > MAX_COMMAND_CHARS:
        return Malformed(TOO_LONG)
    return command or Malformed(NO_BLOCK)
