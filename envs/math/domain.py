"""Mathematics with a Python tool: code runs in a sandbox whose variables last over turns, answers are verified.

A turn is free thought and then one action: `<python> code </python>` or `<answer> result </answer>`.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

from envs.actions import REASONS, TRUNCATED, Malformed, cut_text, parse_block
from envs.lazy_tasks import check_shares, hold_out
from envs.math import problems as math_problems
from envs.math.answers import AnswerCheck, AnswerChecker
from envs.math.sandbox import Sandbox, SandboxLimits
from trace_async.config import ConfigError
from trace_async.run.dataset import read_rows
from trace_async.types import Message, Prompt, Split, StepResult, Task

INSTRUCTIONS = (
    "Solve the problem. Think step by step. To calculate, end your turn with <python> code </python>: it is run, you "
    "see what it prints and the value of its last line, and variables keep their values in later turns. When you know "
    "the result, end your turn with <answer> result </answer>."
)
_REMINDER = "end your turn with <python> code </python> or <answer> result </answer>"
_NO_OUTPUT = "no output"
_ERROR_TYPES = (
    *("ArithmeticError", "AssertionError", "AttributeError", "Exception", "ImportError", "IndexError", "KeyError"),
    *("MemoryError", "ModuleNotFoundError", "NameError", "NotImplementedError", "OverflowError", "PermissionError"),
    *("RecursionError", "RuntimeError", "SyntaxError", "TimeoutError", "TypeError", "UnboundLocalError"),
    *("ValueError", "ZeroDivisionError"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MathSettings:
    """How long a problem may take, and how much is said."""

    max_turns: int
    """After so many turns without an answer the reward is 0."""
    max_observation_chars: int
    """Longer observations are cut."""
    brief: bool
    """No instructions, and of an error only its type, for policies that know few words."""

    def __post_init__(self) -> None:
        for name in ("max_turns", "max_observation_chars"):
            if getattr(self, name) < 1:
                raise ConfigError(f"env.args.{name}={getattr(self, name)}: must be ≥ 1")


class MathEnv:
    """One problem under way. `task.data`: `question` and `answer`."""

    def __init__(self, task: Task, sandbox: Sandbox, checker: AnswerChecker, settings: MathSettings) -> None:
        self._task = task
        self._sandbox = sandbox
        self._checker = checker
        self._settings = settings
        self._state: bytes | None = None
        self._turns = 0
        self._failed_turns = 0

    async def init(self) -> Prompt:
        question = Message(role="user", content=str(self._task.data["question"]))
        if self._settings.brief:
            return Prompt(messages=(question,))
        return Prompt(messages=(Message(role="system", content=INSTRUCTIONS), question))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self._turns += 1
        block = Malformed(TRUNCATED) if truncated else parse_block(action, ("python", "answer"))
        if isinstance(block, Malformed):
            self._failed_turns += 1
            return self._observe(f"error : {block.reason} ; {_REMINDER}")
        if block.tag == "answer":
            return self._end(float(await self._checker.is_right(block.content, str(self._task.data["answer"]))))
        return self._observe(await self._run(block.content))

    async def fork(self) -> "MathEnv":
        return copy.copy(self)  # a snapshot never changes

    async def close(self) -> None:
        self._state = None

    async def _run(self, code: str) -> str:
        result = await self._sandbox.run(code, self._state)
        self._state = result.state
        self._failed_turns += bool(result.error_type)
        error = f"error : {result.error_type}" if result.error_type else ""
        if error and not self._settings.brief:
            error = f"{error}: {result.error}"
        return "\n".join(part for part in (result.output, error) if part)

    def _observe(self, text: str) -> StepResult:
        if self._turns >= self._settings.max_turns:
            return self._end(0.0)
        content = cut_text(text or _NO_OUTPUT, max_chars=self._settings.max_observation_chars)
        return StepResult(messages=(Message(role="tool", content=content),))

    def _end(self, reward: float) -> StepResult:
        metrics = {"turns": float(self._turns), "failed_turns": float(self._failed_turns)}
        return StepResult(done=True, reward=reward, metrics=metrics)


class Math:
    """Generated word problems (`math_problems`), for small policies; the domain can demonstrate its tasks.

    `shares`: of easy, middle (learnable) and hard problems; `demonstration_shares`: of those that are demonstrated
    (short ones teach faster). `misread_rate`, `early_rate`: errors of demonstrations.
    """

    name = "math"
    in_random_order = True

    def __init__(
        self,
        *,
        seed: int = 0,
        num_train: int = 10_000,
        num_heldout: int = 2_000,
        shares: Mapping[str, float] | None = None,
        demonstration_shares: Mapping[str, float] | None = None,
        misread_rate: float = 0.65,
        early_rate: float = 0.1,
        max_turns: int = 9,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        self._seed = seed
        self._counts: dict[Split, int] = {"train": num_train, "heldout": num_heldout}
        self._shares = check_shares("shares", shares or {"easy": 0.3, "middle": 0.4, "hard": 0.3}, math_problems.LEVELS)
        self._demonstration_shares = check_shares(
            "demonstration_shares",
            demonstration_shares or {"easy": 0.4, "middle": 0.45, "hard": 0.15},
            math_problems.LEVELS,
        )
        self._misread_rate = misread_rate
        self._early_rate = early_rate
        self._settings = MathSettings(max_turns=max_turns, max_observation_chars=200, brief=True)
        self._sandbox = Sandbox(_limits(limits))
        self._checker = AnswerChecker("numeric")
        self._tasks: dict[str, list[Task]] = {}

    def tasks(self, split: Split) -> Sequence[Task]:
        without = [] if split == "heldout" else self.tasks("heldout")
        return self._made(split, self._counts[split], self._shares, without)

    def demonstration_tasks(self) -> Sequence[Task]:
        return self._made("shown", self._counts["train"], self._demonstration_shares, self.tasks("heldout"))

    def _made(self, prefix: str, count: int, shares: Mapping[str, float], without: Sequence[Task]) -> Sequence[Task]:
        if prefix not in self._tasks:
            questions = [str(task.data["question"]) for task in without]
            found = math_problems.problems(shares, count, seed=f"{prefix}-{self._seed}", without=questions)
            self._tasks[prefix] = [
                Task(id=f"math-{prefix}-{index}", domain=self.name, kind=level, data=problem)
                for index, (level, problem) in enumerate(found)
            ]
        return self._tasks[prefix]

    def make_env(self, task: Task) -> MathEnv:
        return MathEnv(task, self._sandbox, self._checker, self._settings)

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        return math_problems.demonstrate(task.data, rng, misread_rate=self._misread_rate, early_rate=self._early_rate)

    def vocabulary(self) -> Sequence[str]:
        said = [*REASONS, _REMINDER, _NO_OUTPUT, "error : ; True False None inf nan cut"]
        return sorted({*math_problems.words(), *_ERROR_TYPES, *(word for text in said for word in text.split())})

    async def close(self) -> None:
        """End the sandbox's workers."""
        await self._sandbox.close()


