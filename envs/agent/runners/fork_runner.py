"""Run an agent's function in an interpreter of its own, with a fork for every rollout (`fork_server.py`)."""

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

from envs.agent.runners.keeper import GRACE_S, Keeper
from envs.agent.runners.runner import Access, AgentFailed, access_variables
from trace_async.env import EnvError
from trace_async.rollout.limit_clock import waits_for_room
from trace_async.types import Json

# In bytes. A result may be longer than asyncio's own limit for a line, 64 KiB.
_LONGEST_LINE = 64 * 1024**2


class ForkRunner:
    """Runs `agent: package.module:function` with `python: …/bin/python`.

    The interpreter imports the module once, with `cwd` on its path, and forks for each rollout, at most `max_running`
    at once. The function is called as in the trainer's own process. It also finds its model in the environment
    variables of a command.
    """

    def __init__(self, target: str, python: str, cwd: str, max_running: int) -> None:
        if os.path.dirname(python):  # a path is from here, and the process would look for it from `cwd`
            python = os.path.abspath(python)  # not resolved: a virtual environment is known by its link
        self._command = [python, str(Path(__file__).with_name("fork_server.py")), target]
        self._cwd = cwd or None
        self._slots = asyncio.Semaphore(max_running)
        self._keeper = Keeper()
        self._server: _Server | None = None

    async def start(self, task: Mapping[str, Json], access: Access) -> "_RunningFork":
        self._keeper.start()
        async with waits_for_room():
            await self._slots.acquire()
        try:
            if self._server is None or not self._server.serves_here():
                self._server = _Server(self._command, self._cwd, self._keeper)
        except BaseException:
            self._slots.release()
            raise
        running = _RunningFork(self._slots.release)
        try:
            await self._server.run(running, task, access)
        except BaseException:
            running.leave()
            raise
        return running

    async def close(self) -> None:
        server, self._server = self._server, None
        if server is not None and server.serves_here():
            await server.close()
        self._keeper.close()


class _Server:
    """One fork server under way. It belongs to the event loop that made it."""

    def __init__(self, command: list[str], cwd: str | None, keeper: Keeper) -> None:
        self._loop = asyncio.get_running_loop()
        self._command = command
        self._cwd = cwd
        self._keeper = keeper
        self._process: asyncio.subprocess.Process | None = None
        self._running: dict[int, _RunningFork] = {}
        self._number = 0
        self._broken = ""
        self._ready = self._loop.create_future()
        self._work = asyncio.create_task(self._serve())

    def serves_here(self) -> bool:
        return self._loop is asyncio.get_running_loop() and not self._work.done()

    async def run(self, running: "_RunningFork", task: Mapping[str, Json], access: Access) -> None:
        """Ask for a rollout. Raises EnvError when the agent cannot be imported."""
        await asyncio.shield(self._ready)
        if self._broken:
            raise EnvError(self._broken)
        assert self._process is not None
        assert self._process.stdin is not None
        self._number += 1
        self._running[self._number] = running
        asked = {"id": self._number, "task": task, "base_url": access.base_url, "api_key": access.api_key}
        self._process.stdin.write(json.dumps(asked | {"env": access_variables(access)}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):  # it has just ended, and whoever waits for the rollout is told so
            await self._process.stdin.drain()

    async def close(self) -> None:
        """End the fork server, and the rollouts that are under way in it."""
        await asyncio.shield(self._ready)
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await self._work

    async def _serve(self) -> None:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                cwd=self._cwd,
                limit=_LONGEST_LINE,
                start_new_session=True,
            )
        except OSError as error:
            self._break(f"env.args.python={self._command[0]} cannot be started: {error}")
            return
        self._keeper.started(self._process.pid)
        try:
            assert self._process.stdout is not None
            while line := await self._process.stdout.readline():
                self._hear(json.loads(line))
            self._break(f"the agents' interpreter ended with exit code {await self._process.wait()}")
        finally:
            self._keeper.ended(self._process.pid)

    def _hear(self, news: dict[str, Json]) -> None:
        if "broken" in news:
            self._break(f"env.args.agent={self._command[-1]}: cannot be imported there: {news['broken']}")
        elif "ready" in news:
            self._ready.set_result(None)
        elif "pid" in news:
            self._running[int(str(news["id"]))].note_start(int(str(news["pid"])), self._keeper)
        else:
            self._running.pop(int(str(news["id"]))).note_end(news)

    def _break(self, words: str) -> None:
        self._broken = self._broken or words
        if not self._ready.done():
            self._ready.set_result(None)
        for running in self._running.values():
            running.note_end({"names": ["interpreter_ended"], "error": self._broken})
        self._running.clear()


class _RunningFork:
    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end: Callable[[], None] | None = on_end
        self._ended: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()
        self._group: int | None = None
        self._keeper: Keeper | None = None
        self._is_stopped = False

    def note_start(self, group: int, keeper: Keeper) -> None:
        self._group, self._keeper = group, keeper
        keeper.started(group)
        if self._is_stopped:
            self._kill(signal.SIGKILL)

    def note_end(self, news: dict[str, Json]) -> None:
        if self._keeper is not None and self._group is not None:
            self._keeper.ended(self._group)
        self.leave()
        if not self._ended.done():
            self._ended.set_result(news)

    def leave(self) -> None:
        """Give the slot back, once."""
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    async def result(self) -> Json:
        news = await asyncio.shield(self._ended)
        if "error" in news:
            names = news["names"]
            raise AgentFailed([str(name) for name in names] if isinstance(names, list) else [], str(news["error"]))
        return news.get("result")

    def _kill(self, number: signal.Signals) -> None:
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._group, number)

    async def stop(self) -> None:
        self._is_stopped = True
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._ended.done():
                return
            self._kill(number)
            await asyncio.wait([self._ended], timeout=GRACE_S)
