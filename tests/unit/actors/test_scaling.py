"""Scaling with a fake pool: the rule's word, an owner's order, and what Ray has no room for."""

import asyncio
from pathlib import Path

import pytest

from actors.generators import scaling
from actors.generators.scaling import Scaling
from tests.support.fake_parts import FakePool
from trace_async.config import Config, ConfigError, load_config
from trace_async.run.scaling import kept_sizes, order

WAITING = {"idle/learner_share": 0.6, "idle/generator_share": 0.0}


def config(*overrides: str) -> Config:
    return load_config(None, ["actors.num_generators=1", "actors.max_generators=4", *overrides])


async def test_a_waiting_learner_gets_more_generators_with_the_reason_kept(tmp_path: Path):
    pool = FakePool()
    told: list[tuple[int, str]] = []
    scaled = Scaling(
        config(),
        pool,
        tmp_path,
        room=lambda _: 10,
        on_change=lambda size: told.append((size.num_generators, size.reason)),
    )
    for update in range(1, 10):
        await scaled.after_update(update, WAITING)
    assert told == [(size.num_generators, size.reason) for size in kept_sizes(tmp_path)]
    assert pool.target == 3  # 1 → 2 after update 4, → 3 after update 8
    assert [(size.update, size.num_generators) for size in kept_sizes(tmp_path)] == [(4, 2), (8, 3)]
    assert "learner waited 60%" in kept_sizes(tmp_path)[0].reason


async def test_what_ray_has_no_room_for_is_asked_of_its_autoscaler_on_a_cluster(tmp_path: Path):
    asked: list[int] = []
    pool = FakePool()
    scaled = Scaling(
        config("actors.ray_address=auto"),
        pool,
        tmp_path,
        room=lambda _: 0,
        ask_for_nodes=lambda _, number: asked.append(number),
    )
    for update in range(1, 5):
        await scaled.after_update(update, WAITING)
    assert (pool.target, asked) == (1, [2])


async def test_an_order_is_carried_out_and_switches_the_rule_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling, "POLL_S", 0.01)
    pool = FakePool()
    scaled = Scaling(config(), pool, tmp_path, room=lambda _: 10)
    watching = asyncio.create_task(scaled.watch())
    order(tmp_path, 3)
    async with asyncio.timeout(60):
        while pool.target != 3:
            await asyncio.sleep(0.01)
    for update in range(1, 10):
        await scaled.after_update(update, {"idle/learner_share": 0.0, "idle/generator_share": 0.9})
    assert pool.target == 3
    assert [size.reason for size in kept_sizes(tmp_path)] == ["asked for"]
    watching.cancel()


async def test_an_order_is_carried_out_further_when_nodes_join_and_the_wish_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(scaling, "POLL_S", 0.01)
    pool, asked, places = FakePool(), [], 2

    async def until_target(number: int) -> None:
        async with asyncio.timeout(60):
            while pool.target != number:
                await asyncio.sleep(0.01)

    scaled = Scaling(
        config("actors.ray_address=auto"),
        pool,
        tmp_path,
        room=lambda _: places - pool.target,
        ask_for_nodes=lambda _, number: asked.append(number),
    )
    watching = asyncio.create_task(scaled.watch())
    order(tmp_path, 4)
    await until_target(2)
    await asyncio.sleep(0.1)
    assert pool.target == 2
    assert asked == [4]
    places = 4  # two nodes have joined
    await until_target(4)
    assert [size.num_generators for size in kept_sizes(tmp_path)] == [2, 4]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert asked == [4, 0]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["actors.min_generators=3"], "actors.min_generators=3: must not exceed actors.num_generators=1"),
        (["actors.num_generators=5"], "actors.max_generators=4: 0 .* or at least actors.num_generators=5"),
    ],
)
def test_bounds_that_contradict_each_other_are_refused(overrides: list[str], words: str):
    with pytest.raises(ConfigError, match=words):
        config(*overrides)
