"""`envs.example:GuessNumber` whose environment does what `mode` says, every `every`-th time; else it behaves.

    domain = Misbehaving(mode="step_hangs", every=10)

A mode is the name of a method (`init`, `step` …) and what it does there, or of a value that it gives; several are
joined by "+". Counting is per process and mode, so that a run meets each one however its tasks are spread.
"""

import asyncio
import datetime
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from envs.example import GuessEnv, GuessNumber
from trace_async.types import Message, Prompt, Split, StepResult, Task


class Panic(BaseException):
    """As what a library written in Rust raises: no Exception."""


RELEASED = threading.Event()
"""Set by a test at its end, so that what swallows its cancellation ends with the test's event loop."""


async def _swallows() -> None:
    while not RELEASED.is_set():
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(0)


async def _cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)


def _raise(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


ACTS: dict[str, Callable[[], Any]] = {
    "raises": _raise(RuntimeError("no sandbox")),
    "panics": _raise(Panic("index out of bounds")),
    "exits": lambda: sys.exit(3),
    "leaves": _raise(GeneratorExit("left")),
    "hangs": lambda: asyncio.sleep(3600),
    "sleeps": lambda: time.sleep(0.6),
    "swallows": _swallows,
    "cancels": _cancels_itself,
}
REWARDS: dict[str, Any] = {
    "reward_true": True,
    "reward_integer": 1,
    "reward_numpy": np.float32(1.0),
    "reward_array": np.array(1),
    "reward_nan": float("nan"),
    "reward_inf": float("inf"),
    "reward_seven": 7.0,
    "reward_text": "1.0",
    "reward_negative": -1.0,
}
METRICS: dict[str, dict[Any, Any]] = {
    "metric_true": {"found": True},
    "metric_numpy": {"found": np.int64(3)},
    "metric_nan": {"found": float("nan")},
    "metric_none": {"found": None},
    "metric_ours": {"overlong": 0.25},
    "metric_odd_name": {"F1 (%)\n": 0.5},
    "metric_twins": {"F1 (%)": 0.5, "F1 [%]": 0.25},
    "metric_many": {f"m{i}": 1.0 for i in range(1000)},
}
CONTENTS: dict[str, Any] = {
    "content_none": None,
    "content_integer": 5,
    "content_numpy": np.str_("lower"),
    "content_huge": "lower " * 5_000_000,
    "content_control": "lower\x1b[31m\x07\u202e\x00",
    "content_surrogate": "lower \ud800",
    "content_tokens": Message(role="assistant", content="lower", token_ids="abc"),  # type: ignore[arg-type]
    "role_odd": Message(role="narrator", content="lower"),  # type: ignore[arg-type]
}


def _odd(task: Task, **changes: Any) -> Task:
    """The task with fields of kinds that no task may have."""
    return replace(task, **changes)


TASKS: dict[str, Callable[[Task], Any]] = {
    "id_integer": lambda task: _odd(task, id=int(task.id.rpartition("-")[2]) + 100 * ("held" in task.id)),
    "id_escape": lambda task: replace(task, id=f"{task.id}\x1b[2J\u202e\ud800"),
    "data_numpy": lambda task: _odd(
        task, data={"secret": np.int64(str(task.data["secret"])), "at": (1, np.float32(2))}
    ),
    "data_array": lambda task: _odd(task, data={**task.data, "grid": np.arange(3)}),
    "data_digits": lambda task: _odd(task, data={**task.data, "n": 10**5000}),
    "data_date": lambda task: _odd(task, data={**task.data, "made": datetime.date(2026, 1, 1)}),
    "data_nan": lambda task: replace(task, data={**task.data, "price": float("nan")}),
}


class Misbehaving(GuessNumber):
    name = "misbehaving"

    def __init__(self, *, mode: str = "", every: int = 10, max_turns: int = 4) -> None:
        super().__init__(max_turns=max_turns)
        self.modes = mode.split("+") if mode else []
        self.every = every
        self.counts: Counter[str] = Counter()
        self.threads: set[str] = set()

    def is_due(self, mode: str) -> bool:
        if mode not in self.modes:
            return False
        self.counts[mode] += 1
        return self.counts[mode] % self.every == 0

    def act(self, method: str) -> list[Any]:
        """What is due at a method; what is to be awaited is returned."""
        return [ACTS[what]() for what in ACTS if self.is_due(f"{method}_{what}")]

    def tasks(self, split: Split) -> Sequence[Task]:
        tasks = list(super().tasks(split))
        for mode in self.modes:
            if mode in TASKS:
                tasks = [TASKS[mode](task) for task in tasks]
        return tasks

    def make_env(self, task: Task) -> Any:
        self.act("make")
        if self.is_due("make_none"):
            return None
        return MisbehavingEnv(task, self)


class MisbehavingEnv(GuessEnv):
    def __init__(self, task: Task, domain: Misbehaving) -> None:
        super().__init__(task, domain.max_turns)
        self.domain = domain

    async def _act(self, method: str) -> None:
        for waits in self.domain.act(method):
            if waits is not None:
                await waits

    async def init(self) -> Prompt:
        await self._act("init")
        prompt = await super().init()
        if self.domain.is_due("prompt_changes"):
            return replace(prompt, messages=(Message(role="user", content="find a number"),))
        if self.domain.is_due("prompt_long"):
            return replace(prompt, messages=(Message(role="user", content="find my number " * 1000),))
        if self.domain.is_due("prompt_none"):
            return None  # type: ignore[return-value]
        return prompt

    async def step(self, action: str, *, truncated: bool = False) -> Any:
        self.domain.threads.add(threading.current_thread().name)
        await self._act("step")
        result = await super().step(action)
        if not result.done:
            for mode, content in CONTENTS.items():
                if self.domain.is_due(mode):
                    odd = content if isinstance(content, Message) else Message(role="tool", content=content)
                    return StepResult(messages=(odd,))
            return result
        for mode, reward in REWARDS.items():
            if self.domain.is_due(mode):
                return StepResult(done=True, reward=reward)
        for mode, metrics in METRICS.items():
            if self.domain.is_due(mode):
                return StepResult(done=True, reward=result.reward, metrics=metrics)
        if self.domain.is_due("result_none"):
            return None
        return result

    async def fork(self) -> "MisbehavingEnv":
        await self._act("fork")
        if self.domain.is_due("fork_none"):
            return None  # type: ignore[return-value]
        twin = MisbehavingEnv.__new__(MisbehavingEnv)
        twin.__dict__.update(self.__dict__)
        return twin

    async def close(self) -> None:
        await self._act("close")
