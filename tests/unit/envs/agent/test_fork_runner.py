"""Agents in an interpreter of their own: imported once, a fork for each rollout."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from envs.agent.runners.fork_runner import ForkRunner
from envs.agent.runners.runner import Access, AgentFailed
from tests.unit.envs.agent.test_keeper import runs
from trace_async.env import EnvError

ACCESS = Access(base_url="http://127.0.0.1:1/secret/v1", api_key="sk-1")
PROGRAM = """
import asyncio, os, sys, time

print("what an import says is no news")
CALLS = []


def plain(task, base_url):
    CALLS.append(task)
    print("nor is what an agent says")
    return {"task": task, "calls": len(CALLS), "url": base_url, "variable": os.environ["OPENAI_BASE_URL"]}


async def coroutine(task, api_key):
    await asyncio.sleep(0)
    return f"{task['name']} {api_key}"


class NoMoreTurns(RuntimeError):
    pass


def fails(task):
    raise NoMoreTurns("eight are enough")


def dies(task):
    os._exit(9)


def says_much(task):
    return "x" * 300_000


def imports_what_we_have_too():
    from anthropic import NAME

    return NAME


def hangs(task):
    open("pid", "w").write(f"{os.getpid()}\\n")
    time.sleep(3600)
"""


@pytest.fixture
async def runner(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ForkRunner]:
    (tmp_path / "program.py").write_text(PROGRAM)
    made = ForkRunner(f"program:{request.param}", sys.executable, str(tmp_path), 2)
    yield made
    await made.close()


def runs_with(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("runner", [name], indirect=True)


@runs_with("plain")
async def test_rollouts_share_what_was_imported_and_nothing_else(runner: ForkRunner):
    running = [await runner.start({"n": number}, ACCESS) for number in range(2)]
    results = [await one.result() for one in running]
    url = ACCESS.base_url
    assert results == [{"task": {"n": n}, "calls": 1, "url": url, "variable": url} for n in range(2)]
    assert os.environ.get("OPENAI_BASE_URL") != url


@runs_with("coroutine")
async def test_coroutines_are_run_and_the_slots_are_given_back(runner: ForkRunner):
    for number in range(5):
        running = await asyncio.wait_for(runner.start({"name": f"a{number}"}, ACCESS), 60)
        assert await running.result() == f"a{number} sk-1"


@runs_with("fails")
async def test_an_error_comes_with_the_names_of_its_classes(runner: ForkRunner):
    with pytest.raises(AgentFailed, match="NoMoreTurns: eight are enough") as caught:
        await (await runner.start({}, ACCESS)).result()
    assert caught.value.names[:2] == ("NoMoreTurns", "RuntimeError")


@runs_with("dies")
async def test_a_rollout_whose_process_dies_is_told_by_its_exit_code_and_the_next_one_runs(runner: ForkRunner):
    for _ in range(3):
        with pytest.raises(AgentFailed, match="its process ended with 9") as caught:
            await (await runner.start({}, ACCESS)).result()
        assert caught.value.names == ("exit_9",)


@runs_with("says_much")
async def test_a_long_result_arrives_whole(runner: ForkRunner):
    assert await (await runner.start({}, ACCESS)).result() == "x" * 300_000


@runs_with("imports_what_we_have_too")
async def test_our_own_modules_hide_none_of_the_agents(runner: ForkRunner, tmp_path: Path):
    (tmp_path / "anthropic.py").write_text("NAME = 7\n")  # envs/agent has an anthropic.py too
    assert await (await runner.start({}, ACCESS)).result() == 7


@runs_with("hangs")
async def test_a_rollout_that_hangs_is_ended_when_it_is_stopped(runner: ForkRunner, tmp_path: Path):
    running = await runner.start({}, ACCESS)
    path = tmp_path / "pid"
    async with asyncio.timeout(60):
        while not path.exists() or not path.read_text().endswith("\n"):
            await asyncio.sleep(0.02)
    pid = int(path.read_text())
    assert runs(pid)
    await running.stop()
    assert not runs(pid)
    with pytest.raises(AgentFailed, match=r"ended with -(15|9)"):  # SIGKILL when its process was not known yet
        await running.result()


@runs_with("nothing")
async def test_a_function_that_is_not_there_is_told_in_words(runner: ForkRunner):
    with pytest.raises(EnvError, match=r"env.args.agent=program:nothing: cannot be imported there: AttributeError"):
        await runner.start({}, ACCESS)


async def test_an_interpreter_that_is_not_there_is_told_in_words():
    runner = ForkRunner("program:plain", "/nowhere/python", "", 2)
    with pytest.raises(EnvError, match=r"env.args.python=/nowhere/python cannot be started"):
        await runner.start({}, ACCESS)
    await runner.close()


async def test_an_interpreter_named_from_here_is_found_though_the_agent_lies_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    agent, here = tmp_path / "agent", tmp_path / "here"
    for folder in (agent, here):
        folder.mkdir()
    (agent / "program.py").write_text(PROGRAM, encoding="utf-8")
    (here / "python").symlink_to(sys.executable)
    monkeypatch.chdir(here)
    runner = ForkRunner("program:coroutine", "./python", str(agent), 2)
    try:
        running = await runner.start({"name": "a"}, ACCESS)
        assert await running.result() == "a sk-1"
        await running.stop()
    finally:
        await runner.close()
