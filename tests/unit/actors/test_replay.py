"""Updates made again from a run's schedule, with plain asyncio objects in the models' places."""

import asyncio
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from actors.replay import Replayed, replay
from tests.support.fake_parts import FakeLearner, FakeParts, FakePredictor, FakePrompts
from tests.unit.actors.test_trainer import Run
from tests.unit.run.test_buffer import make_tree
from trace_async.config import ConfigError
from trace_async.run.schedule import Plan, Schedule, UpdateRecord, plan_replay
from trace_async.types import LossKind


async def made_again(run_dir: Path, update: int) -> list[Replayed]:
    plan = plan_replay(run_dir, update)
    return [made async for made in replay(plan, Schedule(run_dir), FakeLearner(), FakePredictor())]


async def trained(run_dir: Path, *overrides: str, parts: FakeParts | None = None) -> FakeParts:
    parts = parts or FakeParts()
    await Run(run_dir, parts, overrides=overrides).trainer.run()
    return parts


async def test_every_update_comes_out_as_in_the_run_from_the_checkpoint_before_it(tmp_path: Path):
    parts = await trained(tmp_path, "checkpoint.every_updates=2", "checkpoint.keep=9")
    assert plan_replay(tmp_path, 2) == Plan(None, (1, 2))
    assert plan_replay(tmp_path, 5) == Plan(tmp_path / "checkpoints" / "000004", (5,))
    for update in range(1, 7):
        made = await made_again(tmp_path, update)
        assert made[-1].record.update == update
        assert [one.otherwise for one in made] == [[]] * len(made)
    assert (made[-1].weights, made[-1].predictor) == (parts.learner.learnt, parts.predictor.learnt)


async def test_an_update_that_parts_is_named_and_so_are_those_after_it(tmp_path: Path):
    await trained(tmp_path, "checkpoint.every_updates=0")
    lines = (tmp_path / "schedule" / "000003.trees.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 1
    (tmp_path / "schedule" / "000003.trees.jsonl").write_text("".join(reversed(lines)))
    assert [one.otherwise for one in await made_again(tmp_path, 5)] == [[], []] + [["policy", "predictor"]] * 3


async def test_the_record_says_what_arrived_when_and_what_became_of_it(tmp_path: Path):
    lost = FakePrompts(lose=lambda ticket: LossKind.TREE_TIMEOUT if ticket == 1 else None)
    await trained(tmp_path, "checkpoint.every_updates=0", parts=FakeParts(prompts=lost))
    schedule = Schedule(tmp_path)
    records = [schedule.read(update) for update in schedule.updates()]
    assert [(record.update, record.policy_version, record.seed) for record in records] == [
        (number, number - 1, 0) for number in range(1, 7)
    ]
    arrivals = [arrival for record in records for arrival in record.arrivals]
    assert sorted(arrival.ticket for arrival in arrivals) == list(range(len(arrivals)))
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert {a.ticket: a.fate for a in arrivals if a.fate != "kept"} == {1: "tree_timeout"}
    # All that arrived and was kept is learnt, each once.
    learnt = [tree.task.id for update in schedule.updates() for tree in schedule.read_trees(update)]
    assert sorted(learnt) == sorted(a.task_id for a in arrivals if a.fate == "kept")


async def test_updates_before_the_oldest_checkpoint_are_not_kept(tmp_path: Path):
    await trained(tmp_path, "checkpoint.every_updates=2", "checkpoint.keep=2")
    assert Schedule(tmp_path).updates() == [5, 6]  # the checkpoints are 4 and 6
    with pytest.raises(ConfigError, match=r"--update 3: .* holds no record of it; 5 to 6 are there"):
        plan_replay(tmp_path, 3)


async def test_a_gap_is_named_with_what_can_be_made_again(tmp_path: Path):
    await trained(tmp_path, "checkpoint.every_updates=3", "checkpoint.keep=9")
    (tmp_path / "schedule" / "000002.json").unlink()
    with pytest.raises(ConfigError, match=r"that of update 2 is not kept .* after a checkpoint: 4"):
        plan_replay(tmp_path, 3)
    assert plan_replay(tmp_path, 5).updates == (4, 5)


async def test_a_resumed_run_forgets_what_comes_again(tmp_path: Path):
    """The run was killed after update 6 with its newest checkpoint after 2; what comes again comes in another order."""
    await trained(tmp_path, "checkpoint.every_updates=2", "checkpoint.keep=9")
    for number in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"{number:06d}")
    before = Schedule(tmp_path).read_trees(5)
    other_order = FakeParts(prompts=FakePrompts(delays=lambda ticket: 1 + ticket % 3), learner=FakeLearner(holds_at=3))
    again = Run(tmp_path, other_order, overrides=["checkpoint.every_updates=0"])
    resumed = asyncio.create_task(again.trainer.run(tmp_path / "checkpoints" / "000002"))
    await other_order.learner.held.wait()
    assert set(Schedule(tmp_path).updates()) <= {1, 2, 3, 4}
    other_order.learner.released.set()
    await resumed
    assert Schedule(tmp_path).read_trees(5) != before
    made = await made_again(tmp_path, 6)
    assert [one.record.update for one in made] == [3, 4, 5, 6]
    assert [one.otherwise for one in made] == [[]] * 4


async def test_a_run_that_does_not_record_keeps_nothing(tmp_path: Path):
    await trained(tmp_path, "tracking.record_schedule=false")
    assert Schedule(tmp_path).updates() == []
    with pytest.raises(ConfigError, match="none is there"):
        plan_replay(tmp_path, 1)


async def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "schedule").write_text("a file in its place")
    parts = await trained(tmp_path)
    assert parts.learner.updates == 6
    assert caplog.text.count("could not be kept for trace-async replay") == 1


async def test_a_tree_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tree = make_tree("a", version=0, num_roots=1)
    node = replace(tree.nodes[-1], value=math.nan)
    record = UpdateRecord(update=1, policy_version=0, seed=0, arrivals=())
    Schedule(tmp_path).begin(record, [replace(tree, nodes=(*tree.nodes[:-1], node))])
    assert "could not be kept for trace-async replay" in caplog.text
    assert Schedule(tmp_path).updates() == []


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "arrivals": [3]}'])
async def test_a_damaged_record_is_named(tmp_path: Path, content: str):
    await trained(tmp_path, "checkpoint.every_updates=0")
    (tmp_path / "schedule" / "000002.json").write_text(content)
    with pytest.raises(ConfigError, match=r"000002\.json: no record of an update"):
        await made_again(tmp_path, 2)
