"""A task that even a random tiny policy solves half of the time: say words with an even number, two turns long."""

from collections.abc import Sequence

from trace_async.types import Message, Prompt, Split, StepResult, Task


class ParityEnv:
    """Reward 1 when more of the words said in two turns have an even number than an odd one."""

    def __init__(self, task: Task, score: int = 0, turns: int = 0) -> None:
        self.task, self.score, self.turns = task, score, turns

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content=f"w{self.task.data['word']}"),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        numbers = [int(word[1:]) for word in action.split() if word[:1] == "w" and word[1:].isdigit()]
        self.score += sum(1 if number % 2 == 0 else -1 for number in numbers)
        self.turns += 1
        if self.turns == 2:
            return StepResult(done=True, reward=float(self.score > 0))
        return StepResult(messages=(Message(role="tool", content=f"w{50 + max(-9, min(9, self.score))}"),))

    async def fork(self) -> "ParityEnv":
        return ParityEnv(self.task, self.score, self.turns)

    async def close(self) -> None: ...


class Parity:
    name = "parity"

    def tasks(self, split: Split) -> Sequence[Task]:
        words = range(10, 90, 2) if split == "train" else range(11, 90, 2)
        return [Task(id=f"{split}-{word}", domain=self.name, kind="easy", data={"word": word}) for word in words]

    def make_env(self, task: Task) -> ParityEnv:
        return ParityEnv(task)
