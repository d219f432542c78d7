"""Every way in which a server can fail is an EngineError of the right kind."""

import asyncio
import socket

import pytest
from aiohttp import web

from trace_async.engine import EngineDeadError, EngineError, EngineRequestError, EngineTimeoutError
from trace_async.engines.servers.http_client import HttpClient
from trace_async.engines.servers.http_engine import version_spans
from trace_async.types import VersionSpan


async def answer(request: web.Request) -> web.StreamResponse:
    match request.path:
        case "/echo":
            return web.json_response({"method": request.method, "body": await request.json()})
        case "/empty":
            return web.Response()
        case "/text":
            return web.Response(text="flushed")
        case "/broken":
            return web.Response(text="{", content_type="application/json")
        case "/refused":
            return web.Response(status=400, text="too long")
        case "/failed":
            return web.Response(status=500, text="out of memory")
        case "/gone":
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        case "/half":
            response = web.StreamResponse(headers={"Content-Length": "100"})
            await response.prepare(request)
            await response.write(b"{")
            assert request.transport is not None
            request.transport.abort()
            return response
        case _:
            await asyncio.sleep(60)
            return web.Response()


@pytest.fixture
async def client():
    server = web.Server(answer)  # type: ignore[arg-type]  # aiohttp calls it with what `answer` is annotated with
    runner = web.ServerRunner(server, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = HttpClient(f"http://127.0.0.1:{port}", lambda: "the server (log: here)")
    yield client
    await client.close()
    await runner.cleanup()


async def test_json_in_json_out(client):
    assert await client.post("/echo", {"ids": [1, 2]}, limit_s=5) == {"method": "POST", "body": {"ids": [1, 2]}}
    assert await client.get("/empty", limit_s=5) is None
    assert await client.get("/text", limit_s=5) is None


@pytest.mark.parametrize(
    ("path", "error", "said"),
    [
        ("/refused", EngineRequestError, "refused /refused .400.: too long"),
        ("/failed", EngineError, "failed at /failed .500.: out of memory"),
        ("/broken", EngineError, "no JSON"),
        ("/gone", EngineDeadError, r"the server .log: here. is gone"),
        ("/half", EngineDeadError, "is gone"),
        ("/slow", EngineTimeoutError, "did not answer /slow in 0.2 s"),
    ],
)
async def test_failures_have_their_kind(client, path, error, said):
    with pytest.raises(error, match=said) as caught:
        await client.post(path, {}, limit_s=0.2 if path == "/slow" else 10)
    assert type(caught.value) is error


async def test_nobody_listens():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, but not listening: nobody else can take the port meanwhile
        client = HttpClient(f"http://127.0.0.1:{held.getsockname()[1]}", lambda: "the server")
        with pytest.raises(EngineDeadError):
            await client.get("/", limit_s=10)
        await client.close()


async def test_a_call_can_be_cancelled(client):
    waiting = asyncio.create_task(client.post("/slow", {}, limit_s=None))
    await asyncio.sleep(0.1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def test_version_spans_join_neighbours():
    reported = [
        {"version": "0", "start": 0, "end": 3},
        {"version": "0", "start": 3, "end": 5},
        {"version": "2", "start": 5, "end": 6},
    ]
    assert version_spans(reported) == (VersionSpan(0, 0), VersionSpan(5, 2))
    assert version_spans([]) == ()
