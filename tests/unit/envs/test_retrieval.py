"""BM25 in the process, and the HTTP client against a real server on loopback that fails on demand."""

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from envs.multihop.qa_files import QaFiles
from envs.multihop.retrieval import BM25Retriever, HttpRetriever, Passage
from envs.transient import retry_after_s
from tests.support.paths import ROOT
from trace_async.engines.servers.server import free_port
from trace_async.env import EnvError

PASSAGES = (
    Passage("ada cohen", "person birthplace keld mentor ben ito"),
    Passage("ada ellis", "person birthplace orsen mentor ada cohen"),
    Passage("keld", "city country arland mayor ada cohen"),
)


def test_search_leaves_jax_alone_and_others_may_use_it(tmp_path: Path):
    """JAX takes three quarters of a GPU's memory at its first use, and bm25s would use it at its import."""
    jax = tmp_path / "jax"
    jax.mkdir()
    (jax / "__init__.py").write_text("print('jax is imported')")
    (jax / "lax.py").write_text("def top_k(array, k): print('jax computes')")
    program = "import envs.multihop.retrieval; print('search is there'); import jax.lax; print(jax.lax.top_k.__name__)"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split("\n") == ["search is there", "jax is imported", "top_k", ""]


def test_the_title_outweighs_mentions() -> None:
    retriever = BM25Retriever(PASSAGES)
    assert retriever.search_now("Ada Cohen!", top_k=1) == (PASSAGES[0],)
    assert retriever.search_now("keld", top_k=1) == (PASSAGES[2],)
    assert set(retriever.search_now("ada", top_k=2)) == {PASSAGES[0], PASSAGES[1]}


def test_only_passages_that_share_a_word_are_found() -> None:
    retriever = BM25Retriever(PASSAGES)
    assert retriever.search_now("arland", top_k=3) == (PASSAGES[2],)
    assert retriever.search_now("nowhere zzz", top_k=3) == ()
    assert retriever.search_now("", top_k=3) == ()
    assert retriever.search_now("[ ; ]", top_k=3) == ()


def test_equals_keep_their_order_and_odd_corpora_work() -> None:
    twins = [Passage("t", "same"), Passage("t", "same"), Passage("", "?")]
    found = BM25Retriever(twins).search_now("same", top_k=3)
    assert len(found) == 2
    assert found[0] is twins[0]
    assert BM25Retriever([Passage("", "")]).search_now("x", top_k=1) == ()
    with pytest.raises(ValueError, match="no passages"):
        BM25Retriever([])


@given(st.text(max_size=30))
def test_any_query_is_answered(query: str) -> None:
    assert len(BM25Retriever(PASSAGES).search_now(query, top_k=2)) <= 2


