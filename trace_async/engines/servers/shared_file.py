"""Share one copy of a large file between all processes of a user on a machine that need it at the same time.

Every process has a hard link in a folder of its own. So the file lasts as long as its users, however they end. One more
link in a registry lets others find it. The user who leaves last removes that link; if it was killed, its guard
(guard.py) or the next user does.
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
    """Let `path` hold the file known as `key`: a link to another process's copy, or else what `write(path)` makes.

    Waits for a process that is writing it. When `write` raises, so does this, and nobody is given the file.
    """
    registry = _registry_beside(path)
    if registry is None:
        write(path)
        return
    with _locked(registry):
        remove_unused(registry)
        # This fails when nobody has it, when its last user leaves just now, or when the file system knows no links.
        with contextlib.suppress(OSError):
            os.link(registry / key, path)
            return
        write(path)
        with contextlib.suppress(OSError):
            os.link(path, registry / key)


def unlink(path: Path) -> None:
    """Give up our own link."""
    path.unlink()
    registry = _registry_beside(path)
    if registry is not None:
        remove_unused(registry)


def _registry_beside(path: Path) -> Path | None:
    """Return the registry on the file system of `path`, which is made if need be, since links cannot cross over.

    Returns None if there is no place for one, or if it belongs to somebody else.
    """
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
    """Let only one process or thread inside at a time. The system releases the lock of a killed one."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
