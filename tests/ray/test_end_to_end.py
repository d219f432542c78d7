"""The main job on real Ray actors: it learns, goes on after a kill, survives lost actors, keeps its promises."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorHandle
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.calls import ActorLostError
from actors.prompts.group import PromptGroup
from actors.prompts.prompt import remote_prompt_actor
from actors.trainer import Trainer
from envs import load_domain
from tests.support.paths import ROOT
from trace_async.config import Config, load_config
from trace_async.tracking.log import read_metrics
from trace_async.trees.tree import RolloutTree

SMALL = [
    "env.name=tests.support.parity_domain:Parity",
    "sampling.max_turn_tokens=4",
    "sampling.max_context_tokens=64",
    "budget.root_rollouts=32",
    "budget.pool_size=24",
    "budget.warmup_rounds=1",
    "budget.uniform_rollouts=4",
    "predictor.steps_per_update=1",
    "learner.learning_rate=3e-3",
    "learner.step_timeout_s=120",
    "actors.generator_cpus=0",
    "eval.num_tasks=40",
]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "scripts.cli", *arguments]


def run_cli(*arguments: str, limit_s: float = 280) -> str:
    result = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False)
    assert result.returncode == 0, f"{arguments}:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_killed_in_the_middle_goes_on_and_ends_with_a_better_policy(tiny_policy_path: Path, tmp_path: Path):
    settings = [*SMALL, f"policy.path={tiny_policy_path}", f"output_dir={tmp_path}", "name=e2e", "num_updates=30"]
    settings += ["checkpoint.every_updates=5", "learner.num_ranks=2", "actors.num_generators=2"]
    run_dir = tmp_path / "e2e"
    with (tmp_path / "first.log").open("w") as log:
        first = subprocess.Popen(
            command("train", *settings), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        deadline = time.monotonic() + 240
        while not list((run_dir / "checkpoints").glob("0000*")):
            assert first.poll() is None, (tmp_path / "first.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.1)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    output = run_cli("train", "--resume", str(run_dir))
    assert "Held-out success" in output
    assert "mlflow ui --backend-store-uri" in output

    points = read_metrics(run_dir)
    steps = [point.step for point in points if "train/reward" in point.metrics]
    assert steps == list(range(1, 31))
    evaluations = [point.metrics["heldout/success_t1.0"] for point in points if "heldout/success_t1.0" in point.metrics]
    assert evaluations[-1] > evaluations[0] + 0.15
    assert all(point.metrics.get("train/staleness_max", 0) <= 1 for point in points)
    check_ledger(run_dir)

    AutoModelForCausalLM.from_pretrained(run_dir / "policy")
    AutoTokenizer.from_pretrained(run_dir / "policy")
    assert "✓" in run_cli("tree", str(run_dir)) or "reward" in run_cli("tree", str(run_dir))
    assert "heldout/success_t1.0" in run_cli("eval", "--run", str(run_dir), "eval.temperatures=[1.0]")
    run_cli("export", str(run_dir), str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "config.json").is_file()
    check_mlflow(tmp_path, run_dir, steps)


def check_ledger(run_dir: Path) -> None:
    newest = max((run_dir / "checkpoints").glob("0*"))
    record = json.loads((newest / "trainer.json").read_text())
    ledger = {name: sum(counts.values()) for name, counts in record["ledger"].items()}
    assert record["pending"] == []
    assert ledger["allocated"] == ledger["trained"] + ledger["failed"] + ledger["filtered"]
    assert ledger["failed"] == 0


def check_mlflow(output_dir: Path, run_dir: Path, steps: Sequence[int]) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{output_dir / 'mlflow.db'}")
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    assert client.get_run(run_id).info.status == "FINISHED"
    assert [metric.step for metric in client.get_metric_history(run_id, "train/reward")] == list(steps)
    assert client.get_run(run_id).data.params["budget.root_rollouts"] == "32"
    assert client.list_artifacts(run_id, "trees")
    assert "trees.html" in [artifact.path for artifact in client.list_artifacts(run_id)]


class Recorder:
    """What a trainer reports."""

    def __init__(self) -> None:
        self.updates: list[Mapping[str, float]] = []

    def __call__(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        if trees:
            self.updates.append(metrics)


def small_config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [*SMALL, f"output_dir={tmp_path}", "eval.num_tasks=4", *overrides])


@pytest.mark.usefixtures("local_ray")
async def test_staleness_zero_is_synchronous(tiny_policy_path: Path, tmp_path: Path):
    recorder = Recorder()
    config = small_config(tmp_path, "num_updates=3", "actors.max_staleness=0")
    state = await Trainer(config, tmp_path, tiny_policy_path, recorder).run()
    assert [metrics["train/staleness_max"] for metrics in recorder.updates] == [0, 0, 0]
    assert [metrics["budget/roots"] for metrics in recorder.updates] == [32, 32, 32]
    # On-policy, the learner's log-probabilities are the generator's.
    assert all(metrics["learner/mismatch_max"] < 1e-3 for metrics in recorder.updates)
    assert state.ledger.trained == {"root": 96, "continuation": 192}


@pytest.mark.usefixtures("local_ray")
async def test_lost_generators_and_prompt_actors_are_replaced_and_no_prompt_is_lost(
    tiny_policy_path: Path, tmp_path: Path
):
    recorder = Recorder()
    config = small_config(tmp_path, "num_updates=8", "actors.num_generators=2", "actors.num_prompt_actors=2")
    trainer = Trainer(config, tmp_path, tiny_policy_path, recorder)
    running = asyncio.create_task(trainer.run())
    while len(recorder.updates) < 2 and not running.done():
        await asyncio.sleep(0.05)
    ray.kill(next(iter(trainer.pool.ready.values())))
    ray.kill(trainer.prompts.actors[0])
    state = await running
    assert len(recorder.updates) == 8
    assert trainer.pool.num_lost == 1
    assert sum(state.ledger.failed.values()) == 0
    assert state.ledger.allocated == state.ledger.trained


@pytest.mark.usefixtures("local_ray")
async def test_a_question_to_prompt_actors_that_die_is_asked_anew(tiny_policy_path: Path, tmp_path: Path, monkeypatch):
    config = small_config(tmp_path, "actors.num_prompt_actors=2", "actors.max_rollout_retries=2")
    group = PromptGroup(config, tiny_policy_path, None)
    group.start()
    tasks = load_domain(config.env).tasks("train")[:5]
    wanted = await group.prompt_queries(tasks)
    num_dying = 0  # of the actors that are made next, as on a node that is about to be lost

    def make(*arguments: Any) -> ActorHandle:
        nonlocal num_dying
        actor = remote_prompt_actor(*arguments)
        if num_dying:
            num_dying -= 1
            ray.kill(actor)
        return actor

    monkeypatch.setattr("actors.prompts.group.remote_prompt_actor", make)
    for count in (0, 1):
        num_dying = count
        ray.kill(group.actors[1])
        assert await group.prompt_queries(tasks) == wanted
    num_dying = 2
    ray.kill(group.actors[1])
    with pytest.raises(ActorLostError, match="PromptActor 1 is lost"):
        await group.prompt_queries(tasks)
    group.close()


@pytest.mark.usefixtures("local_ray")
async def test_a_predictor_that_finds_no_room_ends_the_run_in_words(tiny_policy_path: Path, tmp_path: Path):
    config = small_config(tmp_path, "predictor.num_threads=500", "engine.start_timeout_s=10", "num_updates=2")
    with pytest.raises(TimeoutError, match=r"predictor did not start within engine\.start_timeout_s=10: `ray status`"):
        await asyncio.wait_for(Trainer(config, tmp_path, tiny_policy_path, Recorder()).run(), 120)


@pytest.mark.usefixtures("local_ray")
async def test_an_engine_that_cannot_start_ends_the_run_with_its_cause(tiny_policy_path: Path, tmp_path: Path):
    config = small_config(tmp_path, "engine.backend=vllm", "engine.python=/nowhere/python", "num_updates=2")
    with pytest.raises(Exception, match="/nowhere/python"):
        await asyncio.wait_for(Trainer(config, tmp_path, tiny_policy_path, Recorder()).run(), 120)
