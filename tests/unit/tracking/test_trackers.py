"""A run's log goes to every tracker that is named: a fake that keeps all, TensorBoard's own reader, MLflow's client."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from tests.unit.tracking.test_tracking import make_config
from trace_async.config import Config, ConfigError, load_config
from trace_async.tracking import tracker
from trace_async.tracking.log import read_metrics
from trace_async.tracking.mlflow_tracker import tracking_uri
from trace_async.tracking.records import DatasetRecord, RolloutRecord, dataset_record, rollout_record, sample_rollouts
from trace_async.tracking.run_log import RunLog
from trace_async.tracking.tracker import Artifact, RunStatus, TrackedRun
from trace_async.trees.tree import Node, Rollout, RolloutTree
from trace_async.types import Point, Task, VersionSpan


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def decode(token_ids: Sequence[int]) -> str:
    return " ".join(f"t{token}" for token in token_ids)


def turn(parent: int, rollout: int, tokens: tuple[int, ...], generated: int) -> Node:
    return Node(
        parent=parent,
        rollout=rollout,
        token_ids=tokens,
        num_generated=generated,
        logprobs=(-0.5,) * generated,
        version_spans=(VersionSpan(0, 3),),
        prompt_tokens=10,
        cached_tokens=5,
    )


def make_tree() -> RolloutTree:
    """Two rollouts of two turns and of one; the first one's tool answers with tokens 8 and 9."""
    nodes = (
        Node(parent=-1, rollout=-1, token_ids=(1, 2), num_generated=0),
        turn(0, 0, (7, 8, 9), 1),
        turn(1, 0, (6,), 1),
        turn(0, 1, (5, 4), 2),
    )
    return RolloutTree(
        task=Task(id="t\x1b1", domain="multihop", kind="easy", data={}),
        nodes=nodes,
        rollouts=(
            Rollout(kind="root", anchor=0, leaf=2, reward=1.0, metrics={"requests": 2.0}),
            Rollout(kind="root", anchor=0, leaf=3, reward=0.0),
        ),
    )


class Memory:
    """Keeps all that it is given."""

    made: ClassVar[list["Memory"]] = []

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.points: list[Point] = []
        self.artifacts: list[Artifact] = []
        self.rollouts: list[RolloutRecord] = []
        self.datasets: list[DatasetRecord] = []
        self.policies: list[Path] = []
        self.ends: list[RunStatus] = []
        self.made.append(self)

    def log(self, point: Point) -> None:
        self.points.append(point)

    def keep(self, artifact: Artifact) -> None:
        self.artifacts.append(artifact)

    def show(self, rollouts: Sequence[RolloutRecord]) -> None:
        self.rollouts += rollouts

    def use(self, datasets: Sequence[DatasetRecord]) -> None:
        self.datasets += datasets

    def keep_policy(self, folder: Path) -> None:
        self.policies.append(folder)

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        return "memory"

    def finish(self, status: RunStatus) -> None:
        self.ends.append(status)


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, store: Path) -> Config:
    """Of a run whose two trackers are both a Memory."""
    monkeypatch.setattr(Memory, "made", [])
    monkeypatch.setitem(tracker.TRACKERS, "mlflow", f"{__name__}:Memory")
    monkeypatch.setitem(tracker.TRACKERS, "tensorboard", f"{__name__}:Memory")
    return make_config(store, "tracking.backends=[mlflow,tensorboard]")


def test_every_tracker_is_given_all_of_it_and_the_file_the_figures(config: Config, tmp_path: Path):
    log = RunLog.start(config, tmp_path, parent_run_id="parent")
    log.log({"train/reward": 0.5}, 1)
    log.log_text("<p>", "page.html")
    log.log_artifact(tmp_path, "folder")
    log.log_rollouts(sample_rollouts([make_tree()], 1, decode, update=1, seed=0))
    log.log_datasets([dataset_record("multihop", {}, [make_tree().task], "training")])
    log.log_policy(tmp_path / "policy")
    assert log.run_id == "memory"
    log.finish("KILLED")
    log.finish("FINISHED")
    assert len(Memory.made) == 2
    for memory in Memory.made:
        assert memory.run.parent_run_id == "parent"
        assert [(point.step, point.metrics) for point in memory.points] == [(1, {"train/reward": 0.5})]
        assert memory.artifacts == [Artifact("page.html", None, "<p>"), Artifact("folder", tmp_path, None)]
        assert len(memory.rollouts) == len(memory.datasets) == 1
        assert memory.policies == [tmp_path / "policy"]
        assert memory.ends == ["KILLED"]
    assert [point.metrics for point in read_metrics(tmp_path)] == [{"train/reward": 0.5}]


def test_a_run_that_goes_on_hands_its_trackers_what_the_file_kept(config: Config, tmp_path: Path):
    first = RunLog.start(config, tmp_path)
    for step in range(4):
        first.log({"x": step}, step)
    first.finish("KILLED")
    RunLog.start(config, tmp_path, resume_run_id="old", resume_step=2).finish()
    again = Memory.made[-1].run
    assert (again.run_id, [point.step for point in again.kept]) == ("old", [0, 1, 2])


