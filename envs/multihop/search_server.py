"""Serve a retriever as Search-R1's `/retrieve`, on this machine only: one index for many processes or trainers."""

import json
from typing import Any

from aiohttp import web

from envs.multihop.retrieval import Passage, Retriever

MAX_BODY_BYTES = 1024**2
MAX_QUERIES = 256
MAX_TOP_K = 100


def make_app(retriever: Retriever) -> web.Application:
    """`POST /retrieve` with `{"queries": [text, …], "topk": k}`; what is wrong with a request is answered with 400."""

    async def retrieve(request: web.Request) -> web.Response:
        try:
            queries, top_k, with_scores = _request(await request.json())
        except (ValueError, TypeError) as error:
            return web.json_response({"error": str(error)}, status=400)
        found = [await retriever.search(query, top_k=top_k) for query in queries]
        return web.json_response({"result": [_documents(passages, with_scores) for passages in found]})

    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_post("/retrieve", retrieve)
    return app


def _request(body: Any) -> tuple[list[str], int, bool]:
    if not isinstance(body, dict):
        raise ValueError("the body must be an object")
    queries, top_k = body.get("queries"), body.get("topk", 3)
    if not isinstance(queries, list) or not all(isinstance(query, str) for query in queries):
        raise ValueError("queries must be a list of texts")
    if len(queries) > MAX_QUERIES:
        raise ValueError(f"queries: at most {MAX_QUERIES} at once, not {len(queries)}")
    if isinstance(top_k, bool) or not isinstance(top_k, int) or not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"topk={json.dumps(top_k)[:40]}: 1 to {MAX_TOP_K}")
    return queries, top_k, bool(body.get("return_scores", False))


def _documents(passages: tuple[Passage, ...], with_scores: bool) -> list[dict[str, object]]:
    """As the protocol wants it; the scores are 1 / rank, since retrievers here say an order and no more."""
    documents = [{"contents": f'"{p.title}"\n{p.text}'} for p in passages]
    if not with_scores:
        return [dict(document) for document in documents]
    return [{"document": document, "score": 1 / rank} for rank, document in enumerate(documents, 1)]
