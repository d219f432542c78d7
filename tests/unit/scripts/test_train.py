"""`train` checks what `--dry-run` checks before it starts anything."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.cli import main
from trace_async.config import ConfigError, config_to_yaml, load_config
from trace_async.types import Split, Task

PARITY = "env.name=tests.support.parity_domain:Parity"


@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]], ids=["train", "dry run"])
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learner.max_tokens_per_micro_batch=64", "must fit into one micro-batch"),
        ("env.name=tests.unit.scripts.test_train:NothingHeldOut", "there are no heldout tasks"),
    ],
)
def test_what_the_dry_run_refuses_is_refused_before_anything_starts(
    dry_run: list[str], setting: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["train", *dry_run, PARITY, setting, f"output_dir={tmp_path}"]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_environment_that_breaks_down_while_it_shows_the_policy_is_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    agent = "env.args={agent: 'program:solve', python: /nowhere/python}"
    names = ["env.name=envs.agent.example:Follow", agent, f"policy.cache_dir={tmp_path}"]
    assert main(["make-policy", *names]) == 2
    assert "trace-async: env.args.python=/nowhere/python cannot be started" in capsys.readouterr().err


class NothingHeldOut:
    name = "nothing held out"

    def tasks(self, split: Split) -> list[Task]:
        return [Task(id="t", domain=self.name, kind="k", data={})] if split == "train" else []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> None:
    with contextlib.suppress(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while file.write(b"\0" * 512):
            pass


def test_a_run_that_cannot_be_begun_says_where_and_what_to_do(
    small_disk: Path, tiny_policy_path: Path, capsys: pytest.CaptureFixture[str]
):
    settings = [PARITY, f"policy.path={tiny_policy_path}", f"output_dir={small_disk}"]
    fill(small_disk)
    assert main(["train", *settings]) == 2
    assert f"a run cannot be begun in {small_disk}/run: No space left on device; free some" in capsys.readouterr().err
    assert not (small_disk / "run" / "config.yaml").exists()
    (small_disk / "ballast").unlink()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    assert main(["train", *settings]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_a_full_disk_does_not_cost_the_settings_of_a_run_that_is_to_go_on(
    small_disk: Path, tiny_policy_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = small_disk / "run"
    run_dir.mkdir()
    config = load_config(None, [PARITY, f"policy.path={tiny_policy_path}", f"output_dir={small_disk}"])
    (run_dir / "config.yaml").write_text(config_to_yaml(config))
    fill(small_disk)
    assert main(["train", "--resume", str(run_dir), "num_updates=7"]) == 2
    said = capsys.readouterr().err
    assert str(small_disk) in said
    assert "No space left on device; free some space there, or make it writable" in said
    assert load_config(run_dir / "config.yaml") == config


def test_sockets_of_ray_whose_paths_would_be_too_long_are_refused_by_name(
    tmp_path: Path, tiny_policy_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from actors.ray_cluster import start_ray

    config = load_config(None, [PARITY, f"policy.path={tiny_policy_path}", f"output_dir={tmp_path}"])
    monkeypatch.setenv("RAY_TMPDIR", f"/tmp/{'x' * 60}")
    with pytest.raises(ConfigError, match="longer than 107 bytes: set the environment variable RAY_TMPDIR to a short"):
        start_ray(config)
