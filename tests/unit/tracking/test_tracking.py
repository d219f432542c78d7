import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from trace_async.config import Config, TrackingConfig, load_config
from trace_async.tracking.log import METRICS_FILE, read_metrics
from trace_async.tracking.mlflow_tracker import key_of, saved_run_id, tracking_uri, ui_command
from trace_async.tracking.run_log import RunLog


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One output directory for all tests here: making a fresh sqlite store takes MLflow seconds."""
    return tmp_path_factory.mktemp("runs")


def make_config(store: Path, *overrides: str) -> Config:
    return load_config(None, [f"output_dir={store}", "tracking.system_metrics=false", *overrides])


def history(config: Config, run_id: str, key: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    found = MlflowClient(tracking_uri=tracking_uri(config)).get_metric_history(run_id, key)
    return sorted((metric.step, metric.value) for metric in found)


def test_points_reach_the_file_at_once_and_mlflow_by_the_end(store: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = make_config(store, "name=whole")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("w")
    tracker = RunLog.start(config, tmp_path / "run")
    for step in range(30):
        tracker.log({"train/reward": step / 4, "heldout/success_t1.0": 0.5}, step)
    assert [(p.step, p.metrics["train/reward"]) for p in read_metrics(tmp_path / "run")][-1] == (29, 29 / 4)
    tracker.log_artifact(checkpoint, "checkpoints")
    tracker.log_text("<p>", "trees/one.html")
    tracker.finish()
    tracker.finish("FAILED")  # a second end changes nothing

    run_id = saved_run_id(tmp_path / "run")
    assert run_id == tracker.run_id
    assert run_id is not None
    assert history(config, run_id, "train/reward") == [(step, step / 4) for step in range(30)]
    client = MlflowClient(tracking_uri=tracking_uri(config))
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "whole"
    assert run.data.params["budget.root_rollouts"] == "64"
    assert {a.path for a in client.list_artifacts(run_id)} == {"checkpoints", "config.yaml", "trees"}
    assert [a.path for a in client.list_artifacts(run_id, "checkpoints")] == ["checkpoints/weights"]
    assert list((store / "mlflow_artifacts").rglob("one.html"))


def test_a_resumed_run_has_each_point_once(store: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = make_config(store, "name=resumed")
    tracker = RunLog.start(config, tmp_path)
    for step in range(6):
        tracker.log({"train/reward": float(step)}, step)
    tracker.finish("KILLED")
    run_id = saved_run_id(tmp_path)
    assert run_id is not None
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 6, "ti')  # killed while writing

    # The checkpoint was made after update 3; update 4 and 5 are done again, with other figures.
    resumed = RunLog.start(config, tmp_path, resume_run_id=run_id, resume_step=3)
    assert [p.step for p in read_metrics(tmp_path)] == [0, 1, 2, 3]
    for step in range(4, 8):
        resumed.log({"train/reward": step + 0.5}, step)
    resumed.finish()
    assert [(p.step, p.metrics["train/reward"]) for p in read_metrics(tmp_path)] == [
        *((s, float(s)) for s in range(4)),
        *((s, s + 0.5) for s in range(4, 8)),
    ]
    assert history(config, run_id, "train/reward") == [*((s, float(s)) for s in range(6)), (6, 6.5), (7, 7.5)]
    assert MlflowClient(tracking_uri=tracking_uri(config)).get_run(run_id).info.status == "FINISHED"


def test_a_second_new_run_in_the_same_directory_is_refused(store: Path, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 0, "time": 0.0, "a": 1.0}\n')
    with pytest.raises(ValueError, match="already holds a run; resume it"):
        RunLog.start(make_config(store), tmp_path)


def test_a_child_run_names_its_parent(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    config = make_config(store)
    parent = RunLog.start(config, tmp_path / "parent")
    parent_id = parent.wait_for_run_id()
    assert parent_id is not None
    monkeypatch.setenv("TRACE_ASYNC_PARENT_RUN", parent_id)
    child = RunLog.start(config, tmp_path / "child")
    child.finish()
    parent.finish()
    client = MlflowClient(tracking_uri=tracking_uri(config))
    assert child.run_id is not None
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent_id


def test_a_process_that_just_ends_loses_nothing(store: Path, tmp_path: Path) -> None:
    script = textwrap.dedent("""
        import sys
        from trace_async.config import load_config
        from trace_async.tracking.run_log import RunLog
        config = load_config(None, [f"output_dir={sys.argv[1]}", "tracking.system_metrics=true"])
        tracker = RunLog.start(config, sys.argv[2])
        for step in range(50):
            tracker.log({"train/reward": float(step)}, step)
        tracker.log_text("some text", "note.txt")
        raise SystemExit(3)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script, str(store), str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 3
    assert done.stdout + done.stderr == ""  # nothing went wrong, and MLflow keeps quiet
    run_id = saved_run_id(tmp_path)
    assert run_id is not None
    assert history(make_config(store), run_id, "train/reward") == [(s, float(s)) for s in range(50)]


