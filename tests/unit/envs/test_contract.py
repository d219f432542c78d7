"""`env check`: good environments pass, and each broken promise is found and named."""

import asyncio
import copy
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from envs import load_domain
from envs.contract import plays
from envs.contract.check import check_domain
from envs.contract.plays import Finding
from envs.example import GuessEnv, GuessNumber
from envs.functions.domain import Functions
from envs.gymnasium_adapter import Gymnasium
from envs.math.domain import Math, MathFiles
from envs.mixed import Mixed
from envs.multihop.domain import MultiHop
from envs.multihop.qa_files import QaFiles
from scripts.cli import main
from tests.support.paths import ROOT
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import Domain, EnvError
from trace_async.types import Message, Prompt, StepResult, Task


def errors(domain: Domain) -> str:
    return "\n".join(finding.text for finding in check_domain(domain, num_tasks=2) if finding.level == "error")


@pytest.mark.parametrize(
    "make",
    [
        GuessNumber,
        lambda: Math(num_train=20, num_heldout=20),
        lambda: Functions(num_train=20, num_heldout=20),
        lambda: Mixed(domains={"math": {}, "functions": {}, "envs.example:GuessNumber": {"weight": 2}}),
        lambda: Gymnasium(env="tests.unit.envs.test_contract:Counter", num_train=5, num_heldout=5),
        lambda: MultiHop(mix={"easy-1hop": 1.0}),
        lambda: (
            load_domain(EnvConfig(name="bfcl")) if importlib.util.find_spec("bfcl_eval") else pytest.skip("no BFCL")
        ),
    ],
)
def test_good_environments_pass(make: Callable[[], Domain]) -> None:
    assert errors(make()) == ""


def test_domains_of_files_pass(tmp_path: Path) -> None:
    context = [[name, [f"{name} is a town of {size} people . "]] for size, name in enumerate(("rome", "oslo"), 5)]
    rows = [
        {"_id": f"{size}", "question": f"how many live in {name} ?", "answer": f"{size}", "context": context}
        for size, (name, _) in enumerate(context, 5)
    ]
    for name in ("train", "heldout"):
        (tmp_path / f"{name}.json").write_text(json.dumps([rows.pop()]))
    assert errors(QaFiles(questions=f"{tmp_path}/train.json", heldout=f"{tmp_path}/heldout.json")) == ""
    (tmp_path / "problems.jsonl").write_text('{"problem": "a", "answer": "4"}\n{"problem": "b", "answer": "5"}\n')
    assert errors(MathFiles(path=f"{tmp_path}/problems.jsonl", num_heldout=1)) == ""


class Broken(GuessNumber):
    """A guessing domain whose environments are of the class `env`."""

    def __init__(self, env: type[GuessEnv]) -> None:
        super().__init__()
        self.env = env

    def make_env(self, task: Task) -> GuessEnv:
        return self.env(task, self.max_turns)


