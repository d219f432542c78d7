"""Start, watch and stop the process of an inference server so that nothing of it is left behind."""

import asyncio
import contextlib
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trace_async.engine import EngineError

GUARD = Path(__file__).with_name("guard.py")
SHARED_MEMORY = Path("/dev/shm")
GRACE_S = 5.0
STOP_LIMIT_S = GRACE_S + 20.0
LOG_TAIL_LINES = 25
# Below the ports that Linux hands out, unless it was told otherwise.
FIRST_PORT, FIRST_EPHEMERAL_PORT = 20_000, 32_768
EPHEMERAL_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """Return a TCP port of the loopback interface that was free a moment ago, for a server that takes no socket.

    The system hands out none of these ports by itself. One of its own choice could become the near end of anybody's
    outgoing connection before the server listens.
    """
    for port in random.sample(ports := _ports_of_nobody(), len(ports)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise EngineError(f"no TCP port from {ports.start} to {ports.stop - 1} is free")


def _ports_of_nobody() -> range:
    """Those below the ephemeral ports, or all that need no privilege where there are too few below."""
    try:
        first_ephemeral = int(EPHEMERAL_PORTS.read_text().split()[0])
    except OSError:  # not on Linux
        first_ephemeral = FIRST_EPHEMERAL_PORT
    below = range(FIRST_PORT, first_ephemeral)
    return below if len(below) >= 1000 else range(1024, 65_536)


def command_line_flags(arguments: Mapping[str, object]) -> list[str]:
    """Turn {"max_num_seqs": 64, "enforce_eager": True, "other": False} into --max-num-seqs 64 --enforce-eager."""
    flags: list[str] = []
    for name, value in arguments.items():
        if value is False or value is None:
            continue
        flags.append("--" + name.replace("_", "-"))
        if value is not True:
            flags.append(str(value))
    return flags


class ServerProcess:
    """One server behind a guard process (guard.py), in a process group of its own. It writes its log to `log_path`.

    `scratch` is a private folder on disk, which is also the server's TMPDIR. `shared_scratch` is one in shared memory.
    Both are removed with the process, even when our own process is killed.
    """

    def __init__(self, build: Callable[[Path], tuple[Sequence[str], Mapping[str, str]]], *, log_path: Path) -> None:
        """`build` returns command and environment. It may put files for the server into the scratch folder."""
        self.log_path = log_path
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="trace_async_"))
        shared_root = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.shared_scratch = Path(tempfile.mkdtemp(prefix="trace_async_", dir=shared_root))
        try:
            guard = self._start_guard(*build(self.scratch))
        except BaseException:
            shutil.rmtree(self.scratch)
            shutil.rmtree(self.shared_scratch)
            raise
        assert guard.stdin is not None
        assert guard.stdout is not None
        self._requests, self._status = guard.stdin, guard.stdout
        self._guard_pid = int(self._status.readline())
        guard.wait()  # ends at once: the guard has forked away from this process (_leave_owner in guard.py)
        self._exit_code: int | None = None

    def _start_guard(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        folders = f"{self.scratch}:{self.shared_scratch}"
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                # With `-I` the guard imports nothing from the server's PYTHONPATH.
                [sys.executable, "-I", str(GUARD), str(GRACE_S), folders, "--", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **environment, "TMPDIR": str(self.scratch)},
                cwd=self.scratch,
                start_new_session=True,
            )

    @property
    def exit_code(self) -> int | None:
        """The exit code: None while the server runs or is cleared away, 128 + its number when a signal ended it."""
        if self._exit_code is None and select.select([self._status], [], [], 0)[0]:
            # An empty line means that the guard itself was killed, and the server with it.
            self._exit_code = int(self._status.readline() or 128 + signal.SIGKILL)
        return self._exit_code

    def remember_shared_memory(self) -> None:
        """Note what the server holds in /dev/shm now, so that it is removed after the end. Call it when it is ready."""
        try:
            self._requests.write(b"remember\n")
            self._requests.flush()
        except BrokenPipeError:
            return  # it has just ended, which the next request reports

    def process_ids(self) -> list[int]:
        """Return the server's processes, the leader of their group first (empty when it has ended)."""
        children = Path(f"/proc/{self._guard_pid}/task/{self._guard_pid}/children")
        try:
            leaders = [int(pid) for pid in children.read_text().split()]
        except FileNotFoundError:
            return []
        found = list(leaders)
        for parent in found:
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                found.extend(int(pid) for pid in task.read_text().split())
        return found

    def log_tail(self) -> str:
        """Return the last lines of the log, for errors."""
        lines = self.log_path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return "\n".join(lines)

    async def stop(self) -> None:
        """Send SIGTERM and then SIGKILL to the whole group, and return when nothing of it is left."""
        if not self._requests.closed:
            self._requests.close()  # the guard ends the server when this end of its input closes
        deadline = time.monotonic() + STOP_LIMIT_S
        while self.exit_code is None:
            if time.monotonic() > deadline:
                raise EngineError(f"the server of {self.log_path} did not end within {STOP_LIMIT_S:.0f} s")
            await asyncio.sleep(0.02)
        self._status.close()
