"""Exchange JSON with an inference server over loopback HTTP, with a typed EngineError for every way to fail."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp

from trace_async.engine import EngineDeadError, EngineError, EngineRequestError, EngineTimeoutError

Reply = Any  # decoded JSON; each backend takes the fields it needs, and fails when one is missing


class HttpClient:
    """Talks to one server."""

    def __init__(self, url: str, describe: Callable[[], str]) -> None:
        """`describe` names the server in errors and says where its log is."""
        self._url = url
        self._describe = describe
        # aiohttp sets no limits of its own, neither on time (each call brings its limit) nor on connections. No
        # connection is kept open: if the server closed an idle one just as we use it again, it would look dead.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0, force_close=True)
        )

    async def get(self, path: str, *, limit_s: float) -> Reply:
        return await self._limited("GET", path, None, limit_s)

    async def post(self, path: str, body: Reply, *, limit_s: float | None) -> Reply:
        """Return the decoded answer (None when it is empty). With `limit_s` None the caller watches the time."""
        if limit_s is None:
            return await self._call("POST", path, body)
        return await self._limited("POST", path, body, limit_s)

    async def close(self) -> None:
        await self._session.close()

    async def _limited(self, method: str, path: str, body: Reply, limit_s: float) -> Reply:
        try:
            async with asyncio.timeout(limit_s):
                return await self._call(method, path, body)
        except TimeoutError as error:
            raise EngineTimeoutError(f"{self._describe()} did not answer {path} in {limit_s:g} s") from error

    async def _call(self, method: str, path: str, body: Reply) -> Reply:
        try:
            async with self._session.request(method, self._url + path, json=body) as response:
                text = await response.text()
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError) as error:
            raise EngineDeadError(f"{self._describe()} is gone: {error!r}") from error
        if response.status >= 500:
            raise EngineError(f"{self._describe()} failed at {path} ({response.status}): {text[:500]}")
        if response.status >= 400:
            raise EngineRequestError(f"{self._describe()} refused {path} ({response.status}): {text[:500]}")
        try:
            return json.loads(text) if text and "json" in response.content_type else None
        except ValueError as error:
            raise EngineError(f"{self._describe()} answered {path} with no JSON: {text[:200]}") from error
