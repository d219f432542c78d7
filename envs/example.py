"""A complete environment of one's own, short enough for the README: guess a number from hints. `env.name` for it is
`envs.example:GuessNumber`; a class in a module of yours is named the same way.
"""

import copy
import re
from collections.abc import Sequence
from random import Random

from trace_async.types import Message, Prompt, Split, StepResult, Task


class GuessEnv:
    """The state of one task. What the model did wrong is an observation, never an exception."""

    def __init__(self, task: Task, max_turns: int) -> None:
        self.secret, self.turns_left = int(str(task.data["secret"])), max_turns

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content="find my number from 1 to 15"),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self.turns_left -= 1
        guess = re.fullmatch(r"\s*guess (\d{1,3})\s*", action)
        if guess and int(guess[1]) == self.secret:
            return StepResult(done=True, reward=1.0, metrics={"turns_left": float(self.turns_left)})
        if self.turns_left == 0:
            return StepResult(done=True, reward=0.0)
        hint = "write guess and a number"
        if guess:
            hint = "lower" if int(guess[1]) > self.secret else "higher"
        return StepResult(messages=(Message(role="tool", content=hint),))

    async def fork(self) -> "GuessEnv":
        return copy.copy(self)

    async def close(self) -> None: ...


class GuessNumber:
    """The domain: its tasks, and demonstrations that let `make-policy` build a small start policy."""

    name = "guess"

    def __init__(self, *, max_turns: int = 4) -> None:
        self.max_turns = max_turns

    def tasks(self, split: Split) -> Sequence[Task]:
        numbers = [n for n in range(1, 16) if (n % 3 == 0) == (split == "heldout")]
        return [Task(id=f"{split}-{n}", domain=self.name, kind="guess", data={"secret": n}) for n in numbers]

    def make_env(self, task: Task) -> GuessEnv:
        return GuessEnv(task, self.max_turns)

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        wrong = [n for n in range(1, 16) if n != task.data["secret"]]
        last = rng.choice([task.data["secret"], wrong[0]])
        return [f"guess {n}" for n in (*rng.sample(wrong, self.max_turns - 1), last)]

    def vocabulary(self) -> Sequence[str]:
        return ["find my number from 1 to 15 guess write and a lower higher", *map(str, range(16))]
