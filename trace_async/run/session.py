"""Run folders: claimed by one process at a time, with a mark that tells how the last one ended.

RUN/config.yaml     made by whoever claims the folder; two processes that want the same name get two folders
RUN/session.json    there while a process works on the run; what is left over tells that it ended without a word
RUN/phases.json     what it is doing at this moment, for `trace-async status`
"""

import contextlib
import errno
import json
import os
import shlex
import socket
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from trace_async.tracking.log import write_whole

SESSION_FILE = "session.json"
PHASES_FILE = "phases.json"


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
        """Return whether the process is still there; of one on another machine we cannot know, and say yes."""
        if self.host != socket.gethostname():
            return True
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_started) < 1
            return bool(is_same and process.status() != psutil.STATUS_ZOMBIE)  # dead, and its parent has not asked yet
        except psutil.Error:
            return False


def claim_new(wanted: Path, config_yaml: str) -> Path:
    """Make `wanted`, or the first of wanted-2, wanted-3, … that holds no run, and write config.yaml into it."""
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_new(folder / "config.yaml", config_yaml.encode())  # new: one process gets it
            return folder
        except FileExistsError:
            number += 1
        except OSError as error:
            raise RunFolderError(
                f"a run cannot be begun in {folder}: {error.strerror}; free some space there, make it writable, or "
                "choose another place with output_dir=…"
            ) from error


def _write_new(path: Path, content: bytes) -> None:
    """Write a file that nobody has made yet, and leave none when the disk does not take it."""
    with path.open("xb", buffering=0) as file:
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            path.unlink()
            raise


def free_name(wanted: Path) -> Path:
    """Return the folder that `claim_new` would make now."""
    candidate, number = wanted, 1
    while (candidate / "config.yaml").exists():
        number += 1
        candidate = wanted.with_name(f"{wanted.name}-{number}")
    return candidate


def last_session(run_dir: Path) -> Session | None:
    """Return the session that did not take its mark away: it is at work, or it ended without a word."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return Session(**json.loads((run_dir / SESSION_FILE).read_text(encoding="utf-8")))
    return None


def require_free(run_dir: Path) -> None:
    """Raise RunFolderError when another process works on the run."""
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


class Phases:
    """What a run is doing, under the names that its figures `time/…_s` have; several things may go on at a time.

    `on_change` takes the names of all that goes on, whenever something begins or ends.
    """

    def __init__(self, run_dir: Path, on_change: Callable[[Collection[str]], None] = lambda names: None) -> None:
        self._run_dir = run_dir
        self._on_change = on_change
        self._since: dict[str, float] = {}

    @contextlib.contextmanager
    def during(self, name: str) -> Iterator[None]:
        """Note that the phase `name` is under way in the block. A disk that does not take the note ends no run."""
        self._since[name] = time.time()
        self._keep()
        try:
            yield
        finally:
            self._since.pop(name, None)
            self._keep()

    def _keep(self) -> None:
        with contextlib.suppress(OSError):
            write_whole(self._run_dir / PHASES_FILE, json.dumps(self._since))
        self._on_change(tuple(self._since))


def phases_of(run_dir: Path) -> dict[str, float]:
    """Return phase under way → Unix seconds at which it began; empty when that is not known."""
    try:
        return {str(name): float(at) for name, at in json.loads((run_dir / PHASES_FILE).read_text("utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def how_it_ended(run_dir: Path) -> str | None:
    """Describe a session that ended without a word; None when the last one ended in order or is at work."""
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


def resume_command(run_dir: Path) -> str:
    """Return the command that goes on with a run."""
    return f"trace-async train --resume {shlex.quote(str(run_dir))}"


def abandoned(output_dir: Path) -> list[Path]:
    """Return the runs under `output_dir` whose process is gone and that nobody goes on with."""
    marks = output_dir.glob(f"*/{SESSION_FILE}")
    return sorted(mark.parent for mark in marks if how_it_ended(mark.parent) is not None)