def test_a_point_of_thousands_of_figures_reaches_mlflow(store: Path, tmp_path: Path) -> None:
    config = make_config(store, "name=large")
    tracker = RunLog.start(config, tmp_path)
    tracker.log({f"heldout/env/m{number}_t1.0": float(number) for number in range(2500)}, 0)
    tracker.log({"train/reward": 0.5}, 1)
    tracker.finish()
    assert tracker.run_id is not None
    assert history(config, tracker.run_id, "train/reward") == [(1, 0.5)]
    for number in (0, 899, 900, 1000, 2499):
        assert history(config, tracker.run_id, f"heldout/env/m{number}_t1.0") == [(0, float(number))]


def test_what_the_store_refuses_is_named_and_holds_nothing_up(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One figure of a point, one setting and one artifact."""
    from mlflow import MlflowClient
    from mlflow.exceptions import INVALID_PARAMETER_VALUE, MlflowException

    take = MlflowClient.log_batch, MlflowClient.log_text

    def log_batch(self: MlflowClient, run_id: str, metrics=(), params=(), **kwargs: object) -> None:
        bad = [item.key for item in (*metrics, *params) if item.key in ("train/odd", "budget.pool_size")]
        if bad:
            raise MlflowException(f"{bad[0]} is taken\nand more", INVALID_PARAMETER_VALUE)
        take[0](self, run_id, metrics, params, **kwargs)

    def log_text(self: MlflowClient, run_id: str, text: str, artifact_file: str) -> None:
        if artifact_file == "odd.txt":
            raise MlflowException("no such name", INVALID_PARAMETER_VALUE)
        take[1](self, run_id, text, artifact_file)

    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    monkeypatch.setattr(MlflowClient, "log_text", log_text)
    config, said = make_config(store), []
    tracker = RunLog.start(config, tmp_path, log=said.append)
    tracker.log({"a": 1.0, "train/odd": 2.0, "b": 3.0}, 0)
    tracker.log_text("x", "odd.txt")
    tracker.log_text("x", "even.txt")
    tracker.log({"a": 2.0}, 1)
    tracker.finish()
    assert [line.partition(" refuses ")[2] for line in said] == [
        "budget.pool_size, which is left out there: budget.pool_size is taken",
        "train/odd, which is left out there: train/odd is taken",
        "odd.txt, which is left out there: no such name",
    ]
    assert tracker.run_id is not None
    run = MlflowClient(tracking_uri(config)).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"a": 2.0, "b": 3.0}
    assert run.data.params["budget.root_rollouts"] == "64"
    assert "budget.pool_size" not in run.data.params
    assert {a.path for a in MlflowClient(tracking_uri(config)).list_artifacts(tracker.run_id)} == {
        "config.yaml",
        "even.txt",
    }


def test_a_name_that_mlflow_does_not_take_is_changed_and_stays_one_of_its_own(store: Path, tmp_path: Path) -> None:
    assert key_of("heldout/success_t1.0/middle-3hop") == "heldout/success_t1.0/middle-3hop"
    odd = ["k/F1 (%)", "k/F1 (&)", "k/a//b", "k/a/../b", "/k", "k/", "..", ".", "k/" + "x" * 300, "k/" + "x" * 301]
    odd += ["k/\ud800", "k/ä", "k/\x1b[2J", "k/a_b", "k/a%b"]
    names = {name: key_of(name) for name in odd}
    assert len(set(names.values())) == len(names)
    config, said = make_config(store), []
    tracker = RunLog.start(config, tmp_path, log=said.append)
    tracker.log({name: float(number) for number, name in enumerate(odd)}, 0)
    tracker.finish()
    assert said == []
    assert tracker.run_id is not None
    for number, name in enumerate(odd):
        assert history(config, tracker.run_id, names[name]) == [(0, float(number))]


class Switch(BaseHTTPRequestHandler):
    """A tracking server that answers every request with 503."""

    def do_GET(self) -> None:
        self.send_error(503, "out of order")

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def broken_server() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Switch)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_broken_server_warns_once_and_training_goes_on(broken_server: str, tmp_path: Path) -> None:
    said: list[str] = []
    config = Config(output_dir=str(tmp_path), tracking=TrackingConfig(uri=broken_server, system_metrics=False))
    tracker = RunLog.start(config, tmp_path / "run", log=said.append)
    for step in range(3):
        tracker.log({"a": 1.0, "b": 2.0}, step)
    tracker.finish()
    assert [point.step for point in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert saved_run_id(tmp_path / "run") is None
    assert len(said) == 2
    assert "training goes on" in said[0]
    assert "lacks 6 points and 0 artifacts" in said[1]


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A tracking server that takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_never_answers_holds_nothing_up(
    silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trace_async.tracking.mlflow_tracker.FINISH_LIMIT_S", 0.5)
    said: list[str] = []
    config = Config(output_dir=str(tmp_path), tracking=TrackingConfig(uri=silent_server, system_metrics=False))
    tracker = RunLog.start(config, tmp_path / "run", log=said.append)
    for step in range(100):
        tracker.log({"a": 1.0, "b": 2.0}, step)
    assert len(read_metrics(tmp_path / "run")) == 100
    tracker.finish()
    assert said[-1].startswith(f"MLflow at {silent_server} lacks 200 points and 0 artifacts of this run")
    assert f"all points are in {tmp_path / 'run' / METRICS_FILE}" in said[-1]


def test_what_a_store_missed_is_added_when_the_run_goes_on(store: Path, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text("".join(f'{{"step": {s}, "time": {s}.5, "a": {s}.0}}\n' for s in range(4)))
    config = make_config(store)
    tracker = RunLog.start(config, tmp_path, resume_step=3)
    tracker.log({"a": 4.0}, 4)
    tracker.finish()
    assert tracker.run_id is not None
    assert history(config, tracker.run_id, "a") == [(s, float(s)) for s in range(5)]


def test_the_store_lies_beside_the_runs_and_its_page_is_for_this_machine_only(tmp_path: Path) -> None:
    config = Config(output_dir=str(tmp_path / "my runs"))
    assert tracking_uri(config) == f"sqlite:///{tmp_path}/my runs/mlflow.db"
    assert (
        ui_command(config) == f"mlflow ui --backend-store-uri 'sqlite:///{tmp_path}/my runs/mlflow.db' --host 127.0.0.1"
    )
    assert tracking_uri(Config(tracking=TrackingConfig(uri="http://h:5000"))) == "http://h:5000"


def test_importing_the_tracker_does_not_import_mlflow() -> None:
    code = "import sys, trace_async.tracking.mlflow_tracker; print('mlflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), timeout=60, check=True
    )
    assert done.stdout.strip() == "False"


def test_a_store_that_comes_back_gets_everything(tmp_path: Path) -> None:
    (tmp_path / "disk").write_text("not a directory yet")
    config = make_config(tmp_path, f"tracking.uri=sqlite:///{tmp_path}/disk/mlflow.db")
    said: list[str] = []
    warned = threading.Event()
    tracker = RunLog.start(config, tmp_path / "run", log=lambda line: (said.append(line), warned.set())[0])
    tracker.log({"a": 1.0}, 1)
    assert warned.wait(60)
    (tmp_path / "disk").unlink()
    (tmp_path / "disk").mkdir(exist_ok=True)  # the tracker, which tries again, may have made it first
    tracker.log({"a": 2.0}, 2)
    tracker.finish()
    assert "training goes on" in said[0]
    assert said[1:] == ["MLflow takes this run's figures again; none is lost"]
    assert tracker.run_id is not None
    assert history(config, tracker.run_id, "a") == [(1, 1.0), (2, 2.0)]


def test_the_machine_is_watched_too(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    config = load_config(None, [f"output_dir={store}"])
    tracker = RunLog.start(config, tmp_path)
    run_id = tracker.wait_for_run_id()
    assert run_id is not None
    client = MlflowClient(tracking_uri=tracking_uri(config))
    for _ in range(200):
        if "system/system_memory_usage_megabytes" in client.get_run(run_id).data.metrics:
            break
        time.sleep(0.1)
    tracker.finish()
    assert client.get_run(run_id).data.metrics["system/system_memory_usage_megabytes"] > 0
