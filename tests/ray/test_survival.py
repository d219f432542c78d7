"""Processes of a run are killed, and it goes on: each kind at a moment when it is needed."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import psutil
import pytest
from ray.actor import ActorHandle

from actors.evaluation import evaluate_policy
from actors.trainer import Trainer
from scripts.bench.chaos.processes import role_of
from tests.ray.test_end_to_end import SMALL, command
from tests.support.paths import ROOT
from trace_async.config import Config, load_config
from trace_async.run.checkpoint import latest_checkpoint
from trace_async.run.state import load_trainer
from trace_async.tracking.log import read_metrics
from trace_async.tracking.mlflow_tracker import run_status
from trace_async.trees.tree import RolloutTree


def small_config(tmp_path: Path, *overrides: str) -> Config:
    return load_config(None, [*SMALL, f"output_dir={tmp_path}", "eval.num_tasks=20", *overrides])


async def kill(actor: ActorHandle) -> None:
    """SIGKILL, as the kernel does it when memory runs out: Ray hears of it afterwards."""
    os.kill(await actor.__ray_call__.remote(lambda _: os.getpid()), signal.SIGKILL)


class Recorder:
    """Does `at[update]` once, when the figures of that update arrive."""

    def __init__(self, at: Mapping[int, Callable[[], ActorHandle]]) -> None:
        self.at = dict(at)
        self.updates: list[int] = []
        self.evaluations: list[int] = []
        self.killing: list[asyncio.Task[None]] = []

    def __call__(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        (self.updates if trees else self.evaluations).append(step)
        if trees and step in self.at:
            self.killing.append(asyncio.create_task(kill(self.at.pop(step)())))


@pytest.mark.usefixtures("local_ray")
async def test_predictor_learner_rank_and_generator_are_killed_and_replaced_inside_the_run(
    tiny_policy_path: Path, tmp_path: Path
):
    rollbacks: list[int] = []
    config = small_config(tmp_path, "num_updates=8", "checkpoint.every_updates=2")
    recorder = Recorder({})
    trainer = Trainer(
        config, tmp_path, tiny_policy_path, recorder, on_rollback=lambda step, error: rollbacks.append(step)
    )
    recorder.at = {
        1: lambda: next(iter(trainer.pool.ready.values())),
        3: lambda: trainer.parts.predictor.actor,
        5: lambda: trainer.parts.learner._ranks[0],
    }
    state = await trainer.run()
    assert not recorder.at
    assert len(rollbacks) == 1
    (back,) = rollbacks
    assert back in (4, 6)  # Ray may hear of the death during update 6 or only after its checkpoint
    before, after = recorder.updates[: back - 8], recorder.updates[back - 8 :]
    assert before == list(range(1, len(before) + 1))
    assert after == list(range(back + 1, 9))
    assert recorder.evaluations == [0, 8]
    assert state.num_updates == 8
    state.ledger.check(waiting=0, in_flight_roots=0)


PATIENT = "learner.step_timeout_s=900"
"""On a busy machine a rank that comes back takes minutes to start."""


class Killer:
    """Kills a process of one role in the midst of each of the phases, in this order, and waits for what comes of it.

    The process is stopped when the phase begins and killed a moment later, so that it dies with the phase's call in its
    hands. The next comes after a whole update without a kill, or once the run went back.
    """

    def __init__(self, role: str, phases: Sequence[str]) -> None:
        self.role = role
        self.left = list(phases)
        self.armed = False
        self.rollbacks: list[int] = []
        self._updates = 0
        self._killed_during = 0

    def on_metrics(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        if trees:
            self._updates = step
            self.armed = step != self._killed_during

    def on_rollback(self, step: int, error: BaseException) -> None:
        self.rollbacks.append(step)
        self._killed_during = 0

    def on_phase(self, names: Collection[str]) -> None:
        if not self.armed or not self.left or self.left[0] not in names:
            return
        (victim, *_) = [p for p in psutil.Process().children(recursive=True) if role_of(p) == self.role]
        self.armed, self._killed_during = False, self._updates + 1
        self.left.pop(0)
        victim.suspend()
        asyncio.get_running_loop().call_later(0.5, victim.kill)


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("role", ["learner", "generator", "prompts", "predictor"])
async def test_each_kind_of_process_is_killed_in_each_phase_and_the_run_ends_whole(
    role: str, tiny_policy_path: Path, tmp_path: Path
):
    phases = ["stage1", "wait_for_trees", "update", "predictor", "gather", "sync", "checkpoint", "eval", "export"]
    config = small_config(tmp_path, "num_updates=24", "checkpoint.every_updates=1", "eval.every_updates=4", PATIENT)
    killer = Killer(role, phases)
    trainer = Trainer(
        config,
        tmp_path,
        tiny_policy_path,
        killer.on_metrics,
        on_rollback=killer.on_rollback,
        on_phase=killer.on_phase,
    )
    state = await trainer.run()
    assert killer.left == []
    assert state.num_updates == 24
    state.ledger.check(waiting=0, in_flight_roots=0)
    assert (tmp_path / "policy" / "model.safetensors").is_file()
    # Only a rank's loss takes the run back: nobody but it holds the optimizer's state.
    assert len(killer.rollbacks) == (len(phases) if role == "learner" else 0)


@pytest.mark.usefixtures("local_ray")
async def test_a_generator_killed_in_an_evaluation_is_replaced_and_the_evaluation_is_whole(
    tiny_policy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`trace-async eval` has no trainer: the pool's own watch replaces what dies."""
    from actors import evaluation

    pools = []

    class Pool(evaluation.GeneratorPool):
        async def start(self) -> None:
            await super().start()
            pools.append(self)
            (handle,) = self.ready.values()
            await kill(handle)

    monkeypatch.setattr(evaluation, "GeneratorPool", Pool)
    config = small_config(tmp_path, "eval.temperatures=[1.0]")
    metrics = await evaluate_policy(config, tiny_policy_path, tmp_path)
    assert metrics["heldout/num_tasks_t1.0"] == 20
    assert pools[0].num_lost == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_that_is_terminated_saves_says_how_to_go_on_and_is_killed_in_mlflow(
    tiny_policy_path: Path, tmp_path: Path
):
    settings = [*SMALL, f"policy.path={tiny_policy_path}", f"output_dir={tmp_path}", "name=spot", "num_updates=500"]
    run_dir = tmp_path / "spot"
    process = subprocess.Popen(
        command("train", *settings, "checkpoint.every_updates=0"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not any("train/reward" in point.metrics for point in read_metrics(run_dir)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    checkpoint = latest_checkpoint(run_dir / "checkpoints")
    assert checkpoint is not None, output
    assert f"what it has is saved as {checkpoint}. Go on with: trace-async train --resume {run_dir}" in output
    assert load_trainer(checkpoint).state.num_updates >= 1
    assert mlflow_status(run_dir) == "KILLED"

    # A kill without a word: the next command says so and ends the run in MLflow.
    again = subprocess.Popen(
        command("train", "--resume", str(run_dir)), cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True
    )
    while mlflow_status(run_dir) != "RUNNING":
        assert again.poll() is None
        time.sleep(0.5)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    other = subprocess.run(
        command("train", *settings, "name=other", "learner.learning_rate=1e-4", "num_updates=1", "eval.num_tasks=4"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert other.returncode == 0, other.stderr
    assert f"process {again.pid}, the last to work on {run_dir}, ended without a word" in other.stderr
    assert mlflow_status(run_dir) == "FAILED"


def mlflow_status(run_dir: Path) -> str | None:
    return run_status(load_config(run_dir / "config.yaml"), run_dir)
