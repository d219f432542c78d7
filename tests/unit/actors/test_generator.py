"""One generator's limit on a request. The router: prompts stick, spill, and move when a generator breaks down."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import torch
from ray.exceptions import ActorDiedError

from actors.generator import GeneratorActor
from actors.router import GeneratorRouter, RouterStats
from trace_async.config import load_config
from trace_async.engine import EngineDeadError, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines.fake import FakeEngine
from trace_async.types import Completion, SamplingParams, VersionSpan
from trace_async.weights import WeightUpdate, pack_weights

PARAMS = SamplingParams()
LIMIT_S = 0.3
ANSWER = Completion(
    token_ids=(1,),
    logprobs=(-1.0,),
    version_spans=(VersionSpan(0, 0),),
    finish_reason="stop",
    prompt_tokens=1,
    cached_tokens=0,
)


class Handle:
    """Looks like an actor handle whose `generate` does what `behave` does."""

    def __init__(self, behave: Callable[[], Awaitable[Completion]]) -> None:
        self.calls = 0
        self.generate = self
        self._behave = behave

    def remote(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Awaitable[Completion]:
        self.calls += 1
        return self._behave()


async def answers() -> Completion:
    return ANSWER


async def dies() -> Completion:
    raise ActorDiedError()


async def refuses() -> Completion:
    raise EngineRequestError("too long")


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


def router(**generators: Handle) -> GeneratorRouter:
    made = GeneratorRouter(spill_requests=2, wait_s=0.05, max_retries=2)
    made.announce(generators)
    return made


def test_a_prompt_sticks_and_only_those_of_a_lost_generator_move():
    three = router(a=Handle(answers), b=Handle(answers), c=Handle(answers))
    homes = {f"task {i}": three.choose(f"task {i}") for i in range(300)}
    assert set(homes.values()) == {"a", "b", "c"}
    two = router(a=Handle(answers), b=Handle(answers))
    for key, home in homes.items():
        assert home == "c" or two.choose(key) == home


def test_a_full_generator_spills_only_to_one_that_is_clearly_less_loaded():
    made = router(a=Handle(answers), b=Handle(answers))
    key = next(f"task {i}" for i in range(99) if made.choose(f"task {i}") == "a")
    made.in_flight.update(a=2, b=1)
    assert made.choose(key) == "a"  # moving costs a cold prefill
    made.in_flight.update(a=1)
    assert made.choose(key) == "b"
    assert made.num_spilled == 1


async def test_a_request_goes_elsewhere_when_its_generator_dies():
    dead, alive = Handle(dies), Handle(answers)
    made = router(dead=dead, alive=alive)
    for i in range(20):
        assert await made.generate(f"task {i}", (1,), PARAMS) is ANSWER
    assert dead.calls == 1  # left out until the pool announces it anew
    assert alive.calls == 20
    assert made.stats() == RouterStats(num_spilled=0, num_retried=1)
    assert sum(made.in_flight.values()) == 0


async def test_a_wrong_request_is_not_retried():
    handle = Handle(refuses)
    with pytest.raises(EngineRequestError):
        await router(a=handle, b=handle).generate("t", (1,), PARAMS)
    assert handle.calls == 1


async def test_without_generators_a_request_waits_for_the_pool_and_not_for_ever():
    made = router()
    with pytest.raises(EngineDeadError, match=r"no generator came back within 0\.05 s"):
        await made.generate("t", (1,), PARAMS)

    made.wait_s = 5.0
    waiting = asyncio.create_task(made.generate("t", (1,), PARAMS))
    await asyncio.sleep(0.01)
    made.announce({"new": Handle(answers)})
    assert await waiting is ANSWER


async def test_a_generator_that_died_is_left_out_even_when_the_pool_announces_it_before_it_knows():
    dead, alive = Handle(dies), Handle(answers)
    made = router(dead=dead)
    waiting = asyncio.create_task(made.generate("t", (1,), PARAMS))
    made.wait_s = 5.0
    while not dead.calls:
        await asyncio.sleep(0)
    made.announce({"dead": dead})
    await asyncio.sleep(0)
    assert dead.calls == 1
    made.announce({"dead": dead, "alive": alive})
    assert await waiting is ANSWER


async def test_a_request_that_breaks_down_everywhere_says_so():
    made = router(a=Handle(dies), b=Handle(dies), c=Handle(dies))
    with pytest.raises(EngineDeadError, match="broke down 3 times"):
        await made.generate("t", (1,), PARAMS)
