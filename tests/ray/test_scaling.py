"""A run under load is scaled from 1 to 3 generators and back while it trains; nothing is lost."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from actors.generators import scaling
from actors.trainer import Trainer
from tests.ray.test_survival import small_config
from trace_async.run.scaling import kept_sizes, order
from trace_async.trees.tree import RolloutTree


@pytest.mark.usefixtures("local_ray")
async def test_generators_come_and_go_as_they_are_asked_for_and_no_rollout_is_lost(
    tiny_policy_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "POLL_S", 0.05)
    config = small_config(tmp_path, "num_updates=300", "actors.max_generators=3", "eval.num_tasks=5")
    updates: list[int] = []

    def on_metrics(step: int, metrics: Mapping[str, float], trees: Sequence[RolloutTree]) -> None:
        if trees:
            updates.append(step)

    trainer = Trainer(config, tmp_path, tiny_policy_path, on_metrics)
    training = asyncio.create_task(trainer.run())

    async def until_ready(number: int) -> None:
        while len(trainer.pool.ready) != number or len(updates) < 1:
            assert not training.done(), training.exception()
            await asyncio.sleep(0.05)

    async with asyncio.timeout(240):
        await until_ready(1)
        order(tmp_path, 3)
        await until_ready(3)
        versions = {stats.health.policy_version for stats in (await trainer.pool.stats()).values()}
        assert all(trainer.state.policy_version - version <= 1 for version in versions)  # an update may be under way
        seen = len(updates)
        order(tmp_path, 1)
        await until_ready(1)
        while len(updates) < seen + 3:
            assert not training.done(), training.exception()
            await asyncio.sleep(0.05)
    assert [size.num_generators for size in kept_sizes(tmp_path)] == [3, 1]
    assert sum(trainer.state.ledger.failed.values()) == 0
    assert trainer.pool.num_lost == 0
    training.cancel()
    with pytest.raises(asyncio.CancelledError):
        await training
