import asyncio
import errno
import json
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from trace_async.run.checkpoint import MANIFEST, CheckpointError, CheckpointStore, check, latest_checkpoint


async def save(root: Path, version: int, text: str = "", keep: int = 3) -> Path:
    store = CheckpointStore(root, keep)
    async with store.saving(version) as folder:
        (folder / "learner").mkdir()
        (folder / "learner" / "a.txt").write_text(text or f"weights of {version}")
        (folder / "trainer.json").write_text("{}")
    newest = store.newest()
    assert newest is not None
    return newest


async def test_a_checkpoint_appears_whole_and_the_newest_are_kept(tmp_path):
    for version in (1, 2, 9, 10, 11):
        await save(tmp_path, version)
    assert [path.name for path in CheckpointStore(tmp_path, 3).all()] == ["000009", "000010", "000011"]
    newest = latest_checkpoint(tmp_path)
    assert newest == tmp_path / "000011"
    assert (newest / "learner" / "a.txt").read_text() == "weights of 11"
    manifest = json.loads((newest / MANIFEST).read_text())
    assert manifest["version"] == 11
    assert sorted(manifest["files"]) == ["learner/a.txt", "trainer.json"]


async def test_saving_a_version_again_keeps_the_first_until_the_second_is_whole(tmp_path):
    await save(tmp_path, 4, "first")
    again = await save(tmp_path, 4, "second")
    assert (again / "learner" / "a.txt").read_text() == "second"
    assert [path.name for path in CheckpointStore(tmp_path, 3).all()] == ["000004", "000004.1"]
    await save(tmp_path, 5)
    assert CheckpointStore(tmp_path, 3).newest() == tmp_path / "000005"


async def fail_while_saving(root: Path, error: Exception) -> None:
    async with CheckpointStore(root, 1).saving(2) as folder:
        (folder / "half.txt").write_text("half")
        raise error


async def test_a_save_that_fails_leaves_the_one_before(tmp_path):
    await save(tmp_path, 1)
    with pytest.raises(RuntimeError, match="rank 1 died"):
        await fail_while_saving(tmp_path, RuntimeError("rank 1 died"))
    assert latest_checkpoint(tmp_path) == tmp_path / "000001"
    assert [entry.name for entry in tmp_path.iterdir()] == ["000001"]


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "manifest", "no manifest"])
async def test_damage_is_found_and_named(tmp_path, harm):
    newest = await save(tmp_path, 1)
    path = newest / "learner" / "a.txt"
    named = "learner/a.txt"
    if harm == "flip":
        path.write_text("Weights of 1")
    elif harm == "truncate":
        path.write_text("weights")
    elif harm == "remove":
        path.unlink()
    else:
        named = MANIFEST
        (newest / MANIFEST).write_text("{") if harm == "manifest" else (newest / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=named):
        check(newest)
    with pytest.raises(CheckpointError, match=named):
        latest_checkpoint(tmp_path)


def test_no_checkpoint_yet(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None


CHILD = """
    import asyncio, sys, os, resource
    from pathlib import Path
    from trace_async.run.checkpoint import CheckpointStore

    root, version, megabytes, limit = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    async def main():
        async with CheckpointStore(root, 1).saving(version) as folder:
            print("saving", flush=True)
            for part in range(megabytes):
                with open(folder / f"part{part}", "wb") as file:
                    file.write(os.urandom(1 << 20))
        print("saved", flush=True)

    asyncio.run(main())
"""


def child(root: Path, version: int, megabytes: int, limit: int = 0) -> subprocess.Popen[str]:
    arguments = [str(root), str(version), str(megabytes), str(limit)]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CHILD), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_sigkill_in_the_middle_of_a_save_costs_nothing(tmp_path):
    before = await save(tmp_path, 1, keep=1)
    for attempt in range(4):
        process = child(tmp_path, 2, megabytes=200)
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        await asyncio.sleep(0.05 * attempt)
        process.send_signal(signal.SIGKILL)
        assert "saved" not in process.communicate(timeout=30)[0]
        assert latest_checkpoint(tmp_path) == before
        assert any(entry.name.startswith(".saving-") for entry in tmp_path.iterdir())
    await save(tmp_path, 3, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["000003"]


async def test_a_full_disk_costs_nothing_and_is_named(tmp_path):
    """A limit on file size stands for the full disk: writing fails with OSError in the middle of a file."""
    before = await save(tmp_path, 1, keep=1)
    process = child(tmp_path, 2, megabytes=2, limit=1 << 19)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "checkpoint 2 could not be saved" in errors
    assert "000001, is whole" in errors
    assert latest_checkpoint(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["000001"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


async def test_a_file_system_that_is_full_costs_nothing(small_disk):
    before = await save(small_disk, 1, keep=1)
    with pytest.raises(CheckpointError, match="No space left"):
        await save(small_disk, 2, text="x" * (2 << 20), keep=1)
    assert latest_checkpoint(small_disk) == before
    assert await save(small_disk, 3, keep=1) == small_disk / "000003"


async def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path, monkeypatch, caplog):
    """Something is mounted in it, say. The new one is whole, and what is left is never taken for a checkpoint."""
    await save(tmp_path, 1, keep=1)
    really = shutil.rmtree

    def refuse(path, *args, **options):
        if Path(path).name.startswith(".deleting-"):
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))
        really(path, *args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        assert await save(tmp_path, 2, keep=1) == tmp_path / "000002"
    assert f"{tmp_path / '.deleting-000001'} cannot be deleted" in caplog.text
    assert latest_checkpoint(tmp_path) == tmp_path / "000002"
    await save(tmp_path, 3, keep=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["000003"]


async def test_a_checkpoint_whose_folder_cannot_be_renamed_stays_and_is_named(tmp_path, monkeypatch, caplog):
    before = await save(tmp_path, 1, keep=1)
    really = Path.rename

    def refuse(self, target):
        if self == before:
            raise OSError(errno.EPERM, "Operation not permitted", str(self))
        return really(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    assert await save(tmp_path, 2, keep=1) == tmp_path / "000002"
    assert f"{before} is not kept any more and cannot be deleted" in caplog.text
    assert latest_checkpoint(tmp_path) == tmp_path / "000002"


async def test_a_folder_that_is_read_only_is_named(small_disk):
    before = await save(small_disk, 1, keep=1)
    await asyncio.to_thread(subprocess.run, ["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*000001, is whole.*make it writable"):
        await save(small_disk, 2, keep=1)
    assert latest_checkpoint(small_disk) == before