class MathFiles:
    """Problems from JSONL or JSON files: GSM8K (`question`, `answer` ending in `#### number`), DeepScaleR and AIME
    (`problem`, `answer`).

    Without `heldout_path` a sample of `num_heldout` problems of `path` is held out. A question that comes twice is used
    once. `answer_check`: math_verify | numeric.
    """

    name = "math_files"

    def __init__(
        self,
        *,
        path: str,
        heldout_path: str = "",
        num_heldout: int = 200,
        max_turns: int = 8,
        max_observation_chars: int = 2000,
        answer_check: AnswerCheck = "math_verify",
        limits: Mapping[str, float] | None = None,
    ) -> None:
        rows = _once_each(load_problems(path))
        if heldout_path:
            heldout = _once_each(load_problems(heldout_path))
            if Path(heldout_path).stem == Path(path).stem:  # two files of one name in two folders
                heldout = [replace(task, id=f"heldout-{task.id}") for task in heldout]
        else:
            if not 0 < num_heldout < len(rows):
                raise ConfigError(f"env.args.num_heldout={num_heldout}: {path} has {len(rows)} different problems")
            rows, heldout = hold_out(rows, num_heldout)
        both = {task.data["question"] for task in rows} & {task.data["question"] for task in heldout}
        if both:
            raise ConfigError(
                f"env.args.heldout_path={heldout_path}: {len(both)} of its {len(heldout)} problems are also in {path}, "
                f"such as {str(min(both, key=str))[:80]!r}"
            )
        self._tasks: dict[Split, list[Task]] = {"train": rows, "heldout": heldout}
        self._settings = MathSettings(max_turns=max_turns, max_observation_chars=max_observation_chars, brief=False)
        self._sandbox = Sandbox(_limits(limits))
        self._checker = AnswerChecker(answer_check)

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._tasks[split]

    def make_env(self, task: Task) -> MathEnv:
        return MathEnv(task, self._sandbox, self._checker, self._settings)

    async def close(self) -> None:
        """End the sandbox's workers and the verifier's process."""
        await self._sandbox.close()
        await self._checker.close()


def _once_each(tasks: Sequence[Task]) -> list[Task]:
    """Only the first of those that ask the same: a question in both splits would be learnt by heart."""
    first = {str(task.data["question"]): task for task in reversed(tasks)}
    return [task for task in tasks if first[str(task.data["question"])] is task]


def load_problems(path: str | Path) -> list[Task]:
    """Return the problems of a JSONL file or a JSON list. Raises ValueError naming file and line (or row)."""
    path = Path(path)
    fields = {name.lower(): name for name in read_rows(path, {})[0]}
    question = fields.get("question", fields.get("problem", "question"))
    answer = fields.get("answer", "answer")
    rows = read_rows(path, {question: str, answer: (str, int, float)})
    tasks = []
    for number, row in enumerate(rows, 1):
        gold = str(row[answer]).rpartition("####")[2].strip()
        if not gold:
            raise ValueError(f"{path}, problem {number}: the answer is empty")
        data = {"question": row[question], "answer": gold}
        tasks.append(Task(id=f"{path.stem}-{number}", domain=MathFiles.name, kind=path.stem, data=data))
    return tasks


def _limits(limits: Mapping[str, float] | None) -> SandboxLimits:
    try:
        return SandboxLimits(**dict(limits or {}))  # type: ignore[arg-type]
    except TypeError as error:
        raise ConfigError(f"env.args.limits: {error}") from error
