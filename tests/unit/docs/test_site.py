"""The documentation builds without a warning, and the cluster files are what their programs read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.paths import ROOT

CLUSTER = ROOT / "scripts" / "cluster"


@pytest.mark.timeout(200)
def test_the_documentation_builds_and_no_link_or_reference_is_broken(tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "Env" in (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")


def test_the_ray_job_asks_for_what_the_trainer_is_pinned_to():
    job = yaml.safe_load((CLUSTER / "rayjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    assert f"ray[default]=={cluster['rayVersion']}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        (container,) = spec["containers"]
        mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts == {"/shared", "/dev/shm"}
        assert spec["terminationGracePeriodSeconds"] == 300


def test_the_slurm_script_is_a_shell_script_and_starts_ray_on_every_node(tmp_path: Path):
    script = CLUSTER / "slurm.sh"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    calls = tmp_path / "calls"
    commands = tmp_path / "bin"
    commands.mkdir()
    # Stand-ins for Slurm: they write down what they are asked for.
    (commands / "scontrol").write_text('#!/bin/sh\nprintf "node1\\nnode2\\nnode3\\n"\n')
    (commands / "srun").write_text(
        f'#!/bin/sh\necho "$@" >> {calls}\ncase "$*" in *hostname*) echo 10.1.2.3 x;; esac\n'
    )
    venv = tmp_path / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text("#!/bin/sh\necho 3\n")
    (venv / "trace-async").write_text(f'#!/bin/sh\necho "$@" >> {calls}\n')
    for command in (*commands.iterdir(), *venv.iterdir()):
        command.chmod(0o755)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-3]",
    }
    subprocess.run(["bash", str(script), "c.yaml", "num_updates=3"], env=environment, check=True, timeout=60)
    said = calls.read_text()
    assert "ray start --head --node-ip-address 10.1.2.3 --port 6379 --block" in said
    assert "--nodes 2 --ntasks 2 -x node1" in said
    assert "ray start --address 10.1.2.3:6379 --block" in said
    assert "train --config c.yaml actors.ray_address=10.1.2.3:6379 num_updates=3" in said
