"""Ask a server again while its failure is one that passes. For tools of any environment that use a network.

    async def ask():
        async with session.post(url, json=body) as response:
            response.raise_for_status()
            return await response.json()

    answer = await ask_again(ask, what=f"search server {url}")

Transient are 408, 425, 429 (the server's Retry-After is waited for), every 5xx, time-outs and broken connections. Any
other answer is final: it would be the same again. Either ends as an EnvError that says so, never as an observation.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from random import Random
from typing import TypeVar

import aiohttp

from trace_async.env import EnvError

T = TypeVar("T")

_TRANSIENT = frozenset({408, 425, 429})
_FINAL_CLIENT_ERRORS = (aiohttp.InvalidURL, aiohttp.TooManyRedirects, aiohttp.ClientSSLError)
_jitter = Random()


async def ask_again(
    ask: Callable[[], Awaitable[T]],
    *,
    what: str,
    num_retries: int = 3,
    first_wait_s: float = 0.5,
    limit_s: float = 60.0,
) -> T:
    """Return the answer of `ask`, which is tried up to `num_retries` more times. Waits double from `first_wait_s` on.

    All waits together take at most `limit_s`. A server that asks for more patience is given up at once. Raises EnvError
    naming `what`, the number of tries and the last problem.
    """
    ends_at = time.monotonic() + limit_s
    for attempt in range(num_retries + 1):
        try:
            return await ask()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            said = f"{what}: no answer after {attempt + 1} attempts: {str(error) or type(error).__name__}"
            if not is_transient(error):
                raise EnvError(f"{said}; it would be the same again, so it was not tried again") from error
            if attempt == num_retries:
                raise EnvError(said) from error
            wait_s = _wait_s(error, first_wait_s * 2**attempt)
            if time.monotonic() + wait_s > ends_at:
                raise EnvError(f"{said}; the next try would be in {wait_s:.0f} s, beyond the {limit_s:g} s") from error
        await asyncio.sleep(wait_s)
    raise AssertionError("the last try returns or raises")


def is_transient(error: BaseException) -> bool:
    """Say whether the same request may be answered a little later."""
    if isinstance(error, aiohttp.ClientResponseError):
        # A status of 0 or below 400: the answer itself could not be read, as when a connection breaks in it.
        return error.status in _TRANSIENT or error.status >= 500 or error.status < 300
    return not isinstance(error, _FINAL_CLIENT_ERRORS)


def _wait_s(error: BaseException, planned_s: float) -> float:
    """Return what the server asks for, or the planned wait if that is longer, with jitter lest all come at once."""
    asked_s = 0.0
    if isinstance(error, aiohttp.ClientResponseError) and error.headers is not None:
        asked_s = retry_after_s(error.headers.get("Retry-After", ""))
    return max(planned_s * (1 + 0.1 * _jitter.random()), asked_s)


def retry_after_s(header: str) -> float:
    """Return the seconds of a Retry-After header: a number, or a date (RFC 9110, 10.2.3). 0 where it says nothing."""
    header = header.strip()
    if header.isascii() and header.isdigit():
        return float(header)
    try:
        date = parsedate_to_datetime(header)
    except (ValueError, TypeError):
        return 0.0
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
