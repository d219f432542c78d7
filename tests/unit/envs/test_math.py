"""The mathematics domain: generated problems, real file formats, the turns of an episode, the verifier."""

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest

from envs.math.answers import AnswerChecker, parse_number, unbox
from envs.math.domain import Math, MathFiles, load_problems
from envs.math.problems import make_problem
from tests.support.paths import SHARED_DATA
from trace_async.config import ConfigError
from trace_async.env import Demonstrator, EnvError
from trace_async.types import Task

GSM8K = SHARED_DATA / "gsm8k_test_600.jsonl"
ANN = {
    "question": "monday : ann has 37 pens . tuesday : ann doubles them . how many pens has ann on tuesday ?",
    "answer": "74",
    "steps": [["monday", "has 37", "37", ""], ["tuesday", "doubles them", "n * 2", "n + 2"]],
}


@pytest.fixture
async def domain() -> AsyncIterator[Math]:
    domain = Math(num_train=200, num_heldout=100)
    yield domain
    await domain.close()


def task(data: dict) -> Task:
    return Task(id="t", domain="math", kind="middle", data=data)


async def test_an_episode_word_for_word(domain: Math) -> None:
    env = domain.make_env(task(ANN))
    assert (await env.init()).messages[0].content == ANN["question"]
    turns = [
        ("monday has 37 <python> n = 37 ; n </python>", "37"),
        ("<python> n = n * 2 ; n </python>", "74"),
        ("<python> 1 / 0 </python>", "error : ZeroDivisionError"),
        ("<python> m = n </python>", "no output"),
        ("<python> (n, -1.5) </python>", "(74, -1.5)"),
        ("hm", "error : no action found ; end your turn with <python> code </python> or <answer> result </answer>"),
    ]
    for action, observation in turns:
        result = await env.step(action)
        assert [message.content for message in result.messages] == [observation]
    result = await env.step("<answer> 74 </answer>")
    assert (result.done, result.reward) == (True, 1.0)
    assert result.metrics == {"turns": 7.0, "failed_turns": 2.0}


async def test_a_truncated_turn_is_not_carried_out(domain: Math) -> None:
    env = domain.make_env(task(ANN))
    result = await env.step("<answer> 74 </answer>", truncated=True)
    assert not result.done
    assert "cut at its token limit" in result.messages[0].content


async def test_the_last_turn_ends_without_reward(domain: Math) -> None:
    env = Math(max_turns=2, num_train=1, num_heldout=1).make_env(task(ANN))
    assert not (await env.step("hm")).done
    assert (await env.step("hm")).reward == 0.0


async def test_forks_do_not_see_each_other(domain: Math) -> None:
    env = domain.make_env(task(ANN))
    await env.step("<python> n = 10 ; n </python>")
    fork = await env.fork()
    await env.step("<python> n = n * 2 ; n </python>")
    assert (await fork.step("<python> n = n + 5 ; n </python>")).messages[0].content == "15"
    assert (await env.step("<python> n </python>")).messages[0].content == "20"


def test_demonstrations_err_as_told() -> None:
    right = Math(misread_rate=0, early_rate=0).demonstrate(task(ANN), Random(0))
    wrong = Math(misread_rate=1, early_rate=0).demonstrate(task(ANN), Random(0))
    assert list(right) == [
        "monday has 37 <python> n = 37 ; n </python>",
        "tuesday doubles them <python> n = n * 2 ; n </python>",
        "<answer> 74 </answer>",
    ]
    assert list(wrong[1:]) == ["tuesday doubles them <python> n = n + 2 ; n </python>", "<answer> 39 </answer>"]


@pytest.mark.parametrize("rate", [0.0, 1.0])
async def test_faultless_demonstrations_succeed_and_misread_ones_mostly_fail(rate: float) -> None:
    domain = Math(num_train=120, num_heldout=1, misread_rate=rate, early_rate=0)
    known = set(domain.vocabulary())
    rewards: dict[str, list[float]] = {"easy": [], "middle": [], "hard": []}
    for one in domain.tasks("train"):
        env = domain.make_env(one)
        text = [(await env.init()).messages[0].content]
        for action in domain.demonstrate(one, Random(0)):
            result = await env.step(action)
            text += [action, *(message.content for message in result.messages)]
        assert set(re.sub(r"-?\d+", "0", " ".join(text)).split()) <= known
        assert result.reward is not None
        rewards[one.kind].append(result.reward)
    assert set(rewards["easy"]) == {1.0}
    if rate == 0:
        assert set(rewards["middle"] + rewards["hard"]) == {1.0}
    else:
        assert sum(rewards["middle"]) < 0.2 * len(rewards["middle"])
    await domain.close()


def test_tasks_are_fixed_by_the_seed_and_splits_do_not_overlap() -> None:
    one, two, other = (Math(seed=s, num_train=300, num_heldout=200) for s in (1, 1, 2))
    assert list(one.tasks("train")) == list(two.tasks("train"))
    assert list(one.tasks("train")) != list(other.tasks("train"))
    questions = {split: {t.data["question"] for t in one.tasks(split)} for split in ("train", "heldout")}
    assert (len(questions["train"]), len(questions["heldout"])) == (300, 200)
    assert not questions["train"] & questions["heldout"]
    assert isinstance(one, Demonstrator)


def test_problems_stay_whole_and_small() -> None:
    rng = Random(3)
    for _ in range(300):
        problem = make_problem("hard", rng)
        assert 1 <= int(str(problem["answer"])) <= 99


def test_unknown_shares_and_limits_name_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"env\.args\.shares"):
        Math(shares={"simple": 1})
    with pytest.raises(ConfigError, match=r"env\.args\.limits"):
        Math(limits={"minutes": 1})
    with pytest.raises(ConfigError, match=r"env\.args\.max_turns=0: must be ≥ 1"):
        Math(max_turns=0)


