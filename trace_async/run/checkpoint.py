"""Checkpoints on disk that a kill or a full disk cannot spoil.

    checkpoints/
      .saving-000020-x3f1/   being written; left over after a kill, removed by the next save
      .deleting-000000/      not kept any more; left over when it cannot be deleted, tried again by the next save
      000010/                whole: it got this name, by one rename, after all its files were on the disk
        manifest.json        every file with its size and xxh3 checksum
        trainer.json, learner/…, predictor/…      what the parts of a run wrote

The store does not know what the files mean; the parts write their own (run/state.py, learner/state.py, predictor/).
"""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import xxhash

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_FORMAT = 1
_SAVING = ".saving-"
_DELETING = ".deleting-"
_NAME = re.compile(r"(\d{6,})(?:\.(\d+))?")


class CheckpointError(Exception):
    """A checkpoint is damaged, missing or could not be written; the message names the file and what to do."""


class CheckpointStore:
    """The checkpoints of one run under `root`; the newest `keep` stay."""

    def __init__(self, root: Path, keep: int) -> None:
        self._root = root
        self._keep = keep

    @contextlib.asynccontextmanager
    async def saving(self, version: int) -> AsyncIterator[Path]:
        """Give a folder to write into; it becomes the checkpoint of `version` when the block ends without an error.

        A block that fails leaves nothing behind, and the checkpoints before are as they were. Raises CheckpointError
        when the disk does not take it.
        """
        folder = None
        try:
            folder = await asyncio.to_thread(self._begin, version)
            yield folder
            await asyncio.to_thread(self._commit, folder, version)
        except OSError as error:
            newest = self.newest()
            kept = f"the one before, {newest}, is whole" if newest else "there is none before it"
            raise CheckpointError(
                f"checkpoint {version} could not be saved under {self._root}: {error}; {kept}. Free some space there, "
                "or make it writable"
            ) from error
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def all(self) -> list[Path]:
        """Return all checkpoints, oldest first. What was being written at a kill is not among them."""
        found = [(match, entry) for entry in self._entries() if (match := _NAME.fullmatch(entry.name))]
        return [entry for _, entry in sorted(found, key=lambda pair: (int(pair[0][1]), int(pair[0][2] or 0)))]

    def newest(self) -> Path | None:
        """Return the newest checkpoint, unchecked; None when there is none."""
        return next(reversed(self.all()), None)

    def _entries(self) -> list[Path]:
        return list(self._root.iterdir()) if self._root.is_dir() else []

    def _begin(self, version: int) -> Path:
        self._root.mkdir(parents=True, exist_ok=True)
        for entry in self._entries():
            if entry.name.startswith((_SAVING, _DELETING)):
                _delete(entry)
        return Path(tempfile.mkdtemp(prefix=f"{_SAVING}{version:06d}-", dir=self._root))

    def _commit(self, folder: Path, version: int) -> None:
        files = {str(path.relative_to(folder)): _fingerprint(path) for path in _files(folder)}
        text = json.dumps({"format": _FORMAT, "version": version, "files": files}, indent=1)
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        for path in [*folder.rglob("*"), folder]:
            _to_disk(path)
        target, again = self._root / f"{version:06d}", 0
        while target.exists():  # the version was saved before, and that checkpoint is left alone
            again += 1
            target = self._root / f"{version:06d}.{again}"
        folder.rename(target)
        _to_disk(self._root)
        for old in self.all()[: -self._keep]:
            self._discard(old)

    def _discard(self, old: Path) -> None:
        """Delete a checkpoint that is not kept. One that cannot be deleted ends no run: the new one is whole."""
        doomed = old.with_name(f"{_DELETING}{old.name}")  # half deleted under its own name, it would look damaged
        try:
            old.rename(doomed)
        except OSError as error:
            log.warning("%s is not kept any more and cannot be deleted: %s; delete it by hand", old, error)
        else:
            _delete(doomed)


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except OSError as error:
        log.warning("%s cannot be deleted: %s; the next save tries again", folder, error)


def latest_checkpoint(root: Path) -> Path | None:
    """Return the newest checkpoint under `root`, checked file by file, or None. Raises CheckpointError."""
    newest = CheckpointStore(root, keep=1).newest()
    return check(newest) if newest is not None else None


def check(checkpoint: Path) -> Path:
    """Return the checkpoint itself when every file is there and unchanged.

    Raises CheckpointError, which names the first file that is not.
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{checkpoint}: not a whole checkpoint, {MANIFEST} cannot be read ({error})") from error
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{checkpoint}: written in format {manifest.get('format')}, this version reads {_FORMAT}")
    for name, expected in manifest["files"].items():
        path = checkpoint / name
        found = _fingerprint(path) if path.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"is damaged (found {found}, saved {expected})"
            raise CheckpointError(f"{path} {state}: resume from an older checkpoint beside it, or delete this one")
    return checkpoint


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(path: Path) -> dict[str, int | str]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
