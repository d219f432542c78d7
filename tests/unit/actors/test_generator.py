"""One generator's limit on a request."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.generators.generator import GeneratorActor
from trace_async.config import load_config
from trace_async.engine import EngineError, EngineTimeoutError, WeightSyncError
from trace_async.engines.fake import FakeEngine
from trace_async.types import Completion, SamplingParams
from trace_async.weight_delta import DeltaEncoder
from trace_async.weights import WeightUpdate, host_bucket, pack_weights

PARAMS = SamplingParams()
LIMIT_S = 0.3


class SlowUpdates(FakeEngine):
    """Holds its requests while weights arrive, until `arrived` is set."""

    arrived: asyncio.Event

    async def update_weights(self, update: WeightUpdate) -> None:
        self.hold()
        try:
            await self.arrived.wait()
            await super().update_weights(update)
        finally:
            self.release()


@pytest.fixture
def actor(tiny_policy_path: Path, tmp_path: Path) -> GeneratorActor:
    config = load_config(None, ["engine.backend=fake", f"engine.request_timeout_s={LIMIT_S}"])
    made = GeneratorActor(config, str(tiny_policy_path), 0, str(tmp_path))
    engine = SlowUpdates(lambda prompt, sample: [7, 8, 9], token_latency_s=0.01)
    engine.arrived = asyncio.Event()
    made.engine = engine
    return made


def held(actor: GeneratorActor) -> SlowUpdates:
    assert isinstance(actor.engine, SlowUpdates)
    return actor.engine


def weights(version: int) -> WeightUpdate:
    return pack_weights({"w": torch.full((4,), float(version))}, version)


async def test_a_request_held_by_a_weight_update_outlives_the_limit(actor: GeneratorActor):
    in_flight = asyncio.create_task(actor.generate((1,), PARAMS))
    await asyncio.sleep(0)
    update = asyncio.create_task(actor.update_weights(weights(3)))
    await asyncio.sleep(0)
    late = asyncio.create_task(actor.generate((2,), PARAMS))
    await asyncio.sleep(3 * LIMIT_S)
    assert not in_flight.done()
    assert not late.done()
    held(actor).arrived.set()
    assert await update == 3
    assert (await in_flight).token_ids == (await late).token_ids == (7, 8, 9)


async def test_a_hung_engine_is_found_within_its_limit(actor: GeneratorActor):
    held(actor).hold()  # not through the actor: to it the engine just gives nothing
    with pytest.raises(EngineTimeoutError, match=r"request_timeout_s=0\.3; 2 requests are in flight"):
        await asyncio.gather(actor.generate((1,), PARAMS), actor.generate((2,), PARAMS))


async def test_an_engine_that_hangs_after_an_update_that_failed_is_found(actor: GeneratorActor):
    waiting = asyncio.create_task(actor.generate((1,), PARAMS))
    bad = WeightUpdate(manifest=weights(2).manifest, tensors=weights(1).tensors)
    held(actor).arrived.set()
    with pytest.raises(WeightSyncError):
        await actor.update_weights(bad)
    held(actor).hold()
    with pytest.raises(EngineTimeoutError, match="1 requests are in flight"):
        await waiting
    assert actor.num_requests == 0


@pytest.mark.parametrize("logprob", [math.nan, -math.inf, None])
async def test_an_answer_without_a_finite_log_probability_is_the_engines_failure(actor: GeneratorActor, logprob: float):
    class Broken(FakeEngine):
        async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
            good = await super().generate(prompt_ids, params)
            return replace(good, logprobs=(*good.logprobs[:-1], logprob))

    actor.engine = Broken(lambda prompt, sample: [7, 8, 9])
    with pytest.raises(EngineError, match=rf"gives token 2 of 3 that it sampled the log-probability {logprob}"):
        await actor.generate((1,), PARAMS)
    assert actor.num_requests == 0


async def test_a_generator_takes_a_delta_of_what_it_serves_and_checks_the_whole(tiny_policy_path: Path, tmp_path: Path):
    config = load_config(None, ["engine.backend=fake", "engine.weight_delta=true"])
    made = GeneratorActor(config, str(tiny_policy_path), 0, str(tmp_path))
    await made.start()
    state = {"w": torch.zeros(8), "v": torch.ones(2)}
    encoder = DeltaEncoder()
    served = []
    for version in (1, 2, 3, 4):
        state["w"][version] = float(version)
        bucket, manifest = host_bucket(state), pack_weights(state, version).manifest
        for array in bucket.tensors.values():
            array.flags.writeable = False  # as from the object store
        encoder.add(bucket)
        delta = encoder.finish(version)
        if delta is None:
            served.append(await made.receive_weights(bucket, manifest))
        elif version < 4:
            served.append(await made.receive_delta(delta, manifest))
        else:
            with pytest.raises(WeightSyncError, match="checksum"):
                await made.receive_delta(delta, replace(manifest, checksum="0" * 32))
            with pytest.raises(WeightSyncError, match="changes weights version 3, and here is None"):
                await made.receive_delta(delta, manifest)
            served.append(await made.receive_weights(bucket, manifest))
        state = {name: tensor.clone() for name, tensor in state.items()}
    assert served == [1, 2, 3, 4]
    assert (await made.stats()).health.policy_version == 4
    await made.close()
