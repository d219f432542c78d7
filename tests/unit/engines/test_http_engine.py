"""Servers that are slow, at the right time and at the wrong one: SGLangEngine attached to a stub in this process."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from aiohttp import web

from trace_async.config import EngineConfig
from trace_async.engine import EngineTimeoutError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.engines.servers import http_engine
from trace_async.engines.servers.http_engine import HttpEngine
from trace_async.engines.servers.weight_files import load_start_weights
from trace_async.engines.servers.weight_record import expected_digests
from trace_async.types import SamplingParams
from trace_async.weights import WeightUpdate, pack_weights, read_weights, unpack_weights

LIMIT_S = 2.0
PROMPT = [5, 6, 7]
LOAD = "/update_weights_from_disk"


class StubServer:
    """Answers as SGLang's server does, from one loop: while `awake` is cleared it hangs, also to pings.

    With `hang_at` set to a path it falls asleep when that is asked for. Answers are given while nothing holds it.
    """

    def __init__(self, policy_path: Path) -> None:
        self.awake, self.free = asyncio.Event(), asyncio.Event()
        self.awake.set()
        self.free.set()
        self.hang_at = ""
        self.reached = asyncio.Event()
        self.version = "0"
        start = load_start_weights(policy_path)
        self.digests = self.digests_of(start)
        self.new_weights = pack_weights({name: tensor + 1 for name, tensor in unpack_weights(start).items()}, 1)

    @staticmethod
    def digests_of(update: WeightUpdate) -> dict[str, str]:
        return expected_digests(read_weights(update), torch.float32)

    async def answer(self, request: web.Request) -> web.Response:
        if request.path == self.hang_at:
            self.awake.clear()
            self.reached.set()
        await self.awake.wait()
        body = await request.json() if request.can_read_body else {}
        match request.path:
            case "/pause_generation":
                self.free.clear()
            case "/continue_generation":
                self.free.set()
            case "/update_weight_version":
                self.version = body["new_version"]
            case "/update_weights_from_disk":
                manifest = self.new_weights.manifest
                self.digests = self.digests_of(WeightUpdate(manifest=manifest, path=Path(body["model_path"])))
            case "/weights_checker":
                return web.json_response({"ranks": [{"checksums": self.digests}]})
            case "/generate":
                await self.free.wait()
                return web.json_response(self.completion(body))
        return web.json_response({})

    def completion(self, body: dict) -> dict:
        spans = [{"version": self.version, "start": 0, "end": 1}]
        meta = {"finish_reason": {"type": "length"}, "output_token_logprobs": [[-0.5, 9, None]]}
        return {
            "output_ids": [9],
            "meta_info": meta | {"weight_versions": spans, "prompt_tokens": len(body["input_ids"]), "cached_tokens": 0},
        }


@pytest.fixture
async def stub(tiny_policy_path: Path) -> StubServer:
    return StubServer(tiny_policy_path)


@pytest.fixture
async def engine(stub: StubServer, tiny_policy_path: Path, tmp_path: Path) -> AsyncIterator[HttpEngine]:
    app = web.Application(client_max_size=2**28)
    app.router.add_route("*", "/{path:.*}", stub.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    config = EngineConfig(
        backend="sglang", device="cpu", url=f"http://127.0.0.1:{port}", request_timeout_s=LIMIT_S, weight_sync="disk"
    )
    made = make_engine(config, policy_path=tiny_policy_path, max_context_tokens=64, seed=0, log_dir=tmp_path)
    try:
        await made.start()
        assert isinstance(made, HttpEngine)
        yield made
    finally:
        stub.awake.set()
        stub.free.set()
        await made.close()
        await runner.cleanup()


async def test_a_request_held_by_an_update_outlives_the_limit(engine: HttpEngine, stub: StubServer):
    stub.hang_at = LOAD
    update = asyncio.create_task(engine.update_weights(stub.new_weights))
    await stub.reached.wait()
    waiting = asyncio.create_task(engine.generate(PROMPT, SamplingParams()))
    # Two calls of the update, each within its own limit, hold the request longer than its limit.
    await asyncio.sleep(0.6 * LIMIT_S)
    stub.hang_at = "/flush_cache"
    stub.reached.clear()
    stub.awake.set()
    await stub.reached.wait()
    await asyncio.sleep(0.6 * LIMIT_S)
    assert not waiting.done()
    stub.awake.set()
    await update
    completion = await waiting
    assert completion.token_ids == (9,)
    assert completion.version_spans[0].policy_version == 1


async def test_a_server_that_loads_weights_is_not_taken_for_one_that_hangs(
    engine: HttpEngine, stub: StubServer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(http_engine, "PING_LIMIT_S", 0.1)
    stub.hang_at = LOAD
    update = asyncio.create_task(engine.update_weights(stub.new_weights))
    await stub.reached.wait()
    assert (await engine.health()).policy_version == 0
    stub.awake.set()
    await update
    assert (await engine.health()).policy_version == 1


async def test_a_server_that_hangs_while_it_loads_is_found(engine: HttpEngine, stub: StubServer):
    stub.hang_at = LOAD
    with pytest.raises((WeightSyncError, EngineTimeoutError), match="did not answer"):
        await engine.update_weights(stub.new_weights)
    with pytest.raises(WeightSyncError, match="must be synced"):
        await engine.generate(PROMPT, SamplingParams())
    with pytest.raises(EngineTimeoutError):
        await engine.health()


async def test_a_server_that_hangs_is_found_by_its_requests_and_by_its_health(engine: HttpEngine, stub: StubServer):
    stub.awake.clear()
    with pytest.raises(EngineTimeoutError, match="did not finish a request in 2 s"):
        await engine.generate(PROMPT, SamplingParams())
    with pytest.raises(EngineTimeoutError):
        await engine.health()
