"""The simulated engine's times, by hand, under virtual time."""

import asyncio

import pytest

from scripts.bench.virtual_time import run_in_virtual_time
from trace_async.engine import EngineDeadError, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines.simulated import LatencyModel, SimulatedEngine
from trace_async.types import SamplingParams, VersionSpan
from trace_async.weights import WeightManifest, WeightUpdate

LATENCY = LatencyModel(step_s=1.0, step_per_request_s=0.5, prefill_tokens_per_s=10.0, weight_update_s=4.0)
STOP = 9


def engine_of(length: int, **settings: object) -> SimulatedEngine:
    """Answers `length` tokens, the last of them the stop token."""
    return SimulatedEngine(lambda *_: (1,) * (length - 1) + (STOP,), latency=LATENCY, **settings)  # type: ignore[arg-type]


def params(max_new_tokens: int = 64) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, stop_token_ids=(STOP,))


def weights(version: int) -> WeightUpdate:
    return WeightUpdate(
        manifest=WeightManifest(policy_version=version, checksum=str(version), num_tensors=0, num_bytes=0), tensors={}
    )


async def timed(engine: SimulatedEngine, prompt: tuple[int, ...], start_s: float = 0.0):
    """(second of the end, the completion) of a request that starts at `start_s`."""
    await asyncio.sleep(start_s)
    completion = await engine.generate(prompt, params())
    return asyncio.get_running_loop().time(), completion


def test_a_request_alone_takes_its_prefill_and_its_steps():
    async def main():
        engine = engine_of(6)
        await engine.start()
        end, completion = await timed(engine, tuple(range(20)))
        # 20 tokens at 10 a second, then 6 steps of 1.5 s.
        assert end == pytest.approx(2.0 + 9.0)
        assert (completion.finish_reason, completion.cached_tokens, completion.prompt_tokens) == ("stop", 0, 20)
        assert engine.busy_s == pytest.approx(11.0)

    run_in_virtual_time(main())


def test_what_is_cached_is_not_prefilled_again_and_steps_slow_down_with_the_batch():
    async def main():
        engine = engine_of(6)
        await engine.start()
        prompt = tuple(range(20))
        await timed(engine, prompt)
        now = asyncio.get_running_loop().time()
        ends = await asyncio.gather(timed(engine, prompt), timed(engine, prompt))
        # One token of each is prefilled (.1 s each); then 6 steps of a batch of two: 2 s each.
        assert [end - now for end, _ in ends] == pytest.approx([12.2, 12.2])
        assert [completion.cached_tokens for _, completion in ends] == [19, 19]

    run_in_virtual_time(main())


def test_a_later_request_stalls_the_first_by_its_prefill_and_shares_its_steps():
    async def main():
        engine = engine_of(4)
        await engine.start()
        first, second = await asyncio.gather(
            timed(engine, tuple(range(10))), timed(engine, tuple(range(100, 110)), start_s=2.5)
        )
        # First: prefill to 1.0, one step to 2.5; stalled to 3.5 by the other's prefill; 3 steps of 2 s.
        assert first[0] == pytest.approx(9.5)
        # Second: 3 steps of 2 s beside the first, then one of 1.5 s alone.
        assert second[0] == pytest.approx(11.0)

    run_in_virtual_time(main())


def test_an_update_stalls_everything_forgets_the_cache_and_marks_the_tokens_after_it():
    async def main():
        engine = engine_of(4)
        await engine.start()

        async def update() -> None:
            await asyncio.sleep(4.0)
            await engine.update_weights(weights(1))

        (end, completion), _ = await asyncio.gather(timed(engine, tuple(range(10))), update())
        # Prefill to 1.0, two steps to 4.0, 4 s of update, two steps of 1.5 s.
        assert end == pytest.approx(11.0)
        assert completion.version_spans == (VersionSpan(0, 0), VersionSpan(2, 1))
        _, again = await timed(engine, (*range(8), 77))
        assert again.cached_tokens == 8  # the answer was remembered after the update, not before it
        with pytest.raises(WeightSyncError):
            await engine.update_weights(weights(1))

    run_in_virtual_time(main())


def test_requests_beyond_the_batch_wait():
    async def main():
        engine = engine_of(2, max_running=1)
        await engine.start()
        both = asyncio.gather(timed(engine, (1,) * 10), timed(engine, (2,) * 10))
        await asyncio.sleep(1.0)
        assert (await engine.health()).num_waiting == 1
        # Prefill to 1.0 and 2 steps of 1.5 s for the first; then the same for the second.
        assert [end for end, _ in await both] == pytest.approx([4.0, 8.0])

    run_in_virtual_time(main())


def test_an_aborted_request_leaves_the_batch_and_a_closed_engine_ends_all():
    async def main():
        engine = engine_of(4)
        await engine.start()
        aborted = asyncio.create_task(timed(engine, (1,) * 10))
        other = asyncio.create_task(timed(engine, (2,) * 10))
        await asyncio.sleep(2.0)  # both prefilled, no step yet
        aborted.cancel()
        end, _ = await other
        assert end == pytest.approx(2.0 + 4 * 1.5)
        last = asyncio.create_task(timed(engine, (3,) * 10))
        await asyncio.sleep(0.5)
        await engine.close()
        with pytest.raises(EngineDeadError):
            await last
        with pytest.raises(EngineDeadError):
            await engine.generate((1,), params())

    run_in_virtual_time(main())


def test_failures_come_at_their_rate_and_impossible_requests_are_refused():
    async def main():
        engine = engine_of(2, failure_rate=0.25, max_context_tokens=50)
        await engine.start()
        results = await asyncio.gather(
            *(engine.generate((i,) * 5, params()) for i in range(400)), return_exceptions=True
        )
        failed = sum(isinstance(result, EngineTimeoutError) for result in results)
        assert 70 <= failed <= 130
        with pytest.raises(EngineRequestError):
            await engine.generate((1,) * 50, params())
        cut = await engine_of(40, max_context_tokens=50).generate((1,) * 30, params())
        assert (len(cut.token_ids), cut.finish_reason) == (20, "length")

    run_in_virtual_time(main())