async def test_text_mode_keeps_code_as_it_is_and_checks_with_math_verify(tmp_path: Path) -> None:
    path = tmp_path / "aime.jsonl"
    rows = [{"problem": "Half?", "answer": "\\frac{1}{2}"}, {"Problem": "x", "Answer": 33, "ID": "2024-I-1"}]
    path.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps({"problem": "x", "answer": 33}) + "\n")
    domain = MathFiles(path=str(path), num_heldout=1)
    assert [t.data["answer"] for t in (*domain.tasks("train"), *domain.tasks("heldout"))] == ["\\frac{1}{2}", "33"]
    env = domain.make_env(domain.tasks("train")[0])
    assert [message.role for message in (await env.init()).messages] == ["system", "user"]
    result = await env.step("Let me see.\n<python>\nx = 2\nfor i in range(2):\n    print(i, x / 4)\n</python>")
    assert result.messages[0].content == "0 0.5\n1 0.5"
    result = await env.step("<python>y</python>")
    assert result.messages[0].content == "error : NameError: name 'y' is not defined"
    assert (await env.step("<answer>\\boxed{\\dfrac{2}{4}}</answer>")).reward == 1.0
    await domain.close()


def test_file_errors_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    good = json.dumps({"question": "q", "answer": "#### 4"})
    for bad, found in (
        ("{", r"p\.jsonl:3: not JSON"),
        ('{"question": "q"}', r"p\.jsonl:3: field 'answer' is missing"),
        ('{"question": 5, "answer": "4"}', r"p\.jsonl:3: field 'question' must be str"),
        ('{"question": "q", "answer": " #### "}', r"p\.jsonl, problem 2: the answer is empty"),
    ):
        path.write_text(good + "\n\n" + bad + "\n")
        with pytest.raises(ValueError, match=found):
            load_problems(path)
    with pytest.raises(ValueError, match="no such file"):
        load_problems(tmp_path / "none.jsonl")
    path.write_text(json.dumps([{"Problem": "x", "Answer": 33, "ID": "2024-I-1"}]))
    assert load_problems(path)[0].data == {"question": "x", "answer": "33"}


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K sample is not here")
async def test_gsm8k_rows_load_and_their_own_answers_are_right() -> None:
    tasks = load_problems(GSM8K)
    assert len(tasks) == 600
    assert tasks[0].data["answer"] == "18"
    checker = AnswerChecker("numeric")
    for one in tasks:
        gold = str(one.data["answer"])
        assert parse_number(gold) is not None
        assert await checker.is_right(f"${gold}", gold)
        assert not await checker.is_right(f"{gold}7", gold)


def test_numbers_are_read_exactly() -> None:
    for text, value in (("1,234", 1234), ("$5.50", 5.5), ("3/4", 0.75), ("-2.", -2), (" 12 % ", 12), (".5", 0.5)):
        assert parse_number(text) == value
    for text in ("", "1,23", "3/0", "1e3", "٣", "2 3", "x", "--2", "9" * 200):
        assert parse_number(text) is None
    assert unbox("so \\boxed{\\frac{1}{2}} or") == "\\frac{1}{2}"
    assert unbox("\\boxed{3") == "\\boxed{3"


async def test_several_answers_are_not_one() -> None:
    checker = AnswerChecker()
    for answer in ("3 or 4", "$3$ $4$", "3 \\] \\[ 4", "\\boxed{3} and 4 \\boxed{", "3\n4", "x" * 1000):
        assert not await checker.is_right(answer, "\\frac{8}{2}")
    assert await checker.is_right("\\sqrt{16}", "\\frac{8}{2}")
    await checker.close()


async def test_an_answer_that_never_ends_is_wrong_and_the_checker_goes_on() -> None:
    checker = AnswerChecker(cpu_limit_s=2)
    assert not await checker.is_right("9^{9^{9^9}}", "\\pi")
    assert await checker.is_right("\\frac{\\pi}{1}", "\\pi")
    await checker.close()
    await checker.close()


async def test_a_checker_that_is_held_up_is_our_failure_and_recovers() -> None:
    checker = AnswerChecker(cpu_limit_s=0.05)  # three seconds on the wall
    process = await checker._start()
    process.send_signal(signal.SIGSTOP)
    checker._loop = asyncio.get_running_loop()
    with pytest.raises(EnvError, match="math-verify gives no verdict for 3 s"):
        await checker.is_right("\\frac{\\pi}{1}", "\\pi")
    assert process.returncode is not None


async def test_hostile_programs_are_observations_and_the_rollout_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "4"}\n{"problem": "b", "answer": "5"}\n')
    domain = MathFiles(path=str(path), num_heldout=1, max_turns=20, max_observation_chars=300, limits={"seconds": 0.2})
    env = domain.make_env(domain.tasks("train")[0])
    await env.step("<python>n = 4</python>")
    for code, said in (
        ("while True: pass", "error : TimeoutError: "),
        ("[0] * 10**10", "error : MemoryError: memory limit exceeded"),
        ("open('/etc/passwd').read()", "error : PermissionError: Permission denied"),
        ("import socket", "error : ModuleNotFoundError: No module named 'socket'"),
        ("def f(): return f()\nf()", "error : RecursionError: maximum recursion depth exceeded"),
        ("print('x' * 10**6)", "x" * 300 + " [ cut ]"),
    ):
        observation = (await env.step(f"<python>{code}</python>")).messages[0].content
        assert observation.startswith(said)
        assert len(observation) <= 310
    assert (await env.step("<python>n</python>")).messages[0].content == "4"
    assert (await env.step("<answer>4</answer>")).reward == 1.0
    await domain.close()
