"""The scripted engine keeps the protocol that the tests in front of it rely on."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from trace_async.config import ConfigError, EngineConfig
from trace_async.engine import EngineDeadError, EngineRequestError, EngineTimeoutError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.engines.fake import FAKE_LOGPROB, FakeEngine
from trace_async.types import SamplingParams, VersionSpan
from trace_async.weights import pack_weights


def count_up(prompt, index):
    return [prompt[-1] + 1 + i + 10 * index for i in range(6)]


async def test_replies_are_cut_at_stop_and_length():
    engine = FakeEngine(count_up, max_context_tokens=6)
    stopped = await engine.generate([1, 2], SamplingParams(stop_token_ids=(4,)))
    assert (stopped.token_ids, stopped.finish_reason) == ((3, 4), "stop")
    assert stopped.logprobs == (FAKE_LOGPROB, FAKE_LOGPROB)
    cut = await engine.generate([7, 2], SamplingParams(max_new_tokens=3))
    assert (cut.token_ids, cut.finish_reason) == ((3, 4, 5), "length")
    full = await engine.generate([1, 2], SamplingParams(max_new_tokens=50))
    assert full.token_ids == (13, 14, 15, 16)  # the second answer for this prompt; the context of 6 is full
    assert full.cached_tokens == 1  # seen before, but the last prompt token is always computed


async def test_update_in_flight_splits_the_versions():
    engine = FakeEngine(count_up, token_latency_s=0.01)
    task = asyncio.create_task(engine.generate([1], SamplingParams()))
    await asyncio.sleep(0.025)
    update = pack_weights({"w": torch.ones(2)}, policy_version=3)
    await engine.update_weights(update)
    completion = await task
    assert completion.version_spans[0] == VersionSpan(0, 0)
    assert completion.version_spans[1].policy_version == 3
    with pytest.raises(WeightSyncError):
        await engine.update_weights(pack_weights({"w": torch.ones(2)}, policy_version=4))
    with pytest.raises(WeightSyncError):
        await engine.update_weights(replace(update, tensors={"w": np.array([1, 7], np.float32)}))


async def test_injected_failures_and_death():
    engine = FakeEngine(count_up, failures={1: EngineTimeoutError("slow")})
    await engine.generate([1], SamplingParams())
    with pytest.raises(EngineTimeoutError):
        await engine.generate([1], SamplingParams())
    with pytest.raises(EngineRequestError):
        await engine.generate([1_000], SamplingParams())
    engine.hold()
    task = asyncio.create_task(engine.generate([1], SamplingParams()))
    await asyncio.sleep(0.02)
    assert not task.done()
    engine.kill()
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(task, 1)
    with pytest.raises(EngineDeadError):
        await engine.health()


async def test_factory_makes_a_deterministic_fake_and_names_what_is_wrong(tmp_path):
    config = EngineConfig(backend="fake")
    with pytest.raises(ConfigError, match=r"policy\.path"):
        make_engine(config, policy_path=tmp_path, max_context_tokens=32, seed=1, log_dir=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 7}))
    answers = []
    for _ in range(2):
        engine = make_engine(config, policy_path=tmp_path, max_context_tokens=32, seed=1, log_dir=tmp_path)
        await engine.start()
        answers.append((await engine.generate([1, 2, 3], SamplingParams(max_new_tokens=20))).token_ids)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 20
    assert max(answers[0]) < 7
