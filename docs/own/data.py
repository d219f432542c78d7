"""Questions of one's own: a JSONL file with a question and an answer a line, and two tries to answer."""

import copy
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from trace_async.types import Message, Prompt, Split, StepResult, Task


class QuestionEnv:
    """One question. The policy writes its answer as plain text; a wrong one may be put right once."""

    def __init__(self, task: Task) -> None:
        self.question, self.answer = str(task.data["question"]), str(task.data["answer"])
        self.tries_left = 2

    async def init(self) -> Prompt:
        return Prompt(messages=(Message(role="user", content=self.question),))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self.tries_left -= 1
        if action.strip().casefold() == self.answer.strip().casefold():
            return StepResult(done=True, reward=1.0)
        if self.tries_left == 0:
            return StepResult(done=True, reward=0.0)
        return StepResult(messages=(Message(role="user", content="That is not right. Once more:"),))

    async def fork(self) -> "QuestionEnv":
        return copy.copy(self)

    async def close(self) -> None: ...


class Questions:
    """The domain. `path`: a JSONL file of {"question": …, "answer": …}. A tenth of it, always the same, is held out."""

    name = "questions"

    def __init__(self, *, path: str) -> None:
        self.rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]

    def tasks(self, split: Split) -> Sequence[Task]:
        tasks = []
        for row in self.rows:
            digest = hashlib.sha256(row["question"].encode()).hexdigest()
            if (int(digest, 16) % 10 == 0) == (split == "heldout"):
                tasks.append(Task(id=digest[:12], domain=self.name, kind="question", data=row))
        return tasks

    def make_env(self, task: Task) -> QuestionEnv:
        return QuestionEnv(task)
