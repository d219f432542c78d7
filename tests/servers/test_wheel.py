"""The wheel is whole: built, installed into an empty environment and used there, far from the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.paths import ROOT

PACKAGES = ("trace_async", "actors", "envs", "scripts", "configs")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Its output; an AssertionError with all of it when it fails."""
    # Neither the checkout nor what it set may be seen by what is run.
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRACE_ASYNC_ENGINES")}
    result = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=clean | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def tracked() -> list[str]:
    names = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            *PACKAGES,
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return [name for name in names if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a virtual environment with the wheel; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "source" / name)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source", cwd=folder)
    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=folder)
    python = environment / "bin" / "python"
    run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", *folder.glob("*.whl"), cwd=folder)
    # A path file, so that torch is not installed anew; path files inside the folder it names do not count.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip()
    (Path(purelib) / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return environment


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    return tmp_path


def test_every_file_of_the_packages_is_in_it(installed: Path):
    purelib = next(installed.glob("lib/python*/site-packages"))
    assert [name for name in tracked() if name.startswith(PACKAGES) and not (purelib / name).is_file()] == []


def test_commands_work_far_from_the_checkout(installed: Path, elsewhere: Path):
    command = installed / "bin" / "trace-async"
    assert "oracle" in run(command, "settings", "budget.oracle_rollouts", cwd=elsewhere)
    schema = json.loads(run(command, "settings", "--json-schema", cwd=elsewhere))
    assert "budget" in schema["properties"]
    where = run(installed / "bin/python", "-c", "import trace_async; print(trace_async.__file__)", cwd=elsewhere)
    assert where.startswith(str(installed))


@pytest.mark.parametrize("config", ["configs/quickstart/multihop.yaml", "quickstart/math.yaml"])
def test_a_shipped_config_is_planned_by_its_name(installed: Path, elsewhere: Path, config: str):
    out = run(installed / "bin/trace-async", "train", "--config", config, "--dry-run", cwd=elsewhere)
    assert "trajectory equivalents" in out
    assert "run directory" in out


def test_engines_are_found_by_the_variable_and_else_in_the_users_cache(installed: Path, elsewhere: Path):
    program = "from trace_async.engines.servers.environments import engines_folder; print(engines_folder())"
    python = installed / "bin/python"
    assert run(python, "-c", program, cwd=elsewhere, XDG_CACHE_HOME="/c").strip() == "/c/trace_async/engines"
    assert run(python, "-c", program, cwd=elsewhere, TRACE_ASYNC_ENGINES="/e").strip() == "/e"


def test_an_engine_starts_on_the_installed_stand_ins(installed: Path, elsewhere: Path):
    engine = ROOT / ".venvs/sglang/bin/python"
    if not engine.is_file() and os.environ.get("CI") != "true":
        pytest.skip("no .venvs/sglang: run `bash scripts/setup_engines.sh sglang`")
    program = "from trace_async.engines.servers import sglang; print(sglang.CPU_STAND_INS)"
    stand_ins = run(installed / "bin/python", "-c", program, cwd=elsewhere).strip().splitlines()[-1]
    assert stand_ins.startswith(str(installed))
    # The server's own command line is parsed only after all of its imports, which need every stand-in.
    out = run(engine, "-m", "sglang.launch_server", "--help", cwd=elsewhere, PYTHONPATH=stand_ins)
    assert "--model-path" in out
