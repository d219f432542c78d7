"""What a trainer reports reaches the terminal and MLflow."""

import logging
from pathlib import Path

import pytest
from mlflow import MlflowClient

from scripts.commands.recording import Recorder, progress_of
from tests.unit.tracking.test_trackers import Memory, make_tree
from trace_async.config import load_config
from trace_async.method.market import DECISIONS_LOG
from trace_async.run.scaling import Size, keep_sizes
from trace_async.run.state import RunState
from trace_async.tracking import tracker
from trace_async.tracking.log import Point, point_line
from trace_async.tracking.mlflow_tracker import saved_run_id, tracking_uri


def test_a_scaling_decision_is_said_with_its_reason_and_kept_in_mlflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"output_dir={tmp_path}", "tracking.system_metrics=false"])
    run_dir = tmp_path / "run"
    recorder = Recorder(config, run_dir, tmp_path, resume=False, first=None)
    size = Size(num_generators=3, reason="the learner waited 60% of the time", update=4)
    keep_sizes(run_dir, [size])
    recorder.on_resize(size)
    recorder.on_metrics(5, {"generators/target": 3.0, "train/reward": 0.5}, [])
    recorder.finish("FINISHED")
    assert "after update 4: 3 generators, the learner waited 60% of the time" in capsys.readouterr().out
    run_id = saved_run_id(run_dir)
    assert run_id is not None
    client = MlflowClient(tracking_uri(config))
    assert client.get_run(run_id).data.metrics["generators/target"] == 3.0
    kept = Path(client.download_artifacts(run_id, "generators.json", str(tmp_path)))
    assert '"num_generators": 3' in kept.read_text()
    assert "the learner waited 60% of the time" in kept.read_text()


def test_a_decision_of_a_rule_is_said_in_words_and_kept_in_mlflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"output_dir={tmp_path}", "tracking.system_metrics=false"])
    run_dir = tmp_path / "run"
    recorder = Recorder(config, run_dir, tmp_path, resume=False, first=None)
    logging.getLogger().setLevel(logging.INFO)  # as `trace-async train` sets it
    recorder.on_metrics(5, {"train/reward": 0.5}, [])
    for words in ("continuations after turn 1 pay", "continuations after turn 2 do not pay"):
        logging.getLogger(DECISIONS_LOG).info("%s", words)
    recorder.finish("FINISHED")
    logging.getLogger(DECISIONS_LOG).info("nobody listens any more")
    said = "after update 5: continuations after turn 1 pay\nafter update 5: continuations after turn 2 do not pay\n"
    assert said in capsys.readouterr().out
    assert (run_dir / "decisions.txt").read_text() == said
    run_id = saved_run_id(run_dir)
    assert run_id is not None
    kept = MlflowClient(tracking_uri(config)).download_artifacts(run_id, "decisions.txt", str(tmp_path))
    assert Path(kept).read_text() == said


async def test_rollouts_are_shown_from_inside_the_loop_of_a_run_whose_policy_was_built_for_it(
    tmp_path: Path, tiny_policy_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Memory, "made", [])
    monkeypatch.setitem(tracker.TRACKERS, "mlflow", "tests.unit.tracking.test_trackers:Memory")
    config = load_config(None, [f"output_dir={tmp_path}", "policy.path=''", "env.name=envs.agent.example:Follow"])
    recorder = Recorder(config, tmp_path / "run", tiny_policy_path, resume=False, first=None)
    recorder.on_metrics(1, {"train/reward": 0.5}, [make_tree()])
    (memory,) = Memory.made
    (rollout,) = memory.rollouts
    assert rollout.prompt == "<|im_start|> <|im_end|>"  # tokens 1 and 2
    recorder.finish("KILLED")


def test_the_time_left_of_a_resumed_run_comes_from_what_it_kept_up_to_its_checkpoint(tmp_path: Path) -> None:
    config = load_config(None, [f"output_dir={tmp_path}", "num_updates=10"])
    kept = [(0, {"time/eval_s": 30_000.0}), (1, {"train/reward": 0.5, "time/step_s": 4_000.0})]
    lost = [(2, {"train/reward": 0.5, "time/step_s": 400_000.0})]
    (tmp_path / "metrics.jsonl").write_text("".join(point_line(Point(i, 0.0, m)) for i, m in kept + lost))
    left = progress_of(config, tmp_path, RunState(num_updates=1)).seconds_left()
    assert left == pytest.approx(9 * 4_000.0 + 30_000.0, abs=600)  # the test itself takes a while
    assert progress_of(config, tmp_path, None).seconds_left() is None  # a run that begins anew has measured nothing
