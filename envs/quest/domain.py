"""Quests as an environment: text worlds of ten to thirty actions, decided where their cruxes stand.

A turn is a free thought and, on its last line or behind the last `>`, one command: `need the key > go north`. The
observation is a tool message. A prefix is dear in tokens, and in seconds where `step_seconds` makes the tool slow.
"""

import asyncio
import copy
from collections.abc import Mapping, Sequence
from functools import lru_cache
from random import Random
from typing import Literal

from envs.actions import MAX_ACTION_CHARS, NO_BLOCK, REASONS, TOO_LONG, TRUNCATED, Malformed
from envs.lazy_tasks import LazyTasks, check_shares
from envs.quest import game
from envs.quest.demonstrations import Habits, demonstrate
from envs.quest.world import KINDS, World, make_world, names, split_of, world_from_json, world_to_json
from trace_async.config import ConfigError
from trace_async.types import Message, Prompt, Split, StepResult, Task

Reward = Literal["success", "progress"]

RULES = (
    "You are in a text world and look for a treasure; taking it wins. Each turn ends with one command on its last "
    "line: go DIRECTION, take THING, drop THING, use THING, give THING, add THING, light lamp, look, bag, or help, "
    "which lists what you can do. Doors need the key of their colour, vines a knife, rubble a shovel, ice a torch. "
    "Dark stairs are deadly without a lit lamp; a guard and a witch forgive no wrong thing and no wrong order."
)
_NUM_SHOWN = 10_000

DEFAULT_MIX: Mapping[str, float] = {"easy": 0.4, "middle-spread": 0.08, "middle-late": 0.14, "hard": 0.38}
"""Many quests that are easy, many nearly out of reach at first (four cruxes), a fifth to be learnt."""

DEMONSTRATED_MIX: Mapping[str, float] = {
    "easy": 0.2,
    "middle-early": 0.2,
    "middle-spread": 0.2,
    "middle-late": 0.2,
    "hard": 0.2,
}


class QuestEnv:
    """One quest under way. The world is shared by forks and never changes; the state is replaced by every command."""

    def __init__(self, world: World, *, max_turns: int, reward: Reward, step_seconds: float, rules: str) -> None:
        self._world = world
        self._state = game.start(world)
        self._max_turns = max_turns
        self._reward = reward
        self._step_seconds = step_seconds
        self._rules = rules
        self._turns = 0
        self._malformed = 0

    async def init(self) -> Prompt:
        world = self._world
        task = f"quest : {world.treasure} ; on the way {world.outline} ; {game.describe(world, self._state)}"
        user = Message(role="user", content=task)
        return Prompt(messages=(Message(role="system", content=self._rules), user) if self._rules else (user,))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        if self._step_seconds:
            await asyncio.sleep(self._step_seconds)
        self._turns += 1
        command = Malformed(TRUNCATED) if truncated else parse_command(action)
        if isinstance(command, Malformed):
            self._malformed += 1
            answer = f"error ; {command.reason} ; {game.HELP}"
        else:
            self._state, answer = game.obey(self._world, self._state, command)
        if self._state.outcome or self._turns >= self._max_turns:
            return self._end()
        return StepResult(messages=(Message(role="tool", content=answer),))

    async def fork(self) -> "QuestEnv":
        return copy.copy(self)

    async def close(self) -> None:
        return None

    def _end(self) -> StepResult:
        won = float(self._state.outcome == "won")
        progress = game.progress(self._world, self._state)
        metrics = {
            "success": won,
            "progress": progress,
            "turns": float(self._turns),
            "malformed_turns": float(self._malformed),
        }
        return StepResult(done=True, reward=won if self._reward == "success" else progress, metrics=metrics)


