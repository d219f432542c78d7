"""One copy of a large file for all processes of a user on a machine that need it at the same time.

Each has a hard link in a folder of its own, so the file lasts as long as its users do, however they end. By one more
link, in a registry, others find it; that one is removed by the user who leaves last, or, when that was killed, by its
guard (guard.py) or by the next one to come.
"""

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from trace_async.engines.servers.guard import REGISTRY, remove_unused
from trace_async.engines.servers.server import SHARED_MEMORY


def link_or_write(path: Path, key: str, write: Callable[[Path], None]) -> None:
    """Have `path` hold the file known as `key`: what another process has of it now, else what `write(path)` makes.

    Waits for a process that is writing. When `write` raises, so does this, and nobody is given the file.
    """
    registry = _registry_beside(path)
    if registry is None:
        write(path)
        return
    with _locked(registry):
        remove_unused(registry)
        # None has it, its last user leaves just now, or this file system knows no links: then everyone writes.
        with contextlib.suppress(OSError):
            os.link(registry / key, path)
            return
        write(path)
        with contextlib.suppress(OSError):
            os.link(path, registry / key)


def unlink(path: Path) -> None:
    """Give up one's own link."""
    path.unlink()
    registry = _registry_beside(path)
    if registry is not None:
        remove_unused(registry)


def _registry_beside(path: Path) -> Path | None:
    """Of the file system that `path` is on, made if need be; None where there is none, or somebody else's."""
    for root in (SHARED_MEMORY, Path(tempfile.gettempdir())):
        if root.is_dir() and root.stat().st_dev == path.parent.stat().st_dev:
            registry = root / REGISTRY
            with contextlib.suppress(FileExistsError):
                registry.mkdir(mode=0o700)
            found = registry.lstat()
            own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
            return registry if own else None
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process, or thread, at a time; a killed one lets go."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
