"""Dense and hybrid retrieval with a real embedding model, and the server over it."""

import json
from pathlib import Path

import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

import envs.multihop.dense as dense_module
from envs.multihop.dense import DenseRetriever, HybridRetriever, embedding_model
from envs.multihop.qa_files import QaFiles, make_retriever
from envs.multihop.retrieval import BM25Retriever, HttpRetriever, Passage
from envs.multihop.search_server import make_app
from tests.support.paths import ROOT
from trace_async.policy.save import verify

CACHE = str(ROOT / ".cache" / "retrieval")
PASSAGES = [
    Passage("Marie Curie", "She won two Nobel prizes, for physics and for chemistry."),
    Passage("Louvre", "A museum of art in Paris, on the right bank of the river."),
    Passage("Photosynthesis", "How plants turn light into sugar."),
    Passage("Basalt", "A dark rock that forms when lava cools quickly."),
    Passage("Sourdough", "Bread that rises with wild yeast."),
    Passage("Zx-81 qqv", "A code name."),
    Passage("Empty", ""),
]


@pytest.fixture(scope="module")
def dense() -> DenseRetriever:
    return DenseRetriever(PASSAGES, cache_dir=CACHE, log=lambda line: None)


@pytest.mark.parametrize(
    ("query", "title"),
    [
        ("famous female scientist", "Marie Curie"),
        ("paintings shown, French capital", "Louvre"),
        ("volcanic stone", "Basalt"),
        ("baking a loaf", "Sourdough"),
    ],
)
async def test_what_shares_no_word_is_found_by_meaning(dense, query, title):
    assert title not in [p.title for p in BM25Retriever(PASSAGES).search_now(query, top_k=1)]
    assert (await dense.search(query, top_k=3))[0].title == title
    assert len(await dense.search(query, top_k=100)) == len(PASSAGES)


async def test_order_is_that_of_the_inner_products_by_brute_force(dense):
    query = "rock and light"
    vector = dense_module._encode(dense._encoder, [query])[0]
    texts = [f"{p.title}\n{p.text}" for p in PASSAGES]
    scores = dense_module._encode(dense._encoder, texts) @ vector
    expected = [PASSAGES[i].title for i in np.argsort(-scores)]
    assert [p.title for p in await dense.search(query, top_k=7)] == expected
    assert await dense.search("   ", top_k=3) == ()


async def test_a_name_that_means_nothing_is_found_by_its_letters_in_the_hybrid(dense):
    hybrid = HybridRetriever(PASSAGES, dense)
    assert (await hybrid.search("zx 81 qqv", top_k=2))[0].title == "Zx-81 qqv"
    assert (await hybrid.search("volcanic stone", top_k=1))[0].title == "Basalt"
    # Ranks by hand: words find nothing in common with "volcanic stone", so the order is the dense one.
    assert await hybrid.search("volcanic stone", top_k=7) == await dense.search("volcanic stone", top_k=7)


def test_hybrid_adds_the_ranks_of_both_lists(dense, monkeypatch):
    hybrid = HybridRetriever(PASSAGES, dense)
    monkeypatch.setattr(hybrid._words, "ranked", lambda query, depth: [2, 0])
    monkeypatch.setattr(dense, "ranked", lambda query, depth: [1, 2, 3])
    # 2: 1/61 + 1/62;  0: 1/62;  1: 1/61;  3: 1/63
    assert [p.title for p in hybrid.search_now("any", top_k=4)] == [PASSAGES[i].title for i in (2, 1, 0, 3)]


def test_embeddings_are_computed_once_for_the_same_passages(dense, monkeypatch, tmp_path):
    calls = []
    encode = dense_module._encode
    monkeypatch.setattr(dense_module, "embedding_model", lambda *a: embedding_model("minilm", Path(CACHE)))
    monkeypatch.setattr(
        dense_module, "_encode", lambda e, texts, **k: calls.append(len(texts)) or encode(e, texts, **k)
    )
    for passages in (PASSAGES, PASSAGES, PASSAGES[:3]):
        DenseRetriever(passages, cache_dir=str(tmp_path), log=lambda line: None)
    assert calls == [7, 3]
    assert len(list(tmp_path.glob("embeddings-*.npy"))) == 2
    file = max(tmp_path.glob("*.npy"), key=lambda f: f.stat().st_size)
    np.save(file, np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match="not 7 vectors: remove it"):
        DenseRetriever(PASSAGES, cache_dir=str(tmp_path), log=lambda line: None)


def test_the_model_is_fetched_once_and_verified(dense):
    folder = embedding_model("minilm", Path(CACHE))
    verify(folder)
    assert (folder / "1_Pooling" / "config.json").is_file()


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="there are no passages"):
        DenseRetriever([], cache_dir=CACHE)
    with pytest.raises(ValueError, match=r"env\.args\.embedding_model=nowhere: neither minilm nor a directory"):
        DenseRetriever(PASSAGES, model="nowhere", cache_dir=CACHE)
    with pytest.raises(ValueError, match=r"env\.args\.retrieval=vector: bm25, dense or hybrid"):
        make_retriever(PASSAGES, "vector")  # type: ignore[arg-type]


async def test_questions_of_a_file_are_searched_by_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = [
        {"_id": str(i), "question": f"question {i}?", "answer": "x", "context": [[p.title, [p.text]] for p in PASSAGES]}
        for i in range(20)
    ]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    domain = QaFiles(questions=str(tmp_path / "questions.json"), retrieval="dense", top_k=1)
    env = domain.make_env(domain.tasks("train")[0])
    await env.init()
    result = await env.step("look it up ; search [ baking a loaf ]")
    assert result.messages[0].content.startswith("Sourdough : Bread that rises")


async def test_the_server_answers_as_the_retriever_does(dense):
    async with TestClient(TestServer(make_app(dense))) as client:
        remote = HttpRetriever(str(client.make_url("/retrieve")))
        for query in ("volcanic stone", "ein Brot backen", ""):
            assert await remote.search(query, top_k=2) == await dense.search(query, top_k=2)
        await remote.close()
        plain = await client.post("/retrieve", json={"queries": ["volcanic stone"], "topk": 1})
        assert (await plain.json()) == {"result": [[{"contents": '"Basalt"\n' + PASSAGES[3].text}]]}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{", "Expecting"),
        ("[]", "must be an object"),
        ('{"queries": "rock"}', "list of texts"),
        ('{"queries": [3]}', "list of texts"),
        ('{"queries": ["a"], "topk": 0}', "1 to 100"),
        ('{"queries": ["a"], "topk": true}', "1 to 100"),
        ('{"queries": ["a"], "topk": 1e9}', "1 to 100"),
        (json.dumps({"queries": ["a"] * 257}), "at most 256"),
    ],
)
async def test_a_bad_request_is_answered_with_what_is_wrong(body, problem):
    async with TestClient(TestServer(make_app(BM25Retriever(PASSAGES)))) as client:
        reply = await client.post("/retrieve", data=body, headers={"Content-Type": "application/json"})
        assert reply.status == 400
        assert problem in (await reply.json())["error"]
        good = await client.post("/retrieve", json={"queries": ["lava"], "topk": 1})
        assert good.status == 200
