"""Generators come and go: real Ray actors around the fake engine."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.generators.pool import GeneratorPool
from actors.generators.router import Generators
from actors.learner import DeltaRef
from trace_async.config import Config, load_config
from trace_async.engine import EngineError
from trace_async.types import SamplingParams
from trace_async.weight_delta import DeltaEncoder
from trace_async.weights import WeightBucket, WeightManifest, host_bucket, pack_weights

pytestmark = pytest.mark.usefixtures("local_ray")
PARAMS = SamplingParams(max_new_tokens=3)


class Listener:
    """What the prompts hear from the pool."""

    def __init__(self) -> None:
        self.announced: list[set[str]] = []

    async def __call__(self, generators: Generators) -> None:
        self.announced.append(set(generators.ready))
        self.for_evaluation = set(generators.for_evaluation)


def fake_config(num_generators: int) -> Config:
    return load_config(
        None, ["engine.backend=fake", f"actors.num_generators={num_generators}", "actors.generator_cpus=0"]
    )


def heard(pool: GeneratorPool) -> Listener:
    """What the pool has announced to its listener."""
    assert isinstance(pool.announce, Listener)
    return pool.announce


@pytest.fixture
async def pool(tiny_policy_path: Path, tmp_path: Path) -> AsyncIterator[GeneratorPool]:
    made = GeneratorPool(fake_config(2), tiny_policy_path, tmp_path, Listener())
    await made.start()
    yield made
    await made.close()


def weights(version: int, **differing: Any) -> tuple[WeightBucket, WeightBucket, WeightManifest]:
    """Two buckets and their manifest, in which fields may be `differing`."""
    state = {"w": torch.full((4,), float(version)), "v": torch.zeros(64)}
    manifest = replace(pack_weights(state, version).manifest, **differing)
    return host_bucket({"w": state["w"]}), host_bucket({"v": state["v"]}), manifest


def in_store(parts: Sequence[object]) -> list[ray.ObjectRef]:
    return [ray.put(part) for part in parts]


async def served_versions(pool: GeneratorPool) -> list[int]:
    return [stats.health.policy_version for stats in (await pool.stats()).values()]


async def until(condition, limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.05)


async def test_all_are_ready_and_answer(pool: GeneratorPool):
    assert heard(pool).announced[-1] == {"generator-0", "generator-1"}
    for handle in pool.ready.values():
        completion = await handle.generate.remote((5, 6), PARAMS)
        assert len(completion.token_ids) == 3


async def test_a_killed_generator_is_replaced_and_synced_before_it_is_announced(pool: GeneratorPool):
    await pool.update_weights(in_store(weights(1)), 1)
    assert await served_versions(pool) == [1, 1]
    watching = asyncio.create_task(pool.watch(every_s=0.1))
    ray.kill(pool.ready["generator-0"])
    await until(lambda: "generator-2" in pool.ready)
    watching.cancel()
    assert {"generator-1"} in heard(pool).announced
    assert heard(pool).announced[-1] == {"generator-1", "generator-2"}
    assert await served_versions(pool) == [1, 1]
    assert pool.num_lost == 1


async def test_a_healthy_generator_is_announced_again_to_routers_that_had_left_it_out(pool: GeneratorPool):
    before = len(heard(pool).announced)
    watching = asyncio.create_task(pool.watch(every_s=0.05))
    await until(lambda: len(heard(pool).announced) > before)
    watching.cancel()
    assert heard(pool).announced[-1] == {"generator-0", "generator-1"}


async def test_a_generator_that_refuses_weights_is_lost_and_the_others_serve_them(pool: GeneratorPool):
    # Only generator-0 has these weights already, so only for it does the next update change nothing.
    await pool.ready["generator-0"].receive_weights.remote(*weights(1))
    await pool.update_weights(in_store(weights(1, policy_version=2)), 2)
    assert pool.num_lost == 1
    await until(lambda: len(pool.ready) == 2)
    assert await served_versions(pool) == [2, 2]


async def test_corrupt_weights_reach_no_prompt(tiny_policy_path: Path, tmp_path: Path):
    pool = GeneratorPool(fake_config(1), tiny_policy_path, tmp_path, Listener())
    await pool.start()
    pool.config = replace(pool.config, engine=replace(pool.config.engine, start_timeout_s=3.0))
    corrupt = weights(1, checksum="0" * 32)
    with pytest.raises(EngineError, match="no generator is left"):
        await pool.update_weights(in_store(corrupt), 1)
    assert heard(pool).announced[-1] == set()
    await pool.close()


async def test_it_grows_and_shrinks_while_it_runs(pool: GeneratorPool):
    await pool.update_weights(in_store(weights(1)), 1)
    await pool.resize(4)
    await until(lambda: len(pool.ready) == 4)
    assert await served_versions(pool) == [1, 1, 1, 1]
    await pool.resize(1)
    assert len(pool.ready) == 1
    assert pool.num_lost == 0
    with pytest.raises(ValueError, match="keep at least one"):
        await pool.resize(0)


async def test_a_lent_generator_keeps_its_weights_until_it_is_taken_back(pool: GeneratorPool):
    await pool.update_weights(in_store(weights(1)), 1)
    assert await pool.lend(5) == 1  # one stays with training
    ((name, lent),) = pool.lent.items()
    assert heard(pool).announced[-1] == {"generator-0", "generator-1"} - {name}
    assert heard(pool).for_evaluation == {name}
    for version in (2, 3):
        await pool.update_weights(in_store(weights(version)), version)
    assert (await lent.stats.remote()).health.policy_version == 1
    assert await served_versions(pool) == [3]
    await pool.take_back()
    assert heard(pool).announced[-1] == heard(pool).for_evaluation == {"generator-0", "generator-1"}
    assert await served_versions(pool) == [3, 3]
    assert pool.num_lost == 0


async def test_a_delta_goes_to_those_that_have_its_base_and_the_whole_to_the_others(
    tiny_policy_path: Path, tmp_path: Path
):
    config = fake_config(2)
    config = replace(config, engine=replace(config.engine, weight_delta=True))
    pool = GeneratorPool(config, tiny_policy_path, tmp_path, Listener())
    await pool.start()
    encoder = DeltaEncoder()

    async def update(version: int, *, spoil_whole: bool = False) -> None:
        *buckets, manifest = weights(version)
        for bucket in buckets:
            encoder.add(bucket)
        delta = encoder.finish(version)
        parts = [WeightBucket(tensors={}) if spoil_whole else bucket for bucket in buckets]
        reference = DeltaRef(delta.base_version, ray.put(delta)) if delta is not None else None
        await pool.update_weights(in_store([*parts, manifest]), version, reference)

    await update(1)
    await pool.lend(1)
    await update(2, spoil_whole=True)  # whoever took the whole would be lost
    assert await served_versions(pool) == [2]
    pool.weights = in_store(weights(2))
    await pool.take_back()  # it has the weights of version 1, to which no delta leads any more
    await update(3, spoil_whole=True)
    assert await served_versions(pool) == [3, 3]
    assert pool.num_lost == 0
    await pool.close()


async def test_a_lent_generator_that_dies_is_replaced_and_the_evaluation_hears_of_it(pool: GeneratorPool):
    await pool.lend(1)
    watching = asyncio.create_task(pool.watch(every_s=0.1))
    ((name, lent),) = pool.lent.items()
    ray.kill(lent)
    await asyncio.wait_for(pool.loan_lost.wait(), 60)
    left = {"generator-0", "generator-1", "generator-2"} - {name}
    await until(lambda: set(pool.ready) == left)
    watching.cancel()
    assert pool.num_lost == 1
    assert heard(pool).for_evaluation == left


async def test_a_generator_that_does_not_start_in_time_is_an_error_in_words(tiny_policy_path: Path, tmp_path: Path):
    config = fake_config(1)
    config = replace(config, engine=replace(config.engine, start_timeout_s=0.01))
    pool = GeneratorPool(config, tiny_policy_path, tmp_path, Listener())
    with pytest.raises(EngineError, match=r"generator-0 did not start within engine.start_timeout_s=0.01"):
        await pool.start()
    await pool.close()
