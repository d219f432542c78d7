"""Hostile programs: each gets a clear error; the process, its siblings and the program's state stay intact."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from envs.math.sandbox import Sandbox, SandboxLimits
from trace_async.config import ConfigError
from trace_async.env import EnvError


@pytest.fixture
async def sandbox() -> AsyncIterator[Sandbox]:
    box = Sandbox(SandboxLimits(seconds=0.3, memory_mb=16, output_chars=100, num_workers=2))
    yield box
    await box.close()


def worker_pids() -> set[int]:
    children = set()
    for task in Path("/proc/self/task").iterdir():
        children |= {int(pid) for pid in (task / "children").read_text().split()}
    return {pid for pid in children if "monty" in Path(f"/proc/{pid}/cmdline").read_text()}


async def test_variables_last_over_turns_and_fork_at_a_prefix(sandbox: Sandbox) -> None:
    first = await sandbox.run("n = 3\nprint('set')\nn * 2", None)
    assert (first.output, first.error_type) == ("set\n6", "")
    left, right = await asyncio.gather(sandbox.run("n += 1; n", first.state), sandbox.run("n *= 10; n", first.state))
    assert (left.output, right.output) == ("4", "30")
    assert (await sandbox.run("n", left.state)).output == "4"
    assert (await sandbox.run("n", right.state)).output == "30"
    assert (await sandbox.run("n", first.state)).output == "3"


async def test_the_same_program_gives_the_same_output_everywhere(sandbox: Sandbox) -> None:
    code = "import random, datetime\n(random.random(), random.random(), str(datetime.datetime.now()))"
    outputs = {(await sandbox.run(code, None)).output for _ in range(4)}
    assert len(outputs) == 1


HOSTILE = {
    "endless loop": ("while True: pass", "TimeoutError"),
    "endless loop that catches everything": (
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "TimeoutError",
    ),
    "endless printing": ("while True: print('spam' * 100)", "TimeoutError"),
    "memory bomb": ("[0] * 10**9", "MemoryError"),
    "growing list": ("x = []\nwhile True: x.append('a' * 1000)", "MemoryError"),
    "string bomb": ("'a' * 10**10", "MemoryError"),
    "number bomb": ("2 ** 10**9", "MemoryError"),
    "memory bomb in the parser": ("x = 1\n" * 300_000, "MemoryError"),
    "deep recursion": ("def f(n): return f(n + 1)\nf(0)", "RecursionError"),
    "endless repr": ("class A:\n  def __repr__(self):\n    while True: pass\nprint(A())", "TimeoutError"),
    "deep nesting": ("(" * 50_000 + ")" * 50_000, "SyntaxError"),
    "deep brackets": ("x = " + "[" * 50_000, "SyntaxError"),
    "reading a file": ("open('/etc/passwd').read()", "PermissionError"),
    "writing a file": ("open('/tmp/owned', 'w').write('x')", "PermissionError"),
    "pathlib": ("from pathlib import Path\nPath('/etc/passwd').read_text()", "PermissionError"),
    "environment variable": ("import os\nos.environ['PATH']", None),
    "listing files": ("import os\nos.listdir('/')", "PermissionError"),
    "shell": ("import os\nos.system('id')", "AttributeError"),
    "subprocess": ("import subprocess", "ModuleNotFoundError"),
    "network": ("import socket", "ModuleNotFoundError"),
    "http": ("import urllib.request", "ModuleNotFoundError"),
    "ctypes": ("import ctypes", "ModuleNotFoundError"),
    "dunder import": ("__import__('os').system('id')", "NameError"),
    "dunder class": ("().__class__.__bases__[0].__subclasses__()", "AttributeError"),
    "dunder globals": ("(lambda: 0).__globals__", "AttributeError"),
    "builtins": ("__builtins__", "NameError"),
    "eval of dunders": ("eval('().__class__')", "AttributeError"),
    "exit": ("raise SystemExit", "SystemExit"),
    "keyboard interrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "long number": ("10 ** 5000 + 1", ""),
    "syntax": ("n = = 3", "SyntaxError"),
    "lone surrogate": ("print('\ud800')", None),
    "null byte": ("n = '\x00'\nn", None),
    "cycle": ("a = []\na.append(a)\na", ""),
    "huge value": ("list(range(100_000))", ""),
    "sleep": ("import time\ntime.sleep(1000)", ""),
    "regex": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", None),
    "long sum": ("i = 0\nwhile i < 10**12: i += 1", "TimeoutError"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_program_leaves_state_and_sandbox_intact(sandbox: Sandbox, name: str) -> None:
    code, error_type = HOSTILE[name]
    before = await sandbox.run("keep = 41", None)
    result = await sandbox.run(code, before.state)
    if error_type is not None:
        assert result.error_type == error_type
    assert len(result.output) <= 100 + len(" [ cut ]")
    assert len(result.error) <= 500
    assert bool(result.error) or result.error_type in ("", "SystemExit", "KeyboardInterrupt")
    assert (await sandbox.run("keep + 1", result.state)).output == "42"
    assert "owned" not in os.listdir("/tmp")


async def test_siblings_of_a_hostile_program_go_on(sandbox: Sandbox) -> None:
    start = (await sandbox.run("n = 1", None)).state
    results = await asyncio.gather(
        sandbox.run("while True: pass", start),
        *(sandbox.run(f"n + {k}", start) for k in range(20)),
        sandbox.run("x = []\nwhile True: x.append('a' * 1000)", start),
    )
    assert [result.output for result in results[1:-1]] == [str(1 + k) for k in range(20)]
    assert [results[0].error_type, results[-1].error_type] == ["TimeoutError", "MemoryError"]


async def test_output_is_cut_and_says_so(sandbox: Sandbox) -> None:
    result = await sandbox.run("print('ab' * 1000)", None)
    assert result.output == "ab" * 50 + " [ cut ]"
    assert result.error_type == ""


async def test_an_ordinary_error_keeps_what_came_before_it(sandbox: Sandbox) -> None:
    result = await sandbox.run("n = 5\nprint('hi')\n1 / 0", None)
    assert (result.output, result.error_type, result.error) == ("hi", "ZeroDivisionError", "division by zero")
    assert (await sandbox.run("n", result.state)).output == "5"


async def test_a_limit_takes_the_program_back_to_before_the_snippet(sandbox: Sandbox) -> None:
    start = (await sandbox.run("n = 1", None)).state
    result = await sandbox.run("n = 2\nwhile True: pass", start)
    assert (await sandbox.run("n", result.state)).output == "1"


async def test_variables_beyond_the_state_limit_are_forgotten(sandbox: Sandbox) -> None:
    start = (await sandbox.run("n = 1", None)).state
    result = await sandbox.run("n = 'a' * 2**20", start)
    assert (result.error_type, result.state) == ("MemoryError", start)
    assert "256 kB" in result.error


async def test_a_killed_worker_is_our_failure_and_the_next_snippet_works() -> None:
    box = Sandbox(SandboxLimits(seconds=30, num_workers=1))
    state = (await box.run("n = 1", None)).state
    running = asyncio.create_task(box.run("while True: pass", state))
    await asyncio.sleep(0.2)  # the snippet is running by now
    for pid in worker_pids():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EnvError, match="worker died"):
        await running
    assert (await box.run("n", state)).output == "1"
    await box.close()


async def test_a_sandbox_without_its_program_says_what_is_missing(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(**_: object) -> None:
        raise IndexError(4)  # what pydantic-monty 1.4 says where it lies near the root of the disk

    with monkeypatch.context() as patched:
        patched.setattr("envs.math.sandbox.AsyncMonty", missing)
        with pytest.raises(EnvError, match=r"cannot start: IndexError: 4; the program `monty`.*MONTY_BIN"):
            await sandbox.run("1", None)
    assert (await sandbox.run("1", None)).output == "1"


async def test_waiting_for_a_worker_ends_as_our_failure() -> None:
    box = Sandbox(SandboxLimits(seconds=2, num_workers=1, wait_s=0.1))
    busy = asyncio.create_task(box.run("while True: pass", None))
    await asyncio.sleep(0.05)
    with pytest.raises(EnvError, match="no sandbox worker was free"):
        await box.run("1", None)
    assert (await busy).error_type == "TimeoutError"
    await box.close()


async def test_close_ends_the_workers_and_leaks_nothing() -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        box = Sandbox()
        await box.run("1", None)
        assert worker_pids()
        await box.close()
        await box.close()
    assert not worker_pids()
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 2


def test_works_outside_the_main_thread() -> None:
    outputs: list[str] = []

    async def go() -> None:
        box = Sandbox()
        outputs.append((await box.run("6 * 7", None)).output)
        await box.close()

    thread = threading.Thread(target=lambda: asyncio.run(go()))
    thread.start()
    thread.join(timeout=60)
    assert outputs == ["42"]


def test_one_sandbox_serves_several_event_loops() -> None:
    box = Sandbox()

    async def count(state: bytes | None, code: str) -> bytes | None:
        results = await asyncio.gather(*(box.run(code, state) for _ in range(5)))
        assert len({result.output for result in results}) == 1
        outputs.append(results[0].output)
        return results[0].state

    outputs: list[str] = []
    state = asyncio.run(count(None, "n = 1; n"))
    state = asyncio.run(count(state, "n += 1; n"))
    asyncio.run(count(state, "n += 1; n"))
    assert outputs == ["1", "2", "3"]
    asyncio.run(box.close())


def test_impossible_limits_name_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"limits\.seconds=0"):
        SandboxLimits(seconds=0)
