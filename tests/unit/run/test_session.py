"""Run folders are claimed at once, and a session that ended without a word is known afterwards."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.paths import ROOT
from trace_async.run.session import (
    Phases,
    RunFolderError,
    abandoned,
    at_work,
    claim_new,
    free_name,
    how_it_ended,
    last_session,
    phases_of,
    require_free,
)

WORKER = """
import sys, time
from pathlib import Path
from trace_async.run.session import at_work
with at_work(Path(sys.argv[1])):
    print("at work", flush=True)
    time.sleep(600)
"""


def worker(run_dir: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run_dir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


def test_the_same_name_gives_a_folder_of_its_own_each_time(tmp_path: Path):
    wanted = tmp_path / "runs" / "quick"
    assert free_name(wanted) == wanted
    assert claim_new(wanted, "a: 1\n") == wanted
    assert free_name(wanted) == tmp_path / "runs" / "quick-2"
    assert claim_new(wanted, "a: 2\n") == tmp_path / "runs" / "quick-2"
    assert claim_new(wanted, "a: 3\n") == tmp_path / "runs" / "quick-3"
    assert [(tmp_path / "runs" / name / "config.yaml").read_text() for name in ("quick", "quick-2", "quick-3")] == [
        "a: 1\n",
        "a: 2\n",
        "a: 3\n",
    ]


def test_many_processes_at_once_get_a_folder_each(tmp_path: Path):
    claim = "import sys; from pathlib import Path; from trace_async.run.session import claim_new; "
    claim += "sys.stdin.read(); print(claim_new(Path(sys.argv[1]), 'x'))"
    command = [sys.executable, "-c", claim, str(tmp_path / "run")]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    processes = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in processes:
        process.stdin.close()
    folders = {process.stdout.read().strip() for process in processes}
    assert {process.wait() for process in processes} == {0}
    assert len(folders) == 4


def test_a_run_that_is_worked_on_is_refused_until_it_ends(tmp_path: Path):
    process = worker(tmp_path)
    try:
        with pytest.raises(RunFolderError, match=rf"process {process.pid} on .* is at work on this run; stop it first"):
            require_free(tmp_path)
        assert how_it_ended(tmp_path) is None
        assert abandoned(tmp_path.parent) == []
    finally:
        process.kill()
        process.wait()
    require_free(tmp_path)


def test_a_session_that_was_killed_is_told_and_one_that_ended_in_order_is_not(tmp_path: Path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    with at_work(run_dir):
        assert last_session(run_dir).pid == os.getpid()
    assert how_it_ended(run_dir) is None

    process = worker(run_dir)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert f"process {process.pid}, the last to work on {run_dir}, ended without a word" in how_it_ended(run_dir)
    assert abandoned(tmp_path) == [run_dir]


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path):
    with at_work(tmp_path):
        text = (tmp_path / "session.json").read_text()
    started = str(last_session_started(text) - 1000)
    (tmp_path / "session.json").write_text(text.replace(str(last_session_started(text)), started))
    assert how_it_ended(tmp_path) is not None


def last_session_started(text: str) -> float:
    return json.loads(text)["process_started"]


def test_what_a_run_is_doing_is_kept_while_it_does_it(tmp_path: Path):
    phases = Phases(tmp_path)
    assert phases_of(tmp_path) == {}
    with phases.during("update"), phases.during("stage1"):
        assert set(phases_of(tmp_path)) == {"update", "stage1"}
    assert phases_of(tmp_path) == {}
    (tmp_path / "phases.json").write_text("[1")
    assert phases_of(tmp_path) == {}
    with Phases(tmp_path / "nowhere").during("update"):
        pass


def test_a_process_that_died_and_was_not_waited_for_is_not_at_work(tmp_path: Path):
    process = worker(tmp_path)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    require_free(tmp_path)
    assert (how_it_ended(tmp_path) or "").startswith(f"process {process.pid}, the last to work on")
    process.communicate()