class Moody(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        result = await super().step(action)
        note = Message(role="tool", content=str(Random().random()))
        return result if result.done else StepResult(messages=(*result.messages, note))


class NoFork(GuessEnv):
    async def fork(self) -> GuessEnv:
        return self


class SharedList(GuessEnv):
    def __init__(self, task: Task, max_turns: int) -> None:
        super().__init__(task, max_turns)
        self.said: list[str] = []

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self.said.append(action)
        result = await super().step(action)
        return result if result.done else StepResult(messages=(Message(role="tool", content=str(self.said)),))

    async def fork(self) -> GuessEnv:
        return copy.copy(self)


class Raising(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        int(action.split()[-1])
        return await super().step(action)


class Generous(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        return StepResult(done=True, reward=1.0)


class TooMuch(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        return StepResult(done=True, reward=7.0)


class Stingy(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        result = await super().step(action)
        return StepResult(done=True, reward=0.0) if result.done else result


class Endless(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        return StepResult(messages=(Message(role="tool", content="go on"),))


class Leaking(GuessEnv):
    kept: list[int] = []  # noqa: RUF012

    async def init(self) -> Prompt:
        self.kept.append(os.open(os.devnull, os.O_RDONLY))
        return await super().init()


class Hanging(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        await asyncio.sleep(3600)
        return await super().step(action)


class Parrot(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        return StepResult(messages=(Message(role="assistant", content=action),))


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        (Moody, "the same turns, played again, give another result (turn 1)"),
        (NoFork, "see each other"),
        (SharedList, "see each other"),
        (Raising, "raises ValueError"),
        (Generous, "random turns are rewarded in 100% of the plays"),
        (Generous, "alone is rewarded with 1.0"),
        (Generous, "a demonstration does not end with the task"),
        (TooMuch, "the reward 7.0 is outside of [0, 1]"),
        (Stingy, "no demonstration is ever rewarded"),
        (Endless, "not over after 200 useless turns"),
        (Leaking, "file descriptors left open"),
        (Parrot, "an observation has the role assistant"),
    ],
)
def test_broken_promises_are_named(env: type[GuessEnv], problem: str) -> None:
    assert problem in errors(Broken(env))
    for descriptor in Leaking.kept:
        os.close(descriptor)
    Leaking.kept.clear()


def test_a_step_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plays, "_STEP_TIMEOUT_S", 0.01)
    assert "takes longer than 0.01 s" in errors(Broken(Hanging))


class Throwing(GuessEnv):
    async def init(self) -> Prompt:
        raise KeyError("secret")


class Plain(GuessEnv):
    def step(self, action: str, *, truncated: bool = False) -> str:  # type: ignore[override]
        return action


class Texts(GuessEnv):
    async def step(self, action: str, *, truncated: bool = False) -> str:  # type: ignore[override]
        return action


class Unclosable(GuessEnv):
    async def close(self) -> None:
        raise OSError("busy")


class ForksNothing(GuessEnv):
    async def fork(self) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        (Throwing, r"init raises KeyError: 'secret' \(test_contract.py, line \d+\)"),
        (Plain, "make_env gives a Plain without async step"),
        (Texts, "gives a str instead of StepResult"),
        (Unclosable, "close raises OSError: busy"),
        (ForksNothing, "fork gives None without async init, step, fork, close"),
    ],
)
def test_environments_that_are_none_are_described(env: type[GuessEnv], problem: str) -> None:
    assert re.search(problem, errors(Broken(env)))


class Empty:
    name = "empty"


class Dictionaries(GuessNumber):
    def tasks(self, split: str) -> list[dict]:  # type: ignore[override]
        return [{"id": f"{split}-1"}]


class NoList(GuessNumber):
    def tasks(self, split: str) -> None:  # type: ignore[override]
        return None


class Forgetful(GuessNumber):
    def demonstrate(self, task: Task, rng: Random) -> list[str]:
        raise LookupError("forgotten")


@pytest.mark.parametrize(
    ("domain", "problem"),
    [
        (Empty, "the domain Empty has no tasks, make_env"),
        (Dictionaries, r"tasks\('train'\) holds a dict instead of Task"),
        (NoList, r"tasks\('train'\) gives None instead of Sequence"),
        (Forgetful, "demonstrate raises LookupError: forgotten"),
    ],
)
def test_domains_that_are_none_are_described(domain: type, problem: str) -> None:
    assert re.search(problem, errors(domain()))


def test_a_module_in_the_working_directory_is_found_and_its_faults_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    example = (ROOT / "envs" / "example.py").read_text()
    (tmp_path / "my_game.py").write_text(example.replace("GuessNumber", "MyGame"))
    assert main(["env", "check", "my_game:MyGame", "--tasks", "1"]) == 0
    assert "my_game:MyGame keeps the contract" in capsys.readouterr().out
    for name, code, problem in (
        ("my_slip", "import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("my_typo", "def f(:", "SyntaxError: invalid syntax (my_typo.py, line 1)"),
        ("my_crash", "\n1 / 0", "ZeroDivisionError: division by zero (my_crash.py, line 2)"),
        ("my_disk", "class C:\n  def __init__(self):\n    open('none')", "FileNotFoundError: [Errno 2]"),
    ):
        (tmp_path / f"{name}.py").write_text(code)
        assert main(["env", "check", f"{name}:C"]) == 2
        assert problem in capsys.readouterr().err


class OverlappingSplits(GuessNumber):
    def tasks(self, split: str) -> list[Task]:
        return list(super().tasks("train"))


class NewTasksEachTime(GuessNumber):
    def tasks(self, split: str) -> list[Task]:
        secret = Random().randrange(10**9)
        return [Task(id=f"{split}", domain="guess", kind="guess", data={"secret": secret})]


def test_wrong_splits_are_named() -> None:
    assert "is in train and in heldout" in errors(OverlappingSplits())
    assert "gives other tasks the second time" in errors(NewTasksEachTime())


def test_the_command_reports_and_returns_a_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "check", "envs.example:GuessNumber", "--tasks", "2", "env.args.max_turns=3"]) == 0
    assert "keeps the contract" in capsys.readouterr().out
    assert main(["env", "check", "tests.unit.envs.test_contract:OverlappingSplits", "--tasks", "2"]) == 1
    assert "breaks the contract" in capsys.readouterr().out
    assert main(["env", "check", "mathh"]) == 2


def test_findings_of_a_good_environment_measure_time() -> None:
    findings = check_domain(GuessNumber(), num_tasks=2)
    assert Finding("info", "10 tasks in train") in findings
    assert any("ms on average" in finding.text for finding in findings)


class Counter:
    """A Gymnasium-style text environment: say "up" as often as the seed's number tells."""

    def reset(self, *, seed: int) -> tuple[str, dict]:
        self.left = 2 + seed % 3
        return f"{self.left} to go", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        if "boom" in action:
            raise RuntimeError("boom")
        self.left -= action.strip() == "up"
        return f"{self.left} to go", float(self.left == 0), self.left == 0, False, {}


async def test_gymnasium_environments_play_and_fork() -> None:
    domain = Gymnasium(env="tests.unit.envs.test_contract:Counter", num_train=3, num_heldout=2, max_turns=4)
    assert [task.id for task in domain.tasks("heldout")] == ["seed-3", "seed-4"]
    env = domain.make_env(domain.tasks("train")[0])
    assert (await env.init()).messages[0].content == "2 to go"
    assert (await env.step("up")).messages[0].content == "1 to go"
    fork = await env.fork()
    assert (await fork.step("up")).reward == 1.0
    assert (await env.step("down")).messages[0].content == "1 to go"
    with pytest.raises(EnvError, match="raised RuntimeError: boom"):
        await env.step("boom")
    await env.step("down")
    assert (await env.step("down")).reward == 0.0
    await env.close()


def test_gymnasium_settings_are_named() -> None:
    with pytest.raises(ConfigError, match=r"env\.args\.env"):
        Gymnasium(env="no.such.module:Thing")


def test_the_example_fits_the_readme() -> None:
    source = (ROOT / "envs" / "example.py").read_text()
    code = [line for line in source.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 45
