"""What the machine may lack when a run is started on it. Mounts are made in a namespace of their own."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ray.test_end_to_end import SMALL, command
from tests.support.paths import ROOT

FULL_SHARED_MEMORY = (
    'mount -t tmpfs -o size=8m tmpfs /dev/shm && { head -c 9000000 /dev/zero > /dev/shm/ballast || true; } && exec "$@"'
)


def may_mount() -> bool:
    unshare = shutil.which("unshare")
    return unshare is not None and not subprocess.run([unshare, "-m", "true"], capture_output=True).returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(not may_mount(), reason="no mount namespace can be had here")
def test_a_run_with_a_full_dev_shm_is_made_all_the_same(tiny_policy_path: Path, tmp_path: Path):
    """Ray keeps its objects in /tmp then."""
    settings = [
        *SMALL,
        f"policy.path={tiny_policy_path}",
        f"output_dir={tmp_path}",
        "num_updates=2",
        "eval.num_tasks=4",
    ]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", FULL_SHARED_MEMORY, "sh", *command("train", *settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Held-out success" in done.stdout
