"""Import an agent once, in the agent's own interpreter, and fork for every rollout. Standard library only.

    python fork_server.py package.module:function < jobs > news

`fork_runner.py` starts it and writes one JSON line a rollout:

    {"id": 3, "task": …, "env": {…}, "base_url": …, "api_key": …}

What it reads are lines of news: `{"ready": true}` after the import, or `{"broken": words}`; then, of each rollout,
`{"id": 3, "pid": 77}`, and at its end `{"id": 3, "result": …}` or `{"id": 3, "names": [classes], "error": words}`.
A fork costs milliseconds where a framework's import costs seconds, and rollouts share nothing but what was imported.
"""

import asyncio
import contextlib
import importlib
import inspect
import json
import os
import selectors
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NoReturn

_BLOCK = 65536
_MOST_CHARS = 1_000_000


def load(target: str) -> Callable[..., Any]:
    """Return the function that `package.module:function` names, also of a module in the working directory."""
    sys.path[0] = os.getcwd()  # in place of this file's folder, whose modules would hide others of their names
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def call(function: Callable[..., Any], job: dict[str, Any]) -> dict[str, Any]:
    """Call the agent. Returns the last line of news about its rollout."""
    os.environ.update(job["env"])
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    known = {parameter.name for parameter in parameters}
    given = {name: job[name] for name in ("task", "base_url", "api_key") if takes_all or name in known}
    try:
        result = function(**given)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
        text = json.dumps(result, default=str)
        if len(text) > _MOST_CHARS:
            raise ValueError(f"a result of {len(text)} characters; at most {_MOST_CHARS}")
        return {"id": job["id"], "result": json.loads(text)}
    except BaseException as error:  # noqa: BLE001 somebody else's code, sys.exit() too
        names = [kind.__name__ for kind in type(error).__mro__]
        return {"id": job["id"], "names": names, "error": f"{type(error).__name__}: {error}"[:_MOST_CHARS]}


async def _awaited(result: Any) -> Any:
    return await result


class Server:
    """Reads jobs, forks, and hands on what the forks say, whole lines only."""

    def __init__(self, function: Callable[..., Any], jobs: BinaryIO, news: BinaryIO) -> None:
        self._function = function
        self._jobs = jobs
        self._news = news
        self._selector = selectors.DefaultSelector()
        self._forks: dict[int, tuple[int, int, bytearray]] = {}  # end of its pipe → (id, pid, what it said so far)

    def serve(self) -> None:
        """Fork for each job until there are no more, then end the rollouts that are still under way."""
        os.set_blocking(self._jobs.fileno(), True)
        self._selector.register(self._jobs.fileno(), selectors.EVENT_READ)
        unread = b""
        while True:
            for key, _ in self._selector.select():
                if key.fd != self._jobs.fileno():
                    self._hear(key.fd)
                    continue
                block = os.read(key.fd, _BLOCK)
                if not block:
                    return self._end_all()
                *lines, unread = (unread + block).split(b"\n")
                for line in lines:
                    self._fork(json.loads(line))

    def _fork(self, job: dict[str, Any]) -> None:
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            self._be_agent(job, theirs)
        os.close(theirs)
        _lead_a_group(pid)
        self._forks[ours] = (job["id"], pid, bytearray())
        self._selector.register(ours, selectors.EVENT_READ)
        self._say({"id": job["id"], "pid": pid})

    def _be_agent(self, job: dict[str, Any], pipe: int) -> NoReturn:
        try:
            _lead_a_group(0)
            self._selector.close()
            for fd in (self._jobs.fileno(), self._news.fileno(), *self._forks):
                os.close(fd)
            said = json.dumps(call(self._function, job)).encode()
            while said:
                said = said[os.write(pipe, said) :]
            sys.stdout.flush()
        finally:
            os._exit(0)  # not sys.exit: the exit handlers are those of the server

    def _hear(self, fd: int) -> None:
        number, pid, said = self._forks[fd]
        block = os.read(fd, _BLOCK)
        said += block
        if block:
            return
        self._selector.unregister(fd)
        os.close(fd)
        del self._forks[fd]
        _, status = os.waitpid(pid, 0)
        if not said:
            code = os.waitstatus_to_exitcode(status)
            self._say({"id": number, "names": [f"exit_{code}"], "error": f"its process ended with {code}"})
        else:
            self._say(json.loads(said))

    def _say(self, news: dict[str, Any]) -> None:
        self._news.write(json.dumps(news).encode() + b"\n")
        self._news.flush()

    def _end_all(self) -> None:
        for _, pid, _ in self._forks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _lead_a_group(pid: int) -> None:
    """Make `pid` (0: this process) lead a group. Both sides of a fork do so, so that neither waits for the other."""
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def main(target: str) -> None:
    """Load the agent's function, say whether that worked, and serve jobs from standard input."""
    jobs = os.fdopen(os.dup(0), "rb", buffering=0)
    news = os.fdopen(os.dup(1), "wb")
    # What an agent prints must not be taken for news, and what it reads is not for it.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    try:
        function = load(target)
    except BaseException as error:  # the import runs somebody else's code
        news.write(json.dumps({"broken": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        news.flush()
        raise
    server = Server(function, jobs, news)
    server._say({"ready": True})
    server.serve()


if __name__ == "__main__":
    main(sys.argv[1])
