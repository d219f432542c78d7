"""A run whose process is gone is spoken for by its witness; one that ended in order needs no words."""

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

RUN = """
import sys, time
from pathlib import Path
from scripts.commands.witness import witnessed
from trace_async.run.session import at_work
run_dir = Path(sys.argv[1])
with at_work(run_dir), witnessed(run_dir):
    print("at work", flush=True)
    sys.stdin.read()
"""


def start(run_dir: Path) -> subprocess.Popen[str]:
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("name: run\n")
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", RUN, str(run_dir)], cwd=ROOT, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == "at work\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_who_is_killed_is_spoken_for(tmp_path: Path, number: signal.Signals):
    run_dir = tmp_path / "my run"
    process = start(run_dir)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)  # the witness has the pipe too: this waits for its end
    assert f"trace-async: process {process.pid}, the last to work on {run_dir}, ended without a word" in errors
    assert f"Go on with it: trace-async train --resume '{run_dir}'" in errors


def test_who_ends_in_order_is_not(tmp_path: Path):
    process = start(tmp_path / "run")
    _, errors = process.communicate("", timeout=120)
    assert (process.returncode, errors) == (0, "")
