"""Waiting for room does not count against a limit; what is done with it does."""

import asyncio

import pytest

from trace_async.rollout.call_threads import OutranLimitError
from trace_async.rollout.guard import within
from trace_async.rollout.limit_clock import waits_for_room


async def test_a_call_that_waits_for_room_for_longer_than_its_limit_goes_on():
    room = asyncio.Event()

    async def work() -> str:
        async with waits_for_room():
            await room.wait()
        return "done"

    call = asyncio.create_task(within(2.0, work()))
    await asyncio.sleep(3.0)
    assert not call.done()
    room.set()
    assert await call == "done"


async def test_the_limit_goes_on_where_it_stood_when_there_is_room():
    stopped = asyncio.Event()

    async def work() -> None:
        async with waits_for_room():
            await asyncio.sleep(0.2)
        try:
            await asyncio.sleep(3600)
        finally:
            stopped.set()

    with pytest.raises(OutranLimitError):
        await within(0.1, work())
    assert stopped.is_set()


async def test_it_does_nothing_where_nothing_is_limited():
    async with waits_for_room(), waits_for_room():
        pass
