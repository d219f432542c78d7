"""The guard around a server process, with small programs in the server's place."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trace_async.config import ConfigError
from trace_async.engine import EngineError
from trace_async.engines.servers.environments import engine_python
from trace_async.engines.servers.server import ServerProcess, command_line_flags, free_port

LIMIT_S = 30.0

# Ignores SIGTERM, has a child in a session of its own, and maps shared memory of which it forgets the name.
STUBBORN = """
import mmap, os, signal, subprocess, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
name = f"/dev/shm/trace_async_test_{os.getpid()}"
with open(name, "wb+") as file:
    file.truncate(4096)
    memory = mmap.mmap(file.fileno(), 4096)
os.rename(name, name + "_renamed")
Path(os.environ["TMPDIR"], "left_behind").write_text("x")
print("ready", flush=True)
time.sleep(600)
"""


def start(program: str, log_path: Path) -> ServerProcess:
    return ServerProcess(lambda scratch: ([sys.executable, "-c", program], {}), log_path=log_path)


async def until(condition) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def shared_memory(pid: int) -> Path:
    return Path(f"/dev/shm/trace_async_test_{pid}_renamed")


async def started_stubborn(tmp_path: Path) -> ServerProcess:
    process = start(STUBBORN, tmp_path / "logs" / "server.log")
    await until(lambda: "ready" in process.log_tail())
    return process


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr("trace_async.engines.servers.server.GRACE_S", 0.3)


async def test_stop_ends_the_whole_tree_and_removes_what_it_left(tmp_path):
    process = await started_stubborn(tmp_path)
    pids = process.process_ids()
    assert len(pids) == 2
    assert shared_memory(pids[0]).exists()
    assert (process.scratch / "left_behind").exists()
    await process.stop()
    assert not any(alive(pid) for pid in pids)
    assert not shared_memory(pids[0]).exists()
    assert not process.scratch.exists()
    assert not process.shared_scratch.exists()
    await process.stop()  # a second time harms nothing


async def test_a_stopped_server_is_killed_all_the_same(tmp_path):
    process = await started_stubborn(tmp_path)
    pids = process.process_ids()
    os.kill(pids[0], signal.SIGSTOP)
    await process.stop()
    assert not any(alive(pid) for pid in pids)


async def test_a_server_killed_from_outside_is_cleared_away_and_shows_its_signal(tmp_path):
    process = await started_stubborn(tmp_path)
    process.remember_shared_memory()
    await asyncio.sleep(0.3)  # the guard looks when it reads the line
    pids = process.process_ids()
    os.kill(pids[0], signal.SIGKILL)
    await until(lambda: process.exit_code is not None)
    assert process.exit_code == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in pids)
    assert not shared_memory(pids[0]).exists()
    await process.stop()


async def test_a_server_that_ends_by_itself_leaves_its_exit_code_and_its_last_words(tmp_path):
    process = start("print('cannot load the model'); raise SystemExit(3)", tmp_path / "server.log")
    await until(lambda: process.exit_code is not None)
    assert process.exit_code == 3
    assert "cannot load the model" in process.log_tail()
    assert not process.scratch.exists()


async def test_the_server_dies_with_its_owner(tmp_path):
    owner_program = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from trace_async.engines.servers.server import ServerProcess
        program = Path(sys.argv[1]).read_text()
        log_path = Path({str(tmp_path)!r}, "log")
        process = ServerProcess(lambda scratch: ([sys.executable, "-c", program], {{}}), log_path=log_path)
        while "ready" not in process.log_tail():
            time.sleep(0.05)
        print(process.scratch, process.shared_scratch, *process.process_ids(), flush=True)
        time.sleep(600)
        """
    )
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    owner = subprocess.Popen(  # noqa: ASYNC220 - it returns at once
        [sys.executable, "-c", owner_program, str(tmp_path / "stubborn.py")], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    scratch, shared_scratch, *pids = (await asyncio.to_thread(owner.stdout.readline)).split()
    assert len(pids) == 2
    assert alive(int(pids[0]))
    owner.kill()
    owner.wait()
    await until(lambda: not Path(scratch).exists() and not Path(shared_scratch).exists())
    assert not any(alive(int(pid)) for pid in pids)
    assert not shared_memory(int(pids[0])).exists()


async def test_what_fails_before_the_start_leaves_no_folder(tmp_path):
    seen = []

    def build(scratch: Path):
        seen.append(scratch)
        raise ConfigError("no such engine")

    with pytest.raises(ConfigError):
        ServerProcess(build, log_path=tmp_path / "log")
    assert not seen[0].exists()


def test_flags():
    arguments = {"max_num_seqs": 64, "enforce_eager": True, "off": False, "none": None, "path": Path("/a b")}
    assert command_line_flags(arguments) == ["--max-num-seqs", "64", "--enforce-eager", "--path", "/a b"]


def test_a_missing_environment_names_the_command_that_builds_it(tmp_path):
    with pytest.raises(ConfigError, match=r"bash scripts/setup_engines\.sh sglang"):
        engine_python("sglang", str(tmp_path / "nowhere"))
    assert engine_python("sglang", sys.executable) == sys.executable


def test_a_free_port_is_none_that_the_system_hands_out():
    first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    if first_ephemeral < 21_000:
        pytest.skip("this machine hands out nearly all ports")
    ports = {free_port() for _ in range(50)}
    assert len(ports) > 1
    for port in ports:
        assert 20_000 <= port < first_ephemeral
        socket.create_server(("127.0.0.1", port)).close()


def test_a_free_port_is_none_that_is_taken(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr("trace_async.engines.servers.server._ports_of_nobody", lambda: range(port, port + 1))
        with pytest.raises(EngineError, match=f"no TCP port from {port} to {port} is free"):
            free_port()
    assert free_port() == port


async def test_a_child_that_signals_its_parent_does_not_end_the_guard(tmp_path):
    """SGLang's workers send SIGQUIT to their parent when they break down: after the leader's death to the guard."""
    program = STUBBORN.replace(
        "signal.SIG_IGN); time.sleep(600)", "lambda *_: os.kill(os.getppid(), signal.SIGQUIT)); time.sleep(600)"
    )
    program = program.replace('child = "import signal', 'child = "import os, signal').replace(
        ", start_new_session=True", ""
    )
    process = start(program, tmp_path / "server.log")
    await until(lambda: "ready" in process.log_tail())
    process.remember_shared_memory()
    await asyncio.sleep(0.3)
    pids = process.process_ids()
    os.kill(pids[0], signal.SIGKILL)
    await until(lambda: process.exit_code is not None)
    assert process.exit_code == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in pids)
    assert not shared_memory(pids[0]).exists()
    assert not process.scratch.exists()


async def test_the_guard_is_nobodys_child(tmp_path):
    process = await started_stubborn(tmp_path)
    assert process._guard_pid not in children_of(os.getpid())
    os.kill(process._guard_pid, signal.SIGTERM)
    await until(lambda: process.exit_code is not None)
    assert not process.shared_scratch.exists()
