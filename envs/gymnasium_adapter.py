"""Text environments with Gymnasium's interface, as a domain: `reset(seed=…)` and `step(text)` are all that is asked.

A task is a seed. Forking is a deep copy, so the environment must keep all its state in itself; or, with `fork: replay`,
a fresh environment in which the same is done again (envs/replay.py).
"""

import copy
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from envs.replay import ReplayEnv
from trace_async.config import ConfigError
from trace_async.env import Env, EnvError
from trace_async.types import Json, Message, Prompt, Split, StepResult, Task


class TextEnv(Protocol):
    """The interface of `gymnasium.Env`, with texts as observations and actions."""

    def reset(self, *, seed: int) -> tuple[str, Mapping[str, Any]]: ...

    def step(self, action: str) -> tuple[str, float, bool, bool, Mapping[str, Any]]:
        """Observation, reward, terminated, truncated, info."""
        ...


class GymnasiumEnv:
    """One episode. Its return (`reward_from` sum) or last reward is the verifier's reward, in `env.reward_range`."""

    def __init__(self, make: Callable[[], TextEnv], seed: int, reward_from: Literal["sum", "last"], max_turns: int):
        self._make = make
        self._seed = seed
        self._reward_from = reward_from
        self._turns_left = max_turns
        self._return = 0.0
        self._env: TextEnv | None = None

    async def init(self) -> Prompt:
        self._env = self._make()
        observation, _ = self._env.reset(seed=self._seed)
        return Prompt(messages=(Message(role="user", content=_text(observation)),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        """Hand a turn on. One that was cut at its limit goes as it is: the wrapped environment knows no difference."""
        assert self._env is not None, "init comes first"
        try:
            observation, reward, terminated, ended, _ = self._env.step(action)
        except Exception as error:
            raise EnvError(f"the environment raised {type(error).__name__}: {error}") from error
        self._turns_left -= 1
        self._return = self._return + float(reward) if self._reward_from == "sum" else float(reward)
        if not (terminated or ended or self._turns_left <= 0):
            return StepResult(messages=(Message(role="tool", content=_text(observation)),))
        return StepResult(done=True, reward=self._return)

    async def fork(self) -> "GymnasiumEnv":
        twin = copy.copy(self)
        twin._env = copy.deepcopy(self._env)
        return twin

    async def close(self) -> None:
        close = getattr(self._env, "close", None)
        self._env = None
        if close is not None:
            close()


class Gymnasium:
    """`env`: `package.module:callable` that makes a TextEnv, called with `env_args`. `fork`: copy | replay.

    The seeds from 0 on are for training, the next `num_heldout` are held out.
    """

    name = "gymnasium"

    def __init__(
        self,
        *,
        env: str,
        env_args: Mapping[str, Json] | None = None,
        num_train: int = 1000,
        num_heldout: int = 200,
        reward_from: Literal["sum", "last"] = "sum",
        max_turns: int = 20,
        fork: Literal["copy", "replay"] = "copy",
    ) -> None:
        module_name, _, attribute = env.partition(":")
        try:
            factory = getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"env.args.env={env}: cannot be found as package.module:callable ({error})") from error
        if reward_from not in ("sum", "last"):
            raise ConfigError(f"env.args.reward_from={reward_from}: sum or last")
        if fork not in ("copy", "replay"):
            raise ConfigError(f"env.args.fork={fork}: copy or replay")
        self._fork = fork
        self._make: Callable[[], TextEnv] = lambda: factory(**dict(env_args or {}))
        self._seeds: dict[Split, range] = {
            "train": range(num_train),
            "heldout": range(num_train, num_train + num_heldout),
        }
        self._reward_from: Literal["sum", "last"] = reward_from
        self._max_turns = max_turns

    def tasks(self, split: Split) -> Sequence[Task]:
        return [
            Task(id=f"seed-{seed}", domain=self.name, kind="episode", data={"seed": seed})
            for seed in self._seeds[split]
        ]

    def make_env(self, task: Task) -> Env:
        def make() -> GymnasiumEnv:
            return GymnasiumEnv(self._make, int(str(task.data["seed"])), self._reward_from, self._max_turns)

        return ReplayEnv(make) if self._fork == "replay" else make()


def _text(observation: object) -> str:
    if not isinstance(observation, str):
        raise EnvError(f"the observation is {type(observation).__name__}; only texts can be read by a language model")
    return observation or "(nothing)"
