"""Run folders: claimed by one process at a time, with a mark that tells how the last one ended.

RUN/config.yaml     made by whoever claims the folder; two processes that want the same name get two folders
RUN/session.json    there while a process works on the run; what is left over tells that it ended without a word
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

SESSION_FILE = "session.json"


class RunFolderError(Exception):
    """The folder of a run cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A process that works on a run."""

    host: str
    pid: int
    process_started: float
    """By the system's clock; tells the process from a later one with the same number."""

    @classmethod
    def own(cls) -> "Session":
        return cls(host=socket.gethostname(), pid=os.getpid(), process_started=psutil.Process().create_time())

    def is_alive(self) -> bool:
        """Whether the process is still there; of one on another machine we cannot know, and say yes."""
        if self.host != socket.gethostname():
            return True
        try:
            started: float = psutil.Process(self.pid).create_time()
            return abs(started - self.process_started) < 1
        except psutil.Error:
            return False


def claim_new(wanted: Path, config_yaml: str) -> Path:
    """Make `wanted`, or the first of wanted-2, wanted-3, … that holds no run, and write config.yaml into it."""
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with (folder / "config.yaml").open("x", encoding="utf-8") as file:  # "x": one process gets it
                file.write(config_yaml)
            return folder
        except FileExistsError:
            number += 1


def free_name(wanted: Path) -> Path:
    """The folder that `claim_new` would make now."""
    candidate, number = wanted, 1
    while (candidate / "config.yaml").exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate


def last_session(run_dir: Path) -> Session | None:
    """The session that did not take its mark away: it is at work, or it ended without a word."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Session(**json.loads((run_dir / SESSION_FILE).read_text(encoding="utf-8")))
    return None


def require_free(run_dir: Path) -> None:
    """RunFolderError when another process works on the run."""
    session = last_session(run_dir)
    if session is not None and session.pid != os.getpid() and session.is_alive():
        raise RunFolderError(
            f"{run_dir}: process {session.pid} on {session.host} is at work on this run; stop it first, or, when that "
            f"machine is gone, delete {run_dir / SESSION_FILE}"
        )


@contextlib.contextmanager
def at_work(run_dir: Path) -> Iterator[None]:
    """Mark the run as worked on. The mark goes when the block ends, however it ends, and stays after a kill."""
    path = run_dir / SESSION_FILE
    path.write_text(json.dumps(asdict(Session.own())), encoding="utf-8")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def how_it_ended(run_dir: Path) -> str | None:
    """Words about a session that ended without any; None when the last one ended in order or is still at work."""
    session = last_session(run_dir)
    if session is None or session.is_alive():
        return None
    log = run_dir / "logs" / "trainer.log"
    seen = (
        f", last heard of at {time.strftime('%H:%M:%S', time.localtime(log.stat().st_mtime))}" if log.exists() else ""
    )
    return (
        f"process {session.pid}, the last to work on {run_dir}, ended without a word{seen}: it was killed (SIGKILL, "
        "out of memory), or Ray ended it because its raylet or GCS had died (see /tmp/ray/session_*/logs)"
    )


def abandoned(output_dir: Path) -> list[Path]:
    """Runs under `output_dir` whose process is gone and that nobody goes on with."""
    marks = output_dir.glob(f"*/{SESSION_FILE}")
    return sorted(mark.parent for mark in marks if how_it_ended(mark.parent) is not None)
