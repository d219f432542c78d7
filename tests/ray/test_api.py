"""The Python API with real actors: a run step by step, its checkpoint, its scale; and a sweep by Ray Tune."""

from pathlib import Path

import pytest

from scripts.api.algorithm import AlgorithmStoppedError, TraceAlgorithm
from trace_async import TraceConfig
from trace_async.config import ConfigError


def small(tmp_path: Path, tiny_policy_path: Path) -> TraceConfig:
    return (
        TraceConfig()
        .environment("tests.support.parity_domain:Parity")
        .policy(tiny_policy_path, max_turn_tokens=8)
        .allocation(root_rollouts=16, pool_size=8, stage1="uniform", stage2="none", explore_share=0.0)
        .training(num_updates=3, output_dir=str(tmp_path / "runs"), name="api")
        .evaluation(num_tasks=4, temperatures=[1.0])
    )


@pytest.mark.timeout(300)
def test_a_run_goes_on_as_it_is_asked_and_from_its_checkpoint(tmp_path: Path, tiny_policy_path: Path):
    updates, trees, evaluations = [], [], []
    config = small(tmp_path, tiny_policy_path).callbacks(
        on_update=updates.append, on_tree=trees.append, on_evaluate=evaluations.append
    )
    with config.build() as algo:
        before = algo.evaluate()
        assert "heldout/success_t1.0" in before
        first = algo.train()
        assert (first.update, first.done) == (1, False)
        assert {"train/reward", "learner/loss"} <= first.metrics.keys()
        algo.scale(2)
        second = algo.train()
        assert second.update == 2
        checkpoint = algo.save(tmp_path / "kept")
        with pytest.raises(ValueError, match="empty folder"):
            algo.save(tmp_path / "kept")
    assert [result.update for result in updates] == [1, 2]
    assert trees
    assert evaluations == [before]
    with pytest.raises(AlgorithmStoppedError, match="stopped"):
        algo.train()

    with TraceAlgorithm.from_checkpoint(checkpoint) as again:
        assert again.run_dir != algo.run_dir
        third = again.train()
        assert (third.update, third.done) == (3, True)
        assert third.generated_tokens >= second.generated_tokens  # its trees may have waited in the checkpoint
        assert third.policy_version >= second.policy_version
        with pytest.raises(AlgorithmStoppedError, match="num_updates"):
            again.train()
        assert "heldout/success_t1.0" in again.evaluate()  # it is alive until it is stopped
        assert (again.export(tmp_path / "policy") / "config.json").is_file()
    with pytest.raises(ConfigError, match="no checkpoint"):
        TraceAlgorithm.from_checkpoint(tmp_path / "nowhere")


@pytest.mark.timeout(120)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, tiny_policy_path: Path):
    with pytest.raises(ConfigError, match=r"env\.name"):
        small(tmp_path, tiny_policy_path).environment("no_such").build()


@pytest.mark.usefixtures("local_ray")
@pytest.mark.timeout(300)
def test_a_sweep_by_ray_tune_runs_two_trials_at_a_time(tmp_path: Path, tiny_policy_path: Path):
    from ray import tune

    from scripts.api.tune import trainable_of

    config = small(tmp_path, tiny_policy_path).training(num_updates=2)
    results = tune.Tuner(
        trainable_of(config),
        param_space={"learner.learning_rate": tune.grid_search([1e-4, 1e-3])},
        tune_config=tune.TuneConfig(max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "tune"), verbose=0),
    ).fit()
    assert not results.errors
    assert sorted(result.config["learner.learning_rate"] for result in results) == [1e-4, 1e-3]
    assert all(result.metrics["training_iteration"] == 2 for result in results)
    assert all("train/reward" in result.metrics for result in results)
