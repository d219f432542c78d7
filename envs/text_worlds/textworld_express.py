"""TextWorld-Express (Jansen and Côté 2022, arXiv 2208.01174): cooking, coins, tidying up and more, made by seed."""

from typing import Any

from envs.text_worlds.env import Reward, TextWorld, WorldSettings
from envs.text_worlds.java import load_package
from envs.text_worlds.pool import Game, Seen, SimulatorPool
from trace_async.config import ConfigError
from trace_async.types import Split, Task

_FOLDS: dict[Split, str] = {"train": "train", "heldout": "test"}
_NO_LIMIT = 1_000_000  # of the simulator's own turns: ours are counted by the environment


class TextWorldExpressSimulator:
    """One Java process, for one game with its parameters."""

    def __init__(self, game: str, params: str) -> None:
        package = load_package("textworld_express", "textworld-express==1.1.0")
        self._env: Any = package.TextWorldExpressEnv(envStepLimit=_NO_LIMIT)
        try:
            if game not in self._env.getGameNames():
                raise ValueError(f"no game {game}; there are {', '.join(self._env.getGameNames())}")
            self._env.load(gameName=game, gameParams=params)
        except ValueError:
            self._env.close()
            raise
        self._valid: list[str] = []

    def reset(self, game: Game) -> Seen:
        text, infos = self._env.reset(seed=game[1], gameFold=game[0])
        return self._seen(f"{infos['taskDescription']}\n{text}", infos, done=False)

    def step(self, action: str) -> Seen:
        # The package answers `help` by itself, outside of the game; the environment never sends it.
        text, _, done, infos = self._env.step(action)
        return self._seen(text, infos, done=bool(done))

    def valid_actions(self) -> str:
        return " , ".join(self._valid)

    def seeds(self, split: Split) -> list[int]:
        """Return the package's own seeds for training, or those for testing as held out."""
        return list(self._env.getValidSeedsTrain() if split == "train" else self._env.getValidSeedsTest())

    def gold_actions(self, game: Game) -> list[str]:
        self._env.reset(seed=game[1], gameFold=game[0], generateGoldPath=True)
        return list(self._env.getGoldActionSequence())

    def close(self) -> None:
        self._env.close()

    def _seen(self, text: str, infos: dict[str, Any], *, done: bool) -> Seen:
        self._valid = sorted(infos["validActions"])
        return Seen(str(text), min(1.0, max(0.0, float(infos["score"]))), done)


class TextWorldExpress(TextWorld[TextWorldExpressSimulator]):
    """The domain `textworld_express`.

    `game`: cookingworld, twc, coin, mapreader, …; `params`: the package's generator settings (`numLocations=3,…`).

    `num_train`, `num_heldout`: at most so many of the package's training and test seeds. `num_simulators`: Java
    processes in every actor that plays. The other settings are those of the environment (WorldSettings).
    """

    name = "textworld_express"

    def __init__(
        self,
        *,
        game: str = "cookingworld",
        params: str = "",
        num_train: int = 1000,
        num_heldout: int = 200,
        max_turns: int = 50,
        reward: Reward = "progress",
        max_observation_chars: int = 2000,
        num_simulators: int = 2,
    ) -> None:
        for setting, count in {"num_train": num_train, "num_heldout": num_heldout}.items():
            if count < 1:
                raise ConfigError(f"env.args.{setting}={count}: must be ≥ 1")
        # The pool starts simulators when they are needed; what is missing is told now.
        load_package("textworld_express", "textworld-express==1.1.0")
        super().__init__(
            SimulatorPool(lambda: TextWorldExpressSimulator(game, params), num_simulators),
            WorldSettings(max_turns=max_turns, reward=reward, max_observation_chars=max_observation_chars),
        )
        self._game = game
        self._counts: dict[Split, int] = {"train": num_train, "heldout": num_heldout}

    def list_tasks(self) -> dict[Split, list[Task]]:
        return {split: self._of_split(split, fold) for split, fold in _FOLDS.items()}

    def game_of(self, task: Task) -> Game:
        seed = task.data["seed"]
        assert isinstance(seed, int)
        return str(task.data["fold"]), seed

    def _of_split(self, split: Split, fold: str) -> list[Task]:
        seeds = self._pool.ask_for_tasks(lambda simulator: simulator.seeds(split))[: self._counts[split]]
        return [
            Task(
                id=f"{self._game}-{split}-{seed}",
                domain=self.name,
                kind=self._game,
                data={"fold": fold, "seed": seed},
            )
            for seed in seeds
        ]
