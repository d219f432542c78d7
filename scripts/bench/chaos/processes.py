"""The processes of a run, found from outside: all that inherited a mark in their environment, orphans included."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import psutil

MARK = "TRACE_ASYNC_CHAOS"
TITLES = {
    "generator": "ray::GeneratorActor",
    "prompts": "ray::PromptActor",
    "predictor": "ray::PredictorActor",
    "learner": "ray::LearnerRank",
}
"""Ray writes into the title of a process which actor it is."""
NAMES = {"raylet": "raylet", "gcs": "gcs_server"}


def marking(mark: str) -> dict[str, str]:
    """Return what the environment of a process needs, so that it and all that it starts are found by `marked`."""
    return {MARK: mark, "SPT_NOENV": "1"}  # else the title that Ray gives a process is written over its environment


def marked(mark: str) -> list[psutil.Process]:
    """Return all processes that carry the mark, whoever their parent is now."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def role_of(process: psutil.Process) -> str:
    """Of a run's process: generator, prompts, predictor, learner, raylet or gcs; `other` for the rest of Ray."""
    with contextlib.suppress(psutil.Error):
        line, name = " ".join(process.cmdline()), process.name()
        for role, title in TITLES.items():
            if line.startswith(title):
                return role
        for role, wanted in NAMES.items():
            if name == wanted:
                return role
        if "scripts.cli train" in line:
            return "driver"
    return "other"


def with_role(mark: str, role: str) -> list[psutil.Process]:
    """Return the processes of a run that have this role, oldest first."""
    found = [process for process in marked(mark) if role_of(process) == role]
    return sorted(found, key=lambda process: process.create_time())


@dataclass(frozen=True, slots=True)
class Sample:
    """What one process holds at one moment."""

    seconds: float
    """Since the beginning of the chaos."""
    role: str
    """See `role_of`."""
    pid: int
    """Another number with the same role is another process."""
    memory_mib: float
    """Its own memory (RSS without shared memory)."""
    shared_mib: float
    """Pages of shared memory that it has touched."""
    threads: int
    """Threads of it."""
    files: int
    """Open files, sockets included."""
    sockets: int
    """Open sockets."""


COLUMNS = tuple(field.name for field in fields(Sample))


def sample(process: psutil.Process, seconds: float) -> Sample | None:
    """Return what the process holds; None when it has ended."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        memory = process.memory_info()
        held = [os.readlink(entry) for entry in _entries(Path(f"/proc/{process.pid}/fd"))]
        return Sample(
            round(seconds, 1),
            role_of(process),
            process.pid,
            round((memory.rss - memory.shared) / 2**20, 1),
            round(_shared_kib(process.pid) / 1024, 1),
            process.num_threads(),
            len(held),
            sum(name.startswith("socket:") for name in held),
        )
    except (psutil.Error, OSError):
        return None


def _entries(folder: Path) -> Sequence[Path]:
    return [Path(entry.path) for entry in os.scandir(folder)]


def _shared_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssShmem:"):
            return int(line.split()[1])
    return 0


def as_csv(samples: Sequence[Sample]) -> str:
    """One line each, with a line of names."""
    return "\n".join([",".join(COLUMNS), *(",".join(map(str, astuple(one))) for one in samples)]) + "\n"
