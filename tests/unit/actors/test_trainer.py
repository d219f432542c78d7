"""The trainer's loop in plain asyncio: order of work, checkpoints, lost ranks, stopping on request."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from actors.calls import ActorLostError
from actors.learner import LearnerRankError
from actors.parts import Parts
from actors.trainer import StopRequestedError, Trainer
from tests.support.fake_parts import FakeLearner, FakeParts, FakePrompts
from trace_async.config import load_config
from trace_async.run.checkpoint import latest_checkpoint
from trace_async.run.rounds import NothingToLearnError
from trace_async.trees.tree import RolloutTree


class Run:
    """A trainer with fake parts; `parts`: of each session, the next is made when the trainer begins one."""

    def __init__(self, run_dir: Path, *parts: FakeParts, overrides: Sequence[str] = ()) -> None:
        self.config = load_config(
            None,
            [
                "env.name=tests.support.parity_domain:Parity",
                "budget.root_rollouts=16",
                "budget.pool_size=8",
                "budget.warmup_rounds=0",
                "num_updates=6",
                "eval.num_tasks=4",
                "checkpoint.every_updates=2",
                *overrides,
            ],
        )
        self.parts = list(parts)
        self.points: list[tuple[int, Mapping[str, float]]] = []
        self.rollbacks: list[int] = []
        left = iter(parts)
        self.trainer = Trainer(
            self.config,
            run_dir,
            Path("policy"),
            self._on_metrics,
            on_rollback=lambda step, error: self.rollbacks.append(step),
            make_parts=lambda *_: cast(Parts, next(left)),
        )

    def _on_metrics(self, step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        self.points.append((step, metrics))

    @property
    def updates(self) -> list[int]:
        return [step for step, metrics in self.points if "train/reward" in metrics]

    @property
    def evaluations(self) -> list[int]:
        return [step for step, metrics in self.points if "heldout/success_t1.0" in metrics]


def saved_updates(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


async def test_a_run_updates_evaluates_saves_once_each_and_closes_its_parts(tmp_path: Path):
    parts = FakeParts()
    run = Run(tmp_path, parts, overrides=["eval.every_updates=3", "checkpoint.keep=9"])
    state = await run.trainer.run()
    assert run.updates == [1, 2, 3, 4, 5, 6]
    assert run.evaluations == [0, 3, 6]
    # The last update is a checkpoint's turn too: it is saved once, and 000004 is not pushed out by a second one.
    assert saved_updates(tmp_path) == ["000002", "000004", "000006"]
    assert parts.pool.versions == [1, 2, 3, 4, 5, 6]
    assert parts.closed
    assert state.ledger.allocated == state.ledger.trained
    assert (tmp_path / "policy").is_dir()


async def test_a_checkpoint_comes_before_the_evaluation_of_the_same_update(tmp_path: Path):
    saved_when_evaluated: list[list[str]] = []

    class Evaluating(FakePrompts):
        async def evaluate(self, *arguments: Any) -> list[RolloutTree]:
            saved_when_evaluated.append(saved_updates(tmp_path))
            return await super().evaluate(*arguments)

    overrides = ["eval.every_updates=2", "checkpoint.keep=9", "eval.temperatures=[1.0]"]
    run = Run(tmp_path, FakeParts(prompts=Evaluating()), overrides=overrides)
    await run.trainer.run()
    assert run.evaluations == [0, 2, 4, 6]
    assert saved_when_evaluated == [
        [],
        ["000002"],
        ["000002", "000004"],
        ["000002", "000004", "000006"],
    ]


async def test_a_learner_rank_that_dies_is_replaced_from_the_last_checkpoint_inside_the_run(tmp_path: Path):
    first, second = FakeParts(learner=FakeLearner(dies_at=[5])), FakeParts()
    run = Run(tmp_path, first, second)
    state = await run.trainer.run()
    assert run.rollbacks == [4]
    assert first.closed
    assert second.learner.loaded is not None
    assert second.pool.versions == [4, 5, 6]  # the checkpoint's weights first
    assert run.updates == [1, 2, 3, 4, 5, 5, 6]  # figures of 5 come again; the tracker drops the first
    assert state.num_updates == 6
    state.ledger.check(waiting=0, in_flight_roots=0)


async def test_updates_that_are_never_finite_end_the_run_with_the_last_good_weights_saved(tmp_path: Path):
    class Broken(FakeLearner):
        async def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
            good = self.updates < 3
            return await super().update(trees, policy_version) | {
                "learner/updated": float(good),
                "learner/skipped_steps": float(not good),
            }

    parts = FakeParts(learner=Broken())
    run = Run(tmp_path, parts, overrides=["num_updates=20", "checkpoint.every_updates=0"])
    with pytest.raises(NothingToLearnError, match="not finite in 5 updates in a row"):
        await run.trainer.run()
    assert run.updates == [1, 2, 3, 4, 5, 6, 7, 8]
    assert parts.pool.versions == [1, 2, 3]  # what was not trained is not sent
    assert saved_updates(tmp_path) == ["000008"]


async def test_a_rank_that_dies_again_before_any_update_ends_the_run_with_its_cause(tmp_path: Path):
    dies = [FakeParts(learner=FakeLearner(dies_at=[4])) for _ in range(3)]
    run = Run(tmp_path, *dies)
    with pytest.raises(LearnerRankError, match="learner rank 1 died during update"):
        await run.trainer.run()
    assert [parts.closed for parts in dies] == [True, True, False]


async def test_a_part_that_is_lost_before_the_first_checkpoint_begins_the_run_anew(tmp_path: Path):
    first, second = FakeParts(learner=FakeLearner(dies_at=[1])), FakeParts()
    run = Run(tmp_path, first, second)
    await run.trainer.run()
    assert run.rollbacks == [-1]
    assert run.updates == [1, 1, 2, 3, 4, 5, 6]
    assert run.evaluations == [0, 0, 6]


async def test_a_part_that_cannot_start_ends_the_run_at_once(tmp_path: Path):
    class NoRoom(FakeParts):
        async def start(self) -> None:
            raise ActorLostError("the predictor is lost: no room")

    with pytest.raises(ActorLostError, match="no room"):
        await Run(tmp_path, NoRoom()).trainer.run()


async def test_a_run_that_is_asked_to_stop_ends_its_update_and_saves(tmp_path: Path):
    parts = FakeParts(learner=FakeLearner(holds_at=3))
    run = Run(tmp_path, parts, overrides=["checkpoint.every_updates=0"])
    running = asyncio.create_task(run.trainer.run())
    await parts.learner.held.wait()
    run.trainer.stop()
    for _ in range(100):
        await asyncio.sleep(0)
    assert not running.done()
    parts.learner.released.set()
    with pytest.raises(StopRequestedError) as stopped:
        await running
    assert run.updates == [1, 2, 3, 4]
    assert saved_updates(tmp_path) == ["000004"]
    assert parts.closed

    again = Run(tmp_path, FakeParts(), overrides=["checkpoint.every_updates=0"])
    state = await again.trainer.run(stopped.value.checkpoint)
    assert again.updates == [5, 6]
    state.ledger.check(waiting=0, in_flight_roots=0)


async def test_a_stop_during_an_evaluation_does_not_wait_for_its_end(tmp_path: Path):
    prompts = FakePrompts()
    prompts.evaluating.clear()
    run = Run(tmp_path, FakeParts(prompts=prompts))
    running = asyncio.create_task(run.trainer.run())
    for _ in range(20):
        await asyncio.sleep(0)
    run.trainer.stop()
    with pytest.raises(StopRequestedError):
        await running
    assert saved_updates(tmp_path) == ["000000"]


async def test_an_update_that_outlasts_the_limit_of_a_stop_is_given_up(tmp_path: Path):
    parts = FakeParts(learner=FakeLearner(holds_at=3))
    run = Run(tmp_path, parts, overrides=["checkpoint.stop_within_s=0.05"])
    running = asyncio.create_task(run.trainer.run())
    await parts.learner.held.wait()
    run.trainer.stop()
    with pytest.raises(StopRequestedError) as stopped:
        await running
    assert stopped.value.checkpoint is not None
    assert stopped.value.checkpoint.name == "000002"
    assert saved_updates(tmp_path) == ["000002"]


async def test_with_a_pace_every_update_waits_to_be_asked_for_and_nothing_is_evaluated(tmp_path: Path):
    class Pace:
        def __init__(self) -> None:
            self.ready = asyncio.Event()
            self.permits = asyncio.Semaphore(0)
            self.waiting = asyncio.Event()

        def started(self) -> None:
            self.ready.set()

        async def before_update(self) -> None:
            self.waiting.set()
            await self.permits.acquire()
            self.waiting.clear()

    pace = Pace()
    run = Run(tmp_path, FakeParts())
    run.trainer.pace = pace
    training = asyncio.create_task(run.trainer.run())
    await pace.ready.wait()
    for made in range(6):
        await pace.waiting.wait()
        assert run.updates == list(range(1, made + 1))
        pace.waiting.clear()
        pace.permits.release()
    await pace.waiting.wait()
    assert run.updates == [1, 2, 3, 4, 5, 6]
    assert run.evaluations == []
    assert not training.done()  # it stays alive for an evaluation or a checkpoint
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training


async def test_a_run_that_went_on_after_its_end_leaves_the_newer_policy(tmp_path: Path):
    await Run(tmp_path, FakeParts(), overrides=["num_updates=2"]).trainer.run()
    assert (tmp_path / "policy" / "updates").read_text() == "2"
    newest = latest_checkpoint(tmp_path / "checkpoints")
    await Run(tmp_path, FakeParts(), overrides=["num_updates=4"]).trainer.run(newest)
    assert (tmp_path / "policy" / "updates").read_text() == "4"
    assert [name for name in os.listdir(tmp_path) if name.startswith("policy")] == ["policy"]
