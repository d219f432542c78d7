"""One run made of parts that docs/own shows: allocation rules, advantage and engine, named as a user names his own."""

from pathlib import Path

import pytest

from tests.ray.test_end_to_end import SMALL, run_cli
from trace_async.tracking.log import read_metrics
from trace_async.trees.io import read_trees, tree_files


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_rules_and_an_engine_of_ones_own_train(tiny_policy_path: Path, tmp_path: Path):
    settings = [
        *[setting for setting in SMALL if not setting.startswith(("budget.warmup", "budget.uniform"))],
        f"policy.path={tiny_policy_path}",
        f"output_dir={tmp_path}",
        "name=own",
        "num_updates=2",
        "eval.num_tasks=8",
        "budget.stage1=docs.own.allocation:Band",
        "budget.stage2=docs.own.allocation:LastTurnsOfFailures",
        "loss.advantage=docs.own.advantage:LeaveOneOut",
        "engine.backend=docs.own.engine:TransformersEngine",
    ]
    assert "Held-out success" in run_cli("train", *settings)
    run_dir = tmp_path / "own"
    points = [point for point in read_metrics(run_dir) if "train/reward" in point.metrics]
    assert [point.step for point in points] == [1, 2]
    assert all(point.metrics["learner/grad_norm"] > 0 for point in points)
    trees = [tree for path in tree_files(run_dir) if "heldout" not in path.name for tree in read_trees(path)]
    assert {tree.num_roots_allocated for tree in trees} == {4}  # as Band plans
    continued = [(tree, rollout) for tree in trees for rollout in tree.rollouts if rollout.kind == "continuation"]
    assert continued
    for tree, rollout in continued:  # from failures alone, as LastTurnsOfFailures plans
        assert tree.rollouts[tree.nodes[rollout.anchor].rollout].reward == 0