@dataclass
class FakeServer:
    """Answers `/retrieve` as Search-R1 does; `faults` are served first."""

    url: str = ""
    faults: list[str] = field(default_factory=list)
    requests: list[dict] = field(default_factory=list)
    with_scores: bool = True

    async def retrieve(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "hang":
            await asyncio.sleep(5)
        if fault == "garbage":
            return web.json_response({"answer": 42})
        if fault == "broken":
            assert request.transport is not None
            request.transport.close()
        if fault and fault != "broken":
            status, _, after = fault.partition("/")
            return web.Response(status=int(status), headers={"Retry-After": after} if after else {})
        documents = [{"id": str(i), "contents": f'"{p.title}"\n{p.text}'} for i, p in enumerate(PASSAGES)]
        found = documents[: body["topk"]]
        results = [{"document": d, "score": 1.0} for d in found] if self.with_scores else found
        return web.json_response({"result": [results]})


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    app = web.Application()
    app.router.add_post("/retrieve", fake.retrieve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve"
    yield fake
    await runner.cleanup()


@pytest.mark.parametrize("with_scores", [True, False])
async def test_passages_come_over_http_and_are_cached(server: FakeServer, with_scores: bool) -> None:
    server.with_scores = with_scores
    client = HttpRetriever(server.url)
    assert await client.search("ada", top_k=2) == PASSAGES[:2]
    assert await client.search("ada", top_k=2) == PASSAGES[:2]
    assert server.requests == [{"queries": ["ada"], "topk": 2, "return_scores": True}]
    await client.search("ada", top_k=1)
    assert len(server.requests) == 2
    await client.close()
    await client.close()


async def test_the_cache_forgets_the_longest_unused(server: FakeServer) -> None:
    client = HttpRetriever(server.url, cache_size=2)
    for query in ("a", "b", "a", "c", "a", "b"):
        await client.search(query, top_k=1)
    assert [request["queries"][0] for request in server.requests] == ["a", "b", "c", "b"]
    await client.close()


async def test_faults_are_tried_again(server: FakeServer) -> None:
    server.faults = ["500", "hang", "503"]
    client = HttpRetriever(server.url, timeout_s=0.3, num_retries=3, retry_wait_s=0.01)
    assert await client.search("ada", top_k=1) == PASSAGES[:1]
    assert len(server.requests) == 4
    await client.close()


async def test_after_the_last_retry_it_is_our_failure_not_the_models(server: FakeServer) -> None:
    server.faults = ["500"] * 3
    client = HttpRetriever(server.url, num_retries=2, retry_wait_s=0.01)
    with pytest.raises(EnvError, match=r"no answer after 3 attempts: 500"):
        await client.search("ada", top_k=1)
    assert await client.search("ada", top_k=1) == PASSAGES[:1]  # a failure is not cached
    await client.close()


async def test_a_refusal_and_a_foreign_format_are_not_tried_again(server: FakeServer) -> None:
    server.faults = ["404", "garbage"]
    client = HttpRetriever(server.url, retry_wait_s=0.01)
    with pytest.raises(EnvError, match="after 1 attempts: 404"):
        await client.search("ada", top_k=1)
    with pytest.raises(EnvError, match=r"not Search-R1's format: .*42"):
        await client.search("ada", top_k=1)
    assert len(server.requests) == 2
    await client.close()


async def test_a_domain_of_files_searches_on_the_server(server: FakeServer, tmp_path: Path) -> None:
    rows = [{"_id": f"{k}", "question": f"{k} ?", "answer": "keld", "context": [["t", ["x"]]]} for k in range(9)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    domain = QaFiles(questions=f"{tmp_path}/q.json", heldout_share=0.5, retrieval_url=server.url, top_k=2)
    env = domain.make_env(domain.tasks("train")[0])
    found = (await env.step("search [ ada ]")).messages[0].content
    assert found == "\n".join(f"{p.title} : {p.text}" for p in PASSAGES[:2])
    server.faults = ["404"]
    with pytest.raises(EnvError, match="404"):
        await env.step("search [ ben ]")
    assert (await env.step("answer [ keld ]")).reward == 1.0
    session = domain._retriever._session  # type: ignore[attr-defined]
    await domain.close()
    await domain.close()
    assert session.closed


@pytest.mark.parametrize("fault", ["408", "425", "429", "429/0", "500", "502", "503", "504", "599", "broken"])
async def test_what_passes_is_tried_again(server: FakeServer, fault: str) -> None:
    server.faults = [fault]
    client = HttpRetriever(server.url, num_retries=1, retry_wait_s=0.01)
    assert await client.search("ada", top_k=1) == PASSAGES[:1]
    assert len(server.requests) == 2
    await client.close()


@pytest.mark.parametrize("fault", ["400", "401", "403", "404", "410", "422"])
async def test_what_is_final_says_so_and_is_asked_once(server: FakeServer, fault: str) -> None:
    server.faults = [fault]
    client = HttpRetriever(server.url, num_retries=3, retry_wait_s=0.01)
    with pytest.raises(EnvError, match=f"after 1 attempts: {fault}.*it would be the same again"):
        await client.search("ada", top_k=1)
    assert len(server.requests) == 1
    await client.close()


async def test_a_server_that_asks_for_patience_is_given_it_within_a_limit(server: FakeServer) -> None:
    server.faults = ["429/1"]
    client = HttpRetriever(server.url, num_retries=1, retry_wait_s=0.01)
    started = time.monotonic()
    assert await client.search("ada", top_k=1) == PASSAGES[:1]
    assert time.monotonic() - started >= 1.0
    server.faults = ["503/3600"]
    with pytest.raises(EnvError, match=r"after 1 attempts: 503.*the next try would be in 3600 s, beyond the 60 s"):
        await client.search("ben", top_k=1)
    await client.close()


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after_s("120") == 120.0
    assert retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=90))
    assert 80 < retry_after_s(later) <= 90
    assert [retry_after_s(odd) for odd in ("", "soon", "-5", "1e9", "\u0663")] == [0.0] * 5


async def test_no_server_at_all() -> None:
    client = HttpRetriever("http://127.0.0.1:9/retrieve", num_retries=1, retry_wait_s=0.01)
    with pytest.raises(EnvError, match=r"127.0.0.1:9/retrieve: no answer after 2 attempts"):
        await client.search("ada", top_k=1)
    await client.close()
    with pytest.raises(ValueError, match="must start with http"):
        HttpRetriever("127.0.0.1:9")


def test_one_client_serves_one_event_loop_after_another() -> None:
    port = free_port()
    client = HttpRetriever(f"http://127.0.0.1:{port}/retrieve", cache_size=0)

    async def ask() -> tuple[Passage, ...]:
        app = web.Application()
        app.router.add_post("/retrieve", FakeServer().retrieve)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        try:
            return await client.search("ada", top_k=1)
        finally:
            await runner.cleanup()

    assert asyncio.run(ask()) == asyncio.run(ask()) == PASSAGES[:1]
    asyncio.run(client.close())
