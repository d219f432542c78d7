"""Real updates made again: the learner's and the predictor's weights come out as in the run, to the bit."""

from pathlib import Path

import pytest

from actors.replay import replay_run
from actors.trainer import Trainer
from tests.ray.test_end_to_end import Recorder, small_config
from trace_async.run.schedule import Schedule, plan_replay


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(("num_ranks", "trunk"), [(1, "policy"), (2, "own")])
async def test_updates_come_out_as_in_the_run_to_the_bit(
    tiny_policy_path: Path, tmp_path: Path, num_ranks: int, trunk: str
):
    config = small_config(
        tmp_path,
        "num_updates=5",
        "checkpoint.every_updates=2",
        "checkpoint.keep=9",
        "predictor.trees_per_step=4",
        "learner.minibatches=2",
        f"learner.num_ranks={num_ranks}",
        f"predictor.trunk={trunk}",
    )
    recorder = Recorder()
    await Trainer(config, tmp_path, tiny_policy_path, recorder).run()
    schedule = Schedule(tmp_path)
    records = {number: schedule.read(number) for number in schedule.updates()}
    assert list(records) == [1, 2, 3, 4, 5]
    assert len({record.weights for record in records.values()}) == 5
    assert len({record.predictor for record in records.values()}) == 5

    for last, expected in ((2, [1, 2]), (5, [5])):  # from the beginning of the run; from its checkpoint after update 4
        plan = plan_replay(tmp_path, last)
        made = [one async for one in replay_run(config, tmp_path, tiny_policy_path, plan)]
        assert [one.record.update for one in made] == expected
        for one in made:
            assert (one.weights, one.predictor) == (one.record.weights, one.record.predictor)
            as_then = recorder.updates[one.record.update - 1]
            same = {name for name in one.figures if not name.endswith(("seconds", "busy_s", "sync_s", "sync_bytes"))}
            assert {"learner/loss", "learner/grad_norm", "predictor/loss"} <= same
            assert {name: one.figures[name] for name in same} == {name: as_then[name] for name in same}
