"""Evaluations beside training, in plain asyncio: which weights they are of, what waits for what, what a loss does."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.prompts.prompt import HeldOut
from actors.trainer import StopRequestedError
from tests.support.fake_parts import FakeParts, FakePrompts
from tests.unit.actors.test_trainer import Run
from tests.unit.run.test_buffer import make_tree
from trace_async.trees.io import read_trees
from trace_async.trees.tree import RolloutTree
from trace_async.types import Task

EVERY_TWO = ["eval.every_updates=2", "eval.temperatures=[1.0]"]


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


class Gated(FakePrompts):
    """An evaluation of a version in `held` does not end until `gate` is set."""

    def __init__(self, *held: int) -> None:
        super().__init__()
        self.held = held
        self.hold = asyncio.Event()
        self.wanted: list[HeldOut] = []

    async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> list[RolloutTree]:
        self.wanted.append(wanted)
        if wanted.policy_version in self.held:
            await self.hold.wait()
        return await super().evaluate(tasks, wanted)


async def test_updates_go_on_while_an_evaluation_of_older_weights_runs_on_a_lent_generator(tmp_path: Path):
    prompts = Gated(2)
    parts = FakeParts(prompts=prompts, num_generators=3)
    run = Run(tmp_path, parts, overrides=[*EVERY_TWO, "actors.prompts_per_actor=30"])
    training = asyncio.create_task(run.trainer.run())
    await until(lambda: run.updates == [1, 2, 3, 4])
    assert set(parts.pool.lent) == {"generator-2"}
    assert set(parts.pool.ready) == {"generator-0", "generator-1"}
    for _ in range(50):
        await asyncio.sleep(0)
    assert run.updates == [1, 2, 3, 4]  # the next evaluation waits for this one, and updates wait for it
    prompts.hold.set()
    await training
    assert run.evaluations == [0, 2, 4, 6]  # in the order of reporting, each under the update that it is of
    assert [wanted.policy_version for wanted in prompts.wanted] == [0, 2, 4, 6]
    # A third of the places for the evaluations beside training, all of them for the first and the last.
    assert [wanted.tasks_at_once for wanted in prompts.wanted] == [30, 10, 10, 30]
    assert parts.pool.lent == {}
    points = [(step, metrics) for step, metrics in run.points if "heldout/success_t1.0" in metrics]
    totals = {step: metrics["tokens/generated_total"] for step, metrics in run.points if "train/reward" in metrics}
    assert totals[2] <= points[1][1]["tokens/generated_total"] <= totals[3]  # as it was when the evaluation began


async def test_with_one_generator_training_waits_for_an_evaluation(tmp_path: Path):
    prompts = Gated(2)
    run = Run(tmp_path, FakeParts(prompts=prompts), overrides=EVERY_TWO)
    training = asyncio.create_task(run.trainer.run())
    await until(lambda: len(prompts.wanted) == 2)
    for _ in range(50):
        await asyncio.sleep(0)
    assert run.updates == [1, 2]
    prompts.hold.set()
    await training
    assert run.evaluations == [0, 2, 4, 6]


async def test_where_no_generator_may_be_lent_training_waits_too(tmp_path: Path):
    prompts = Gated()
    parts = FakeParts(prompts=prompts, num_generators=4)
    await Run(tmp_path, parts, overrides=[*EVERY_TWO, "eval.num_generators=0"]).trainer.run()
    assert {wanted.tasks_at_once for wanted in prompts.wanted} == {256}


async def test_an_evaluation_whose_generator_is_lost_is_given_up_and_another_one_begins(tmp_path: Path):
    prompts = Gated(2)
    parts = FakeParts(prompts=prompts, num_generators=2)
    run = Run(tmp_path, parts, overrides=["eval.every_updates=2", "eval.temperatures=[1.0]", "num_updates=8"])
    training = asyncio.create_task(run.trainer.run())
    await until(lambda: len(prompts.wanted) == 2)
    parts.pool.lent = {}
    parts.pool.loan_lost.set()
    await training
    assert run.updates == [1, 2, 3, 4, 5, 6, 7, 8]
    assert 2 not in run.evaluations
    assert run.evaluations[0] == 0
    assert run.evaluations[-1] == 8
    assert run.evaluations[1] in (3, 4)  # the next boundary after the loss was seen


async def test_rollouts_that_other_weights_wrote_count_as_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    class OneIsNewer(FakePrompts):
        async def evaluate(self, tasks: Sequence[Task], wanted: HeldOut) -> list[RolloutTree]:
            newer = make_tree(tasks[0].id, version=wanted.policy_version + 1, num_roots=1)
            return [newer, *await super().evaluate(tasks[1:], wanted)]

    parts = FakeParts(prompts=OneIsNewer(), num_generators=2)
    run = Run(tmp_path, parts, overrides=["eval.num_tasks=20", "eval.temperatures=[1.0]", "num_updates=1"])
    await run.trainer.run()
    (first, figures), *_ = run.points
    assert first == 0
    assert figures["heldout/num_tasks_t1.0"] == 19
    assert figures["heldout/lost_tasks_t1.0"] == 1
    assert "1 of 20 rollouts broke down: {'other_policy_version': 1}" in caplog.text


async def test_every_rollout_is_kept_and_greedy_ones_are_played_once(tmp_path: Path):
    overrides = ["eval.samples_per_task=3", "num_updates=1"]
    run = Run(tmp_path, FakeParts(), overrides=overrides)
    await run.trainer.run()
    kept = {path.name: list(read_trees(path)) for path in sorted((tmp_path / "trees").iterdir())}
    assert {name: [len(tree.rollouts) for tree in trees] for name, trees in kept.items()} == {
        "heldout_000000_t0.0.jsonl": [1] * 4,
        "heldout_000000_t1.0.jsonl": [3] * 4,
        "heldout_000001_t0.0.jsonl": [1] * 4,
        "heldout_000001_t1.0.jsonl": [3] * 4,
    }
    assert {tree.policy_version_started for tree in kept["heldout_000001_t1.0.jsonl"]} == {1}


async def test_a_run_that_is_stopped_during_an_evaluation_beside_it_evaluates_after_the_resume(tmp_path: Path):
    prompts = Gated(2)
    run = Run(tmp_path, FakeParts(prompts=prompts, num_generators=2), overrides=EVERY_TWO)
    training = asyncio.create_task(run.trainer.run())
    await until(lambda: run.updates == [1, 2, 3, 4])
    run.trainer.stop()
    with pytest.raises(StopRequestedError, match="stopped on request") as stopped:
        await training
    again = Run(tmp_path, FakeParts(num_generators=2), overrides=EVERY_TWO)
    await again.trainer.run(stopped.value.checkpoint)
    assert again.evaluations == [4, 6]


async def test_further_sets_are_played_with_each_evaluation_under_names_of_their_own(tmp_path: Path):
    sets = "eval.sets={numbers: {name: envs.example:GuessNumber, num_tasks: 3}, more: {num_tasks: 2}}"
    prompts = Gated()
    run = Run(tmp_path, FakeParts(prompts=prompts), overrides=[sets, "eval.temperatures=[0.0]", "eval.num_tasks=5"])
    await run.trainer.run()
    assert [wanted.set_name for wanted in prompts.wanted] == ["", "numbers", "more"] * 2  # at the start and at the end
    step, figures = run.points[0]
    assert step == 0
    assert figures["heldout/num_tasks_t0.0"] == 5
    assert figures["eval/numbers/num_tasks_t0.0"] == 3
    assert figures["eval/more/num_tasks_t0.0"] == 2
    assert 0 <= figures["eval/numbers/success_t0.0"] <= 1
    assert len([*read_trees(tmp_path / "trees" / "heldout_000000_t0.0_numbers.jsonl")]) == 3