def test_without_trackers_the_file_is_there_all_the_same(store: Path, tmp_path: Path):
    log = RunLog.start(make_config(store, "tracking.backends=[]"), tmp_path)
    log.log({"x": 1}, 0)
    assert log.wait_for_run_id(0) is None
    log.finish()
    assert [point.metrics for point in read_metrics(tmp_path)] == [{"x": 1.0}]


def test_a_tracker_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"tracking\.backends"):
        load_config(None, ["tracking.backends=[wandb]"])


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_rollout_is_told_turn_by_turn_with_its_figures():
    record = rollout_record(make_tree(), 0, decode, update=3)
    assert (record.update, record.task_id, record.kind, record.reward) == (3, "t\\x1b1", "root", 1.0)
    assert record.prompt == "t1 t2"
    assert [(turn.said, turn.observation) for turn in record.turns] == [("t7", "t8 t9"), ("t6", "")]
    first = record.turns[0]
    assert (first.num_prompt_tokens, first.num_generated) == (10, 1)
    assert first.figures["mean_logprob"] == -0.5
    assert first.figures["policy_versions"] == [3]
    assert first.figures["cached_share"] == 0.5


def test_the_same_rollouts_are_drawn_for_the_same_seed_and_no_more_than_there_are():
    trees = [make_tree() for _ in range(5)]
    drawn = [sample_rollouts(trees, 3, decode, update=1, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert len(drawn[2]) == 3
    assert len(sample_rollouts(trees, 99, decode, update=1, seed=0)) == 10


def test_the_digest_of_a_dataset_tells_other_tasks_and_fewer_tasks_apart():
    def digest(*ids: str) -> str:
        tasks = [Task(id=name, domain="d", kind="k", data={}) for name in ids]
        return dataset_record("d", {"seed": 1}, tasks, "training").digest

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("b", "a"), digest("a"), digest("a", "c")}) == 4


# ── TensorBoard and MLflow, read back by their own readers ───────────────────────────────────────────────────────


def test_tensorboard_reads_the_figures_and_a_resumed_run_hides_what_came_again(store: Path, tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make_config(store, "tracking.backends=[tensorboard]")
    log = RunLog.start(config, tmp_path)
    for step in range(4):
        log.log({"train/reward": step / 4}, step)
    log.finish("KILLED")
    log = RunLog.start(config, tmp_path, resume_step=1)
    log.log({"train/reward": 0.875}, 2)
    log.log_rollouts([rollout_record(make_tree(), 0, decode, update=2)])
    log.finish()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/reward")] == [(0, 0.0), (1, 0.25), (2, 0.875)]
    (text,) = events.Tensors("rollouts/0/text_summary")
    assert b"reward 1" in text.tensor_proto.string_val[0]
    assert b"    t8 t9" in text.tensor_proto.string_val[0]


def test_mlflow_gives_back_rollouts_datasets_and_the_policy(store: Path, tmp_path: Path, tiny_policy_path: Path):
    import mlflow
    from mlflow import MlflowClient

    config = make_config(store, "name=shown", "env.name=math", "seed=7")
    before = mlflow.get_tracking_uri()
    said: list[str] = []
    log = RunLog.start(config, tmp_path, log=said.append)
    log.log_rollouts([rollout_record(make_tree(), index, decode, update=4) for index in range(2)])
    log.log_datasets([dataset_record("math", {"seed": 1}, [make_tree().task], "training")])
    log.log_policy(tiny_policy_path)
    log.finish()
    assert said == []
    assert mlflow.get_tracking_uri() == before

    client = MlflowClient(tracking_uri=tracking_uri(config))
    run = client.get_run(log.run_id)
    assert run.info.status == "FINISHED"
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "math"
    assert json.loads(dataset.dataset.profile) == {"num_tasks": 1}
    assert [tag.value for tag in dataset.tags] == ["training"]

    mlflow.set_tracking_uri(tracking_uri(config))
    try:
        traces = client.search_traces(locations=[run.info.experiment_id], run_id=log.run_id)
        by_reward = {trace.info.tags["reward"]: trace for trace in traces}
        assert set(by_reward) == {"1", "0"}
        won = by_reward["1"]
        assert {name: won.info.tags[name] for name in ("update", "task", "rollout")} == {
            "update": "4",
            "task": "t\\x1b1",
            "rollout": "root",
        }
        root, *spans = won.data.spans
        assert (root.inputs, root.outputs) == ({"prompt": "t1 t2"}, {"reward": 1.0, "requests": 2.0})
        assert [(span.name, span.span_type, span.outputs) for span in spans] == [
            ("turn 1", "LLM", "t7"),
            ("observation", "TOOL", "t8 t9"),
            ("turn 2", "LLM", "t6"),
        ]
        assert spans[0].attributes["mlflow.chat.tokenUsage"]["output_tokens"] == 1

        (model,) = client.search_logged_models([run.info.experiment_id])
        assert (model.name, model.source_run_id) == ("policy", log.run_id)
        assert model.params["env.name"] == "math"
        pipeline = mlflow.transformers.load_model(f"models:/{model.model_id}")
        assert pipeline.model.num_parameters() > 0
        assert mlflow.models.get_model_info(f"models:/{model.model_id}").signature is not None
    finally:
        mlflow.set_tracking_uri(before)
