"""A run goes on, evaluates, saves and resumes while its environment misbehaves in every way at once."""

from pathlib import Path

import pytest

from tests.ray.test_end_to_end import run_cli
from trace_async.run.checkpoint import latest_checkpoint
from trace_async.run.state import load_trainer
from trace_async.tracking.log import read_metrics
from trace_async.trees.io import read_trees, tree_files

RAISES = ("make_raises", "init_raises", "step_raises", "fork_raises", "close_raises", "step_exits", "step_panics")
HANGS = ("step_hangs", "init_hangs")
ODD = ("reward_true", "reward_nan", "metric_true", "metric_none", "content_surrogate", "id_integer", "data_numpy")
MODES = (*RAISES, *HANGS, *ODD, "prompt_changes", "prompt_long")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_survives_an_environment_that_does_everything_wrong_and_can_be_resumed(
    tiny_policy_path: Path, tmp_path: Path
) -> None:
    settings = [
        "env.name=tests.support.misbehaving:Misbehaving",
        f"env.args={{mode: {'+'.join(MODES)}, every: 40}}",
        "env.step_timeout_s=0.5",
        "env.init_timeout_s=0.5",
        f"policy.path={tiny_policy_path}",
        f"output_dir={tmp_path}",
        "engine.backend=fake",
        "sampling.max_turn_tokens=4",
        "budget={root_rollouts: 16, pool_size: 8, warmup_rounds: 0, continuations_per_root: 1}",
        "predictor.steps_per_update=1",
        "actors.generator_cpus=0",
        "eval.num_tasks=5",
        "checkpoint.every_updates=2",
        "name=odd",
    ]
    run_cli("train", *settings, "num_updates=3")
    run_dir = tmp_path / "odd"
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None
    saved = load_trainer(checkpoint)
    assert saved.state.ledger.allocated
    saved.check_ledger()
    points = read_metrics(run_dir)
    assert [point.step for point in points if "train/reward" in point.metrics] == [1, 2, 3]
    faults = {name for point in points for name in point.metrics if name.startswith("faults/")}
    assert len(faults) >= 3
    assert (run_dir / "logs" / "trainer.log").read_text().count("environment misbehaving, task ") >= 3
    run_cli("train", "--resume", str(run_dir), "num_updates=4")
    trees = [tree for path in tree_files(run_dir) for tree in read_trees(path)]
    assert {type(tree.task.id) for tree in trees} == {str}
    assert {rollout.reward for tree in trees for rollout in tree.rollouts} <= {0.0, 1.0}
    assert "task" in run_cli("tree", str(run_dir), "--list")
