"""The clock that limits requests: what counts, and what does not."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest

from trace_async.engines import work_clock
from trace_async.engines.work_clock import WorkClock


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of day, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(work_clock, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_it_stands_still_while_held(seconds: list[float]):
    clock = WorkClock()
    begin = clock.now()
    seconds[0] = 103.0
    assert clock.now() - begin == 3.0
    first, second = clock.held(), clock.held()
    with first:
        seconds[0] = 110.0
        second.__enter__()  # another update begins before this one has ended
        seconds[0] = 120.0
    seconds[0] = 125.0
    assert clock.now() - begin == 3.0
    second.__exit__(None, None, None)
    seconds[0] = 126.5
    assert clock.now() - begin == 4.5
    with contextlib.suppress(ValueError), clock.held():
        seconds[0] = 130.0
        raise ValueError("the update broke")
    seconds[0] = 131.0
    assert clock.now() - begin == 5.5


async def test_a_task_is_waited_for_by_this_clock_and_left_running():
    clock = WorkClock()
    done = asyncio.Event()
    task = asyncio.create_task(done.wait())
    with clock.held():
        waiting = asyncio.create_task(clock.until_done(task, 0.01))
        await asyncio.sleep(0.2)
        assert not waiting.done()
    with pytest.raises(TimeoutError):
        await waiting
    assert not task.done()
    done.set()
    await clock.until_done(task, 0.0)
    assert task.result() is True
