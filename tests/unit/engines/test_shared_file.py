"""One copy for all who need it at once: found, waited for, and gone with its last user."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from trace_async.engines.servers import shared_file
from trace_async.engines.servers.guard import REGISTRY, remove_unused
from trace_async.engines.servers.shared_file import link_or_write, unlink

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As if this file system had its own temporary folder."""
    monkeypatch.setattr(shared_file.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / REGISTRY


def place(tmp_path: Path, user: str) -> Path:
    folder = tmp_path / user
    folder.mkdir()
    return folder / "file"


def writes(text: str, log: list[str]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        log.append(text)
        path.write_text(text)

    return write


def test_the_second_user_links_what_the_first_wrote(tmp_path, registry):
    log: list[str] = []
    first, second, other = (place(tmp_path, user) for user in "abc")
    link_or_write(first, "k", writes("one", log))
    link_or_write(second, "k", writes("never", log))
    link_or_write(other, "l", writes("two", log))
    assert log == ["one", "two"]
    assert second.read_text() == "one"
    assert second.stat().st_ino == first.stat().st_ino
    unlink(first)
    assert second.read_text() == "one"
    assert sorted(entry.name for entry in registry.iterdir()) == ["k", "l"]
    unlink(second)
    unlink(other)
    assert list(registry.iterdir()) == []
    link_or_write(first, "k", writes("anew", log))
    assert first.read_text() == "anew"


def test_who_comes_while_one_writes_waits_for_it(tmp_path):
    begun, go = threading.Event(), threading.Event()
    log: list[str] = []

    def slowly(path: Path) -> None:
        begun.set()
        assert go.wait(20)
        path.write_text("slow")

    paths = [place(tmp_path, f"user{i}") for i in range(9)]
    threads = [threading.Thread(target=link_or_write, args=(paths[0], "k", slowly))]
    threads += [threading.Thread(target=link_or_write, args=(path, "k", writes("again", log))) for path in paths[1:]]
    threads[0].start()
    assert begun.wait(20)
    for thread in threads[1:]:
        thread.start()
    assert not any(path.exists() for path in paths)
    go.set()
    for thread in threads:
        thread.join(20)
    assert log == []
    assert {path.read_text() for path in paths} == {"slow"}
    assert len({path.stat().st_ino for path in paths}) == 1


def test_a_file_that_could_not_be_written_is_given_to_nobody(tmp_path, registry):
    def fails(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    first, second = place(tmp_path, "a"), place(tmp_path, "b")
    with pytest.raises(OSError, match="disk full"):
        link_or_write(first, "k", fails)
    assert list(registry.iterdir()) == []
    link_or_write(second, "k", writes("whole", []))
    assert second.read_text() == "whole"


def test_a_killed_user_holds_nobody_up_and_leaves_nothing_to_those_who_come(tmp_path, registry):
    program = textwrap.dedent(
        f"""
        import time
        from pathlib import Path
        from trace_async.engines.servers import shared_file
        shared_file.tempfile.gettempdir = lambda: {str(tmp_path)!r}

        def write(path):
            path.write_text("whole")
            print("written", flush=True)
            if path.parent.name == "writing":
                time.sleep(600)

        for name in ("using", "writing"):
            folder = Path({str(tmp_path)!r}, name)
            folder.mkdir()
            shared_file.link_or_write(folder / "file", name, write)
        """
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert [child.stdout.readline() for _ in range(2)] == ["written\n"] * 2
    os.kill(child.pid, signal.SIGKILL)  # with the lock in its hands
    child.wait()
    assert [entry.name for entry in registry.iterdir()] == ["using"]
    # Its guard removes its folders and then what only the registry has.
    (tmp_path / "using" / "file").unlink()
    remove_unused(registry)
    assert list(registry.iterdir()) == []
    path = place(tmp_path, "next")
    link_or_write(path, "writing", writes("anew", []))
    assert path.read_text() == "anew"


@pytest.mark.parametrize("fault", ["link", "open to all", "file"])
def test_somebody_elses_registry_is_not_used(tmp_path, registry, fault):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if fault == "link":
        registry.symlink_to(elsewhere)
    elif fault == "file":
        registry.touch()
    else:
        registry.mkdir()
        registry.chmod(0o777)
    path = place(tmp_path, "a")
    link_or_write(path, "k", writes("own", []))
    assert path.read_text() == "own"
    assert path.stat().st_nlink == 1
    unlink(path)
    assert list(elsewhere.iterdir()) == []


def test_on_another_file_system_everyone_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_file.tempfile, "gettempdir", lambda: "/proc")
    first, second = place(tmp_path, "a"), place(tmp_path, "b")
    for path in (first, second):
        link_or_write(path, "k", writes(path.parent.name, []))
    assert (first.read_text(), second.read_text()) == ("a", "b")
