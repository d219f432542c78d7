"""Search behind one protocol: BM25 in the process, or a server that speaks Search-R1's `/retrieve`."""

import asyncio
import json
import re
import sys
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp
import numpy as np

from envs.transient import ask_again
from trace_async.env import EnvError
from trace_async.types import Json

# bm25s computes with JAX at its import where there is one, and JAX then takes three quarters of the GPU's memory for
# itself (105 of 140 GiB were seen). Nothing here needs it, so bm25s is told that there is none.
_jax = sys.modules.get("jax")
sys.modules["jax"] = None  # type: ignore[assignment]
import bm25s  # noqa: E402

if _jax is None:
    del sys.modules["jax"]
else:
    sys.modules["jax"] = _jax

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Passage:
    """A text that can be found."""

    title: str
    """What it is about."""
    text: str
    """What it says."""


class Retriever(Protocol):
    async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        """Return the best passages, best first, at most `top_k`. Raises EnvError when the search itself broke down."""
        ...

    async def close(self) -> None:
        """Give back connections; may be called twice."""
        ...


class BM25Retriever:
    """BM25 (Lucene's variant, k1 1.5, b 0.75) over passages; words of the title count `title_weight` times."""

    def __init__(self, passages: Sequence[Passage], *, title_weight: int = 3) -> None:
        if not passages:
            raise ValueError("BM25Retriever: there are no passages")
        self._passages = tuple(passages)
        self._index = bm25s.BM25(method="lucene")
        documents = [_words(p.title) * title_weight + _words(p.text) for p in passages]
        # bm25s cannot index a corpus in which no document has a word.
        self._index.index([d or [""] for d in documents], show_progress=False)

    async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        return self.search_now(query, top_k=top_k)

    def search_now(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        """Passages that share a word with `query`, best first; of equals the earlier one first."""
        return tuple(self._passages[number] for number in self.ranked(query, top_k))

    def ranked(self, query: str, top_k: int) -> list[int]:
        """Return the numbers of those passages."""
        known = [word for word in _words(query) if word in self._index.vocab_dict]
        if not known:
            return []
        scores = np.asarray(self._index.get_scores(known))
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [int(i) for i in best if scores[i] > 0]

    async def close(self) -> None:
        return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class HttpRetriever:
    """A client of Search-R1's retrieval server.

    `POST url` with `{"queries": [query], "topk": k, "return_scores": true}`; answer
    `{"result": [[{"document": {"contents": "\\"Title\\"\\ntext"}, "score": s}, …]]}`, with or without the scores.
    Every request has `timeout_s`; what is transient (envs/transient.py) is tried `num_retries` more times within
    `retry_limit_s`. The last `cache_size` answers are kept.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 20.0,
        num_retries: int = 3,
        retry_wait_s: float = 0.5,
        retry_limit_s: float = 60.0,
        cache_size: int = 10_000,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"retrieval_url={url}: must start with http:// or https://")
        self._url = url
        self._timeout = aiohttp.ClientTimeout(total=timeout_s)
        self._num_retries = num_retries
        self._retry_wait_s = retry_wait_s
        self._retry_limit_s = retry_limit_s
        self._cache_size = cache_size
        self._cache: OrderedDict[tuple[str, int], tuple[Passage, ...]] = OrderedDict()
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def search(self, query: str, *, top_k: int) -> tuple[Passage, ...]:
        key = (query, top_k)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        passages = await ask_again(
            lambda: self._ask(query, top_k),
            what=f"retrieval server {self._url}",
            num_retries=self._num_retries,
            first_wait_s=self._retry_wait_s,
            limit_s=self._retry_limit_s,
        )
        self._cache[key] = passages
        if len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return passages

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _ask(self, query: str, top_k: int) -> tuple[Passage, ...]:
        loop = asyncio.get_running_loop()
        if self._session is None or self._loop is not loop:  # a session belongs to the event loop that made it
            self._session, self._loop = aiohttp.ClientSession(timeout=self._timeout), loop
        body = {"queries": [query], "topk": top_k, "return_scores": True}
        async with self._session.post(self._url, json=body) as response:
            response.raise_for_status()
            text = await response.text()
        try:
            return _passages(json.loads(text))[:top_k]
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise EnvError(f"retrieval server {self._url}: not Search-R1's format: {text[:200]!r}") from error


def _passages(answer: Json) -> tuple[Passage, ...]:
    """Return the passages of the one query that was asked."""
    results = answer["result"] if isinstance(answer, dict) else None
    if not isinstance(results, list) or not isinstance(results[0], list):
        raise TypeError("result must be a list of lists")
    return tuple(_passage(entry) for entry in results[0])


def _passage(entry: Json) -> Passage:
    if not isinstance(entry, dict):
        raise TypeError("a passage must be an object")
    document = entry.get("document", entry)
    if not isinstance(document, dict):
        raise TypeError("a document must be an object")
    contents = document["contents"]
    if not isinstance(contents, str):
        raise TypeError("contents must be text")
    title, _, text = contents.partition("\n")
    return Passage(title.strip().strip('"'), text.strip())
