"""The first signal asks, the second one ends."""

import asyncio
import os
import signal

import pytest

from scripts.commands.stopping import run_until_stopped, terminated_as_interrupted


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_the_work_to_stop(number: int, capsys: pytest.CaptureFixture[str]):
    asked = asyncio.Event()

    async def work() -> None:
        os.kill(os.getpid(), number)
        await asked.wait()

    await run_until_stopped(work(), asked.set)
    assert "with a checkpoint; once more to stop at once" in capsys.readouterr().err


async def test_the_second_signal_ends_work_that_does_not_stop():
    async def work() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        await run_until_stopped(work(), lambda: None)


async def test_what_the_work_raises_comes_through():
    async def work() -> None:
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        await run_until_stopped(work(), lambda: None)


def terminate_oneself() -> None:
    with terminated_as_interrupted():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_before_the_loop_a_termination_is_an_interruption():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        terminate_oneself()
    assert signal.getsignal(signal.SIGTERM) == before