class Quest:
    """The domain `quest`: generated quests for small policies, which it can also demonstrate.

    `mix`: share of each kind of quest (KINDS), in proportion; of those demonstrated: `demonstration_mix`.
    `misstep_rate`, `dawdle_rate`: of the demonstrating player (Habits). `max_turns`: where a quest ends unwon.
    `reward`: `success` (0 or 1), or `progress`, the share of the way that was made. `step_seconds`: how long each
    command takes, in real seconds (not in demonstrations: nobody waits to be taught). `show_rules`: tell the model how
    to play (a warm-started policy knows it).
    """

    name = "quest"
    in_random_order = True  # so the first held-out tasks are a sample (`envs.tasks.heldout_sample`)

    def __init__(
        self,
        *,
        seed: int = 0,
        num_train: int = 10_000,
        num_heldout: int = 2_000,
        mix: Mapping[str, float] = DEFAULT_MIX,
        demonstration_mix: Mapping[str, float] = DEMONSTRATED_MIX,
        misstep_rate: float = 0.65,
        dawdle_rate: float = 0.02,
        max_turns: int = 40,
        reward: Reward = "success",
        step_seconds: float = 0.0,
        show_rules: bool = False,
    ) -> None:
        for setting, count in {"num_train": num_train, "num_heldout": num_heldout, "max_turns": max_turns}.items():
            if count < 1:
                raise ConfigError(f"env.args.{setting}={count}: must be ≥ 1")
        for setting, share in {"misstep_rate": misstep_rate, "dawdle_rate": dawdle_rate}.items():
            if not 0 <= share <= 1:
                raise ConfigError(f"env.args.{setting}={share}: must be in [0, 1]")
        if not 0 <= step_seconds <= 3600:
            raise ConfigError(f"env.args.step_seconds={step_seconds}: seconds of each command, 0 to 3600")
        if reward not in ("success", "progress"):
            raise ConfigError(f"env.args.reward={reward}: success or progress")
        self._mix = check_shares("mix", mix, KINDS)
        self._demonstration_mix = check_shares("demonstration_mix", demonstration_mix, KINDS)
        self._seed = seed
        self._counts: dict[Split, int] = {"train": num_train, "heldout": num_heldout}
        self._habits = Habits(misstep=misstep_rate, dawdle=dawdle_rate)
        self._max_turns, self._reward, self._step_seconds = max_turns, reward, step_seconds
        self._rules = RULES if show_rules else ""

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._made(split, split, self._counts[split], self._mix)

    def demonstration_tasks(self) -> Sequence[Task]:
        return self._made("shown", "train", _NUM_SHOWN, self._demonstration_mix)

    def _made(self, prefix: str, split: Split, count: int, mix: Mapping[str, float]) -> Sequence[Task]:
        @lru_cache(maxsize=4096)
        def make(index: int) -> Task:
            rng = Random(f"quest/{prefix}/{self._seed}/{index}")
            kind = rng.choices(list(mix), list(mix.values()))[0]
            world = make_world(kind, rng)
            while split_of(world) != split:
                world = make_world(kind, rng)
            return Task(id=f"{prefix}-{index}", domain=self.name, kind=kind, data=world_to_json(world))

        return LazyTasks(count, make)

    def make_env(self, task: Task) -> QuestEnv:
        return QuestEnv(
            world_from_json(task.data),
            max_turns=self._max_turns,
            reward=self._reward,
            step_seconds=0.0 if task.id.startswith("shown-") else self._step_seconds,
            rules=self._rules,
        )

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        commands = demonstrate(world_from_json(task.data), self._habits, rng)
        return commands[: self._max_turns]

    def vocabulary(self) -> Sequence[str]:
        return [*names(), *game.ANSWERS, *game.COMMANDS, *REASONS, "quest : ; , on the way error >"]


def parse_command(turn: str) -> str | Malformed:
    """Return the command that ends the turn, in lower case with single blanks. Never raises."""
    if len(turn) > MAX_ACTION_CHARS:
        return Malformed(TOO_LONG)
    lines = [line for line in turn.splitlines() if line.strip()]
    words = lines[-1].rpartition(">")[2].lower().split() if lines else []
    command = " ".join(words).rstrip(" .")
    return command or Malformed(NO_BLOCK)
