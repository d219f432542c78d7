"""ScienceWorld (Wang et al. 2022, arXiv 2203.07540): 30 kinds of school experiments in a house, scored by sub-goals."""

import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import Any

from envs.text_worlds.env import Reward, TextWorld, WorldSettings
from envs.text_worlds.java import load_package
from envs.text_worlds.pool import Game, Seen, SimulatorPool
from trace_async.config import ConfigError
from trace_async.types import Json, Split, Task

_NO_LIMIT = 1_000_000  # of the simulator's own turns: ours are counted by the environment


class ScienceWorldSimulator:
    """One Java process.

    Of the package's environment only what a turn needs is called. Listing every valid action, as its `step` does, takes
    a hundred times as long.
    """

    def __init__(self, simplifications: str) -> None:
        package = load_package("scienceworld", "scienceworld==1.2.3")
        self._env: Any = package.ScienceWorldEnv("", envStepLimit=_NO_LIMIT)
        self._simplifications = simplifications

    def reset(self, game: Game) -> Seen:
        self._load(game)
        seen = self.step("look around")
        return Seen(f"{self._env.taskdescription()}\n{seen.text}", seen.score)

    def step(self, action: str) -> Seen:
        server = self._env.server
        text, score = in_order(str(server.step(action))), float(server.getScore())
        # A fatal mistake (focus on the wrong thing) is scored −1 and ends the game.
        return Seen(text, min(1.0, max(0.0, score)), done=bool(server.getCompleted()) or score < 0)

    def valid_actions(self) -> str:
        return " , ".join(sorted(self._env.get_possible_actions()))

    def task_names(self) -> list[str]:
        return list(self._env.get_task_names())

    def variations(self, name: str, split: Split) -> list[int]:
        """Return the package's own split: its training variations, and its test variations as held out."""
        self._env.load(name, 0, self._simplifications)
        return list(self._env.get_variations_train() if split == "train" else self._env.get_variations_test())

    def gold_actions(self, game: Game) -> list[str]:
        """Return a way to the full score, as the package finds it."""
        self._load(game, gold=True)
        return list(self._env.get_gold_action_sequence())

    def close(self) -> None:
        self._env.close()

    def _load(self, game: Game, *, gold: bool = False) -> None:
        self._env.load(*game, self._simplifications, generateGoldPath=gold)


class ScienceWorld(TextWorld[ScienceWorldSimulator]):
    """The domain `scienceworld`.

    `task_names`: some of the package's 30; empty: all. `variations`: at most so many of each, in either split.

    `simplifications`: as the package names them. `num_simulators`: Java processes, each about 300 MB, in every actor
    that plays. The other settings are those of the environment (WorldSettings).
    """

    name = "scienceworld"

    def __init__(
        self,
        *,
        task_names: Sequence[str] = (),
        variations: int = 20,
        simplifications: str = "easy",
        max_turns: int = 50,
        reward: Reward = "progress",
        max_observation_chars: int = 2000,
        num_simulators: int = 2,
    ) -> None:
        if variations < 1:
            raise ConfigError(f"env.args.variations={variations}: must be ≥ 1")
        # The pool starts simulators when they are needed; what is missing is told now.
        load_package("scienceworld", "scienceworld==1.2.3")
        super().__init__(
            SimulatorPool(lambda: ScienceWorldSimulator(simplifications), num_simulators),
            WorldSettings(max_turns=max_turns, reward=reward, max_observation_chars=max_observation_chars),
        )
        self._wanted, self._variations = tuple(task_names), variations

    def list_tasks(self) -> dict[Split, list[Task]]:
        names = self._pool.ask_for_tasks(lambda simulator: simulator.task_names())
        unknown = set(self._wanted) - set(names)
        if unknown:
            raise ConfigError(
                f"env.args.task_names: no {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}"
            )
        return {split: self._of_split(split, self._wanted or names) for split in ("train", "heldout")}

    def game_of(self, task: Task) -> Game:
        number = task.data["number"]
        assert isinstance(number, int)
        return str(task.data["game"]), number

    def _of_split(self, split: Split, names: Sequence[str]) -> list[Task]:
        tasks = []
        for name in names:
            numbers = self._pool.ask_for_tasks(partial(_variations, name=name, split=split))
            for number in numbers[: self._variations]:
                data: dict[str, Json] = {"game": name, "number": number}
                tasks.append(Task(id=f"{name}-{number}", domain=self.name, kind=name, data=data))
        return tasks


def in_order(text: str) -> str:
    """Return `text` with its lists sorted. The simulator lists what is in a room or a box in another order each time.

    Lists are the lines that begin with a tab, what stands behind `is:` up to the full stop, and `(containing …)`.
    """
    text = re.sub(r"\(containing ([^()]*)\)", lambda found: f"(containing {_sorted_list(found[1])})", text)
    text = re.sub(r"\bis: ([^.\n]*)", lambda found: f"is: {_sorted_list(found[1])}", text)
    lines: list[str] = []
    for is_list, block in groupby(text.split("\n"), key=lambda line: line.startswith("\t")):
        found = list(block)
        lines += sorted(found) if is_list else found
    return "\n".join(lines)


def _sorted_list(text: str) -> str:
    """Return a list with commas, sorted. A comma within parentheses parts nothing."""
    return ", ".join(sorted(re.split(r", (?![^()]*\))", text)))


def _variations(simulator: ScienceWorldSimulator, name: str, split: Split) -> list[int]:
    return simulator.variations(name, split)
