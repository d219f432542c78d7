"""Agents that run as commands end when the process that started them is killed."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.support.paths import ROOT

OWNER = """
import asyncio
from envs.agent.runners.runner import Access, CommandRunner

async def main():
    # A process that starts one of its own and then hangs; SIGTERM does not end it.
    shell = "trap '' TERM; sleep 600 & echo $$ $! > pids; wait; wait"
    runner = CommandRunner(["bash", "-c", shell], FOLDER, 4)
    running = await runner.start({}, Access(base_url="http://127.0.0.1:1/v1", api_key="k"))
    print("started", flush=True)
    await running.result()

asyncio.run(main())
"""


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(holds) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_owner_leaves_no_agent_and_none_of_its_processes(tmp_path: Path):
    program = OWNER.replace("FOLDER", repr(str(tmp_path)))
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "started\n"
    wait_until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert all(map(runs, pids))
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    wait_until(lambda: not any(map(runs, pids)))
