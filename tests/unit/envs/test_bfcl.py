"""BFCL multi-turn: replayed ground truths succeed on all 200 tasks, less than that does not."""

import json
from pathlib import Path
from random import Random
from typing import Any, cast

import pytest

pytest.importorskip("bfcl_eval", reason="the package bfcl-eval is not installed")

from envs.actions import ToolCall
from envs.functions.bfcl import Bfcl, BfclBackend, load_bfcl, parse_python_call
from envs.functions.domain import write_call
from tests.support.paths import SHARED_DATA
from trace_async.types import Task

SAMPLE = SHARED_DATA / "bfcl"
DOMAIN = Bfcl()
TASKS = [*DOMAIN.tasks("train"), *DOMAIN.tasks("heldout")]


def data_of(task: Task) -> Any:
    """What the task was read from; JSON whose shape the tests know."""
    return task.data


def right_calls(task: Task) -> list[list[ToolCall]]:
    docs = BfclBackend(task).docs
    return [[parse_python_call(text, docs) for text in turn] for turn in data_of(task)["ground_truth"]]


async def play(task: Task, calls: list[list[ToolCall]]) -> float:
    env = DOMAIN.make_env(task)
    await env.init()
    for turn in calls:
        for call in turn:
            result = await env.step(write_call(call.name, call.arguments))
            assert not result.done
            assert result.messages[0].role == "tool"
        result = await env.step("done")
        if result.done:
            break
    assert result.reward is not None
    return result.reward


async def test_ground_truths_succeed_on_all_tasks() -> None:
    assert len(TASKS) == 200
    assert [task.id for task in TASKS if await play(task, right_calls(task)) != 1.0] == []


async def test_random_calls_and_no_calls_never_succeed() -> None:
    rng = Random(0)
    for task in TASKS:
        names = [*BfclBackend(task).docs]
        assert await play(task, [[ToolCall(rng.choice(names), {}) for _ in turn] for turn in right_calls(task)]) == 0.0
        assert await play(task, [[] for _ in right_calls(task)]) == 0.0


async def test_leaving_out_one_call_fails_mostly() -> None:
    rng = Random(1)
    rewards = []
    for task in TASKS:
        calls = right_calls(task)
        turn = rng.choice([turn for turn in calls if turn])
        turn.pop(rng.randrange(len(turn)))
        rewards.append(await play(task, calls))
    assert sum(rewards) < 0.1 * len(rewards)


async def test_forks_do_not_see_each_other() -> None:
    task = TASKS[0]
    calls = right_calls(task)
    env = DOMAIN.make_env(task)
    await env.step(write_call(calls[0][0].name, calls[0][0].arguments))
    fork = await env.fork()
    await fork.step(write_call("mkdir", {"dir_name": "other"}))
    rewards = []
    for one in (env, fork):
        rest = [calls[0][1:], *calls[1:]]
        for turn in rest:
            for call in turn:
                result = await one.step(write_call(call.name, call.arguments))
            result = await one.step("done")
            if result.done:
                break
        rewards.append(result.reward)
    assert rewards == [1.0, 0.0]


async def test_no_text_is_evaluated_and_arguments_are_bounded(tmp_path: Path) -> None:
    task = next(task for task in TASKS if "MathAPI" in task.data["involved_classes"])
    env = DOMAIN.make_env(task)
    owned = tmp_path / "owned"
    calls: list[tuple[str, dict[str, Any]]] = [
        (f"open('{owned}', 'w')", {}),
        ("__class__", {}),
        ("_load_scenario", {"scenario": {}}),
        ("power", {"base": 10, "exponent": 10**8}),
        ("power", {"base": 10, "exponent": float("1e300")}),
        ("square_root", {"number": 2, "precision": 10**9}),
        ("mean", {"numbers": "().__class__"}),
        ("add", {"a": f"open('{owned}', 'w')", "b": 1}),
        ("add", {"self": 1}),
    ]
    for name, arguments in calls:
        result = await env.step(write_call(name, arguments))
        assert "rror" in result.messages[0].content
    assert not owned.exists()


def test_ground_truth_calls_are_read_strictly() -> None:
    docs = BfclBackend(TASKS[0]).docs
    assert parse_python_call("cd(folder='a')", docs) == ToolCall("cd", {"folder": "a"})
    assert parse_python_call("mv('a', destination='b')", docs) == ToolCall("mv", {"source": "a", "destination": "b"})
    for text in ("cd(", "cd", "a.cd('x')", "os('x')", "cd(open('x'))", "cd(**{'folder': 'a'})", "cd('a', folder='b')"):
        with pytest.raises(ValueError, match=r"call|argument|malformed"):
            parse_python_call(text, docs)


async def test_tools_of_the_task_are_shown_as_json_schemas() -> None:
    task = next(task for task in TASKS if task.data["excluded"])
    prompt = await DOMAIN.make_env(task).init()
    names = {cast(Any, tool["function"])["name"] for tool in prompt.tools}
    assert not names & set(data_of(task)["excluded"])
    assert '"dict"' not in json.dumps(prompt.tools)


@pytest.mark.skipif(not SAMPLE.exists(), reason="the BFCL sample is not here")
def test_the_sample_is_the_package_s_data() -> None:
    sample = load_bfcl(SAMPLE / "multi_turn_base.json", SAMPLE / "multi_turn_base_answer.json")
    # The held-out tasks are a seeded sample, so the two splits together are the file in another order.
    assert sorted(sample, key=lambda task: task.id) == sorted(TASKS, key=lambda task: task.id)


def test_file_errors_name_file_and_task(tmp_path: Path) -> None:
    row = {"id": "x", "question": [[{"role": "user", "content": "hi"}]], "initial_config": {}, "involved_classes": []}
    (tmp_path / "q.json").write_text(json.dumps(row))
    (tmp_path / "a.json").write_text(json.dumps({"id": "y", "ground_truth": [[]]}))
    with pytest.raises(ValueError, match=r"a\.json: no ground truth for x"):
        load_bfcl(tmp_path / "q.json", tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"id": "x", "ground_truth": []}))
    with pytest.raises(ValueError, match="0 turns, its question 1"):
        load_bfcl(tmp_path / "q.json", tmp_path / "a.json")
