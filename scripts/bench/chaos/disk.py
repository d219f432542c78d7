"""A small disk for a run to fill: a tmpfs of its own, or, without the right to mount one, limits that act like it."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import psutil

BALLAST = "ballast"


class Disk:
    """The folder that a run lies in. `close` moves what is on it to where it stays."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        self.is_mounted = (
            shutil.which("mount") is not None and not subprocess.run(mount, capture_output=True).returncode
        )

    def fill(self, processes: Callable[[], Iterable[psutil.Process]]) -> None:
        """Nothing more can be written. Where nothing can be mounted, `processes` may not make any file longer."""
        if not self.is_mounted:
            self._limit(processes(), 0)
            return
        with contextlib.suppress(OSError), (self.folder / BALLAST).open("wb", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(b"\0" * size):
                        pass

    def free(self, processes: Callable[[], Iterable[psutil.Process]]) -> None:
        """There is room again."""
        (self.folder / BALLAST).unlink(missing_ok=True)
        if not self.is_mounted:
            self._limit(processes(), resource.RLIM_INFINITY)

    def close(self, target: Path) -> None:
        """Copy all to `target` and give the disk back."""
        (self.folder / BALLAST).unlink(missing_ok=True)
        shutil.copytree(self.folder, target, dirs_exist_ok=True)
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _limit(processes: Iterable[psutil.Process], size: int) -> None:
        for process in processes:
            with contextlib.suppress(psutil.Error, OSError):
                _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))
