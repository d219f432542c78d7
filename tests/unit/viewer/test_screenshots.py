"""The pictures of the documentation can be made again from any run."""

import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.shown_run import ShownRun

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install trace-async[dev]")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_terminal_and_trees_of_a_run_become_pictures(tmp_path: Path) -> None:
    run = ShownRun(tmp_path)
    run.write(1, [run.tree("q7")])
    run.write_curves([0.25, 0.5, 0.8125])
    out = tmp_path / "pictures"
    command = [sys.executable, "-m", "scripts.viewer.screenshots", str(tmp_path), str(out), "--only", "terminal,trees"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert made.returncode == 0, made.stderr
    sizes = {path.name: struct.unpack(">II", path.read_bytes()[16:24]) for path in out.iterdir()}  # of the IHDR chunk
    assert sizes == {"terminal.png": (1260, 220), "trees.png": (1300, 760)}


def test_a_picture_that_does_not_exist_is_refused_before_any_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.viewer.screenshots", str(tmp_path), str(tmp_path / "out")]
    made = subprocess.run([*command, "--only", "terminal,tree"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 2
    assert "--only tree: there are terminal, trees, mlflow, ray" in made.stderr
    assert not (tmp_path / "out").exists()
