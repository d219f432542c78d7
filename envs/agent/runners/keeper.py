"""End agents whose owner is gone. Standard library only; `runner.py` starts it as a script.

    python keeper.py GRACE_S

The owner holds the writing end of the keeper's standard input, and writes a line for each process group: `+123` when
it starts, `-123` when it has ended. When that end closes, because the owner ended or was killed in whatever way, the
groups that are left get SIGTERM, and after GRACE_S seconds SIGKILL.

A process of its own is needed because a PromptActor that is killed cannot clean up, and an agent that hangs would live
for ever.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

GRACE_S = 5.0


class Keeper:
    """The owner's side."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the keeper, once. Comes before the first agent, so that none is unknown to it for long."""
        if self._process is None:
            command = [sys.executable, "-I", "-S", str(Path(__file__).resolve()), str(GRACE_S)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def started(self, group: int) -> None:
        """Say that the process group `group` runs."""
        self._tell(f"+{group}")

    def ended(self, group: int) -> None:
        """Say that `group` needs no end any more."""
        self._tell(f"-{group}")

    def _tell(self, line: str) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the keeper; agents run all the same
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def close(self) -> None:
        """End what still runs."""
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()  # it has left us by a fork, so this is at once


def _send(groups: Iterable[int], number: int) -> None:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, number)


def _are_left(groups: Iterable[int]) -> bool:
    for group in groups:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, 0)
            return True
    return False


def main(grace_s: float) -> None:
    """Note which groups run until the owner is gone, then end those that are left."""
    if os.fork():
        os._exit(0)  # no child of the owner any more: Ray kills an actor's children first
    groups: set[int] = set()
    for line in sys.stdin:
        group = int(line[1:])
        groups.add(group) if line.startswith("+") else groups.discard(group)
    _send(groups, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while _are_left(groups) and time.monotonic() < deadline:
        time.sleep(0.05)
    _send(groups, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
