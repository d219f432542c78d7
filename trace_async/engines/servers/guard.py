"""Run one server and make sure that nothing of it outlives its owner. Standard library only; server.py starts it.

    python guard.py GRACE_S SCRATCH_DIR[:SCRATCH_DIR...] -- COMMAND...

The owner holds the writing end of the guard's standard input. When that end closes, because the owner asks for it or
because it died in whatever way, the server's whole process group gets SIGTERM, after GRACE_S seconds SIGKILL, and what
it left in its scratch folders and in /dev/shm is removed. The same happens when the server ends by itself.

A guard of its own is needed because PR_SET_PDEATHSIG alone reaches only the direct child (and fires when the owner's
*thread* ends), while engines start processes of their own; as subreaper the guard inherits every one of them.
The line "remember" on standard input makes it note the shared memory that the server holds now, so that it can be
removed even when the server is killed from outside. On standard output it writes its process id, and when everything is
cleared away the server's exit code (128 + the signal's number after a signal, 0 when it was asked to end); standard
error is the server's log.
"""

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_WAIT_S = 10.0

REGISTRY = f"trace_async_files_{os.getuid()}"  # holds links to files that several owners use (shared_file.py)

_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_guard() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _group_members(group: int) -> list[int]:
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                # The fields after the name: state, parent, group, … The name is in parentheses and may hold anything.
                fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended while we looked
            if int(fields[2]) == group and fields[0] != "Z":
                members.append(int(entry))
    return members


def _shared_memory_of(group: int) -> set[int]:
    """Return the inodes below /dev/shm that members of the group have mapped.

    They are inodes and not names, because a name may change, as those of semaphores do.
    """
    inodes = set()
    for pid in _group_members(group):
        try:
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                fields = line.split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/dev/shm/"):
                    inodes.add(int(fields[4]))
        except OSError:
            continue
    return inodes


def _reap_all(deadline: float, *, kill: bool) -> bool:
    """Wait until no child is left. Returns False at the deadline.

    With `kill`, kill children too. This reaches processes that left the group; they become our children only when
    their own parent has ended, so it is done again and again.
    """
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            if time.monotonic() > deadline:
                return False
            for child in children.read_text().split() if kill else ():
                os.kill(int(child), signal.SIGKILL)  # it is not reaped yet, so nobody else has its number
            time.sleep(0.02)


def remove_unused(registry: Path) -> None:
    """Remove the files that only the registry still links to.

    A file enters the registry with a user's link, so a new file is never removed here.
    """
    for entry in registry.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            if entry.stat().st_nlink == 1:
                entry.unlink()


def _end(server: subprocess.Popen[bytes], grace_s: float, inodes: set[int], scratch: list[str]) -> None:
    inodes |= _shared_memory_of(server.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    if not _reap_all(time.monotonic() + grace_s, kill=False):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        _reap_all(time.monotonic() + KILL_WAIT_S, kill=True)
    for entry in os.scandir("/dev/shm"):
        if entry.inode() in inodes:
            Path(entry.path).unlink(missing_ok=True)
    for folder in scratch:
        shutil.rmtree(folder, ignore_errors=True)
        remove_unused(Path(folder).parent / REGISTRY)


def _leave_owner() -> None:
    """Fork, so that we are no child of the owner. Ray would kill an actor's children before they could clean up."""
    if os.fork():
        os._exit(0)


def _ask_to_end(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main(arguments: list[str]) -> None:
    grace_s, scratch = float(arguments[0]), arguments[1].split(":")
    command = arguments[arguments.index("--") + 1 :]
    _leave_owner()
    # These signals get handlers that do nothing. Ignored signals would be ignored by the server too, since a child
    # inherits that. SGLang's processes send SIGQUIT to their parent when they break down, and that may be us.
    for number in (signal.SIGQUIT, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGTERM, _ask_to_end)
    _libc.prctl(PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True, preexec_fn=_die_with_guard
    )
    print(os.getpid(), flush=True)
    inodes: set[int] = set()
    code = None
    exited = os.pidfd_open(server.pid)
    try:
        while code is None:
            ready, _, _ = select.select([0, exited], [], [])
            if exited in ready:
                code = server.wait()
            elif not os.read(0, 4096):
                break  # the owner has closed its end, or died
            else:
                inodes |= _shared_memory_of(server.pid)
    finally:
        signal.signal(signal.SIGTERM, lambda *_: None)
        _end(server, grace_s, inodes, scratch)
        with contextlib.suppress(BrokenPipeError):  # the owner may be gone
            print(0 if code is None else (code if code >= 0 else 128 - code), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
