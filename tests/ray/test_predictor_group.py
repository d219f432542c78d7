"""PredictorGroup on real Ray: processes that are killed come back with what they had, and answer."""

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from actors.predictors.group import PredictorGroup
from tests.unit.predictor.test_policy_trunk import weights_of
from tests.unit.predictor.test_predictor import policy, world  # noqa: F401
from trace_async.config import Config, PredictorConfig
from trace_async.run.checkpoint import CheckpointStore
from trace_async.types import PrefixQuery


async def kill(handle: ray.actor.ActorHandle) -> None:
    pid = await handle.__ray_call__.remote(lambda _actor: os.getpid())
    os.kill(pid, signal.SIGKILL)


@pytest.mark.usefixtures("local_ray")
async def test_the_learning_one_and_a_replica_are_killed_and_answer_as_before(
    policy: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("actors.predictors.group.WATCH_EVERY_S", 0.2)
    config = replace(Config(), predictor=PredictorConfig(trunk="policy", num_layers=1, num_replicas=1))
    group = PredictorGroup.start(config, policy, tmp_path / "checkpoints")
    try:
        await group.ready()
        (bucket,), manifest = weights_of(policy, scale=1.2, version=1)
        assert await group.receive_weights([ray.put(bucket), ray.put(manifest)]) == 1
        await group.train(world(np.random.default_rng(0), 60), 1)
        async with CheckpointStore(tmp_path / "checkpoints", keep=1).saving(1) as folder:
            await group.save(folder / "predictor")
        queries = [PrefixQuery(token_ids=(20 + kind, 9), positions=(2,)) for kind in range(3)]
        ids = ["a", "b", "c"]
        before = await group.estimate(ids, queries)
        assert before.mean[0] > before.mean[1] + 0.2
        for dead in (group.replicas[0], group.actor):
            await kill(dead)
        watch = asyncio.create_task(group.watch())
        after = await asyncio.wait_for(group.estimate(ids, queries), 300)
        watch.cancel()
        assert after.a == pytest.approx(before.a, rel=1e-4)
        assert after.b == pytest.approx(before.b, rel=1e-4)
        assert group.num_caught_up >= 1
    finally:
        group.close()
