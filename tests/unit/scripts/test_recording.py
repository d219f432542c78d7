"""What a trainer reports reaches the terminal and MLflow."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from scripts.commands.recording import Recorder
from trace_async.config import load_config
from trace_async.run.scaling import Size, keep_sizes
from trace_async.tracking.mlflow import saved_run_id
from trace_async.tracking.mlflow_mirror import tracking_uri


def test_a_scaling_decision_is_said_with_its_reason_and_kept_in_mlflow(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, [f"output_dir={tmp_path}", "tracking.system_metrics=false"])
    run_dir = tmp_path / "run"
    recorder = Recorder(config, run_dir, resume=False, first=None)
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
