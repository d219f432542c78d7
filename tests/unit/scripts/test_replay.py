"""What `trace-async replay` says, with fakes in the models' places."""

import asyncio
from pathlib import Path

import pytest

from actors.replay import replay
from scripts import cli
from scripts.commands.replay import _replay
from tests.support.fake_parts import FakeLearner, FakeParts, FakePredictor
from tests.unit.actors.test_trainer import Run
from trace_async.config import config_to_yaml
from trace_async.run.schedule import Plan, Schedule, plan_replay
from trace_async.tracking.log import write_metrics
from trace_async.types import Point


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of six updates, of which the fourth has figures; its models are fakes when they are made again too."""
    run = Run(tmp_path, FakeParts(), overrides=["checkpoint.every_updates=0"])
    asyncio.run(run.trainer.run())
    (tmp_path / "config.yaml").write_text(config_to_yaml(run.config))
    write_metrics(tmp_path, [Point(4, 0.0, {"learner/updated": 0.5})])

    def made_again(config: object, folder: Path, policy_path: Path, plan: Plan):
        return replay(plan, Schedule(folder), FakeLearner(), FakePredictor())

    monkeypatch.setattr("actors.replay.replay_run", made_again)
    return tmp_path


def said_of(run_dir: Path, update: int, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    config = Run(run_dir, FakeParts()).config
    status = asyncio.run(_replay(config, run_dir, Path("policy"), plan_replay(run_dir, update)))
    said = capsys.readouterr()
    return status, said.out, said.err


def test_updates_trees_arrivals_and_figures_are_shown(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = said_of(run_dir, 4, capsys)
    assert (status, err) == (0, "")
    trees = Schedule(run_dir).read_trees(4)
    assert [line.partition(", ")[2] for line in out.splitlines() if line.startswith("update ")] == ["as in the run"] * 4
    assert f"  tree 1: {trees[0].task.id}, {len(trees[0].rollouts)} rollouts, mean reward" in out
    first = Schedule(run_dir).read(4).arrivals[0]
    assert f"  +0.00 s: prompt {first.ticket}, {first.task_id}: kept" in out
    assert out.count("\n  tree ") == len(trees)
    (figures,) = [line.split() for line in out.splitlines() if "learner/updated" in line]
    assert figures == ["learner/updated", "1", "0.5"]


def test_where_they_part_is_said_once_with_what_it_may_be(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_dir / "schedule" / "000002.trees.jsonl"
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    status, out, err = said_of(run_dir, 4, capsys)
    assert status == 1
    said = [line.partition(", ")[2] for line in out.splitlines() if line.startswith("update ")]
    assert said == ["as in the run", *["otherwise than in the run: policy and predictor"] * 3]
    assert "from update 2 on it is not what the run made" in err


def test_an_update_that_ended_the_run_is_made_again_without_a_comparison(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = Schedule(run_dir)
    schedule.end(schedule.read(6), weights="", predictor="")
    status, out, _ = said_of(run_dir, 6, capsys)
    assert status == 0
    assert "which the run did not end; there is nothing to compare" in out


def test_what_is_not_there_is_named(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(run_dir), "--update", "9"]) == 2
    assert "holds no record of it; 1 to 6 are there" in capsys.readouterr().err
    assert cli.main(["replay", str(tmp_path / "nowhere"), "--update", "1"]) == 2
    assert "there is no run" in capsys.readouterr().err
