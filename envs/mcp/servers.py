"""Start the MCP servers of a rollout, call their tools within limits, and end them.

Needs the official SDK: `pip install trace-async[mcp]`. A connection lives in a task of its own, because the SDK's
client must be left in the task that entered it. Calls may come from any task.
"""

import asyncio
import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from envs.actions import cut_text
from trace_async.config import ConfigError
from trace_async.env import EnvError, EnvTimeoutError
from trace_async.types import Json

try:
    from mcp import Client, MCPError, StdioServerParameters
except ImportError as error:  # pragma: no cover
    raise ConfigError("env.name=mcp needs the official SDK: pip install 'trace-async[mcp]'") from error

# JSON-RPC's codes for what is wrong with a request: no such method, wrong parameters. All others are the server's.
_CALLS_FAULT = (-32601, -32602)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One server, which is either a process of ours (`command`) or reached at `url`."""

    name: str
    """Under which it stands in `env.args.servers`."""
    command: tuple[str, ...] = ()
    """The program and its arguments. It is spoken to over its standard streams."""
    url: str = ""
    """Where it listens, by streamable HTTP."""
    cwd: str = ""
    """The working directory of `command`; empty: ours."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables for `command`, beside those that the SDK hands on."""
    stateless: bool = False
    """Its calls change nothing. So one connection serves all rollouts, and a fork does not repeat its calls."""
    save: str = ""
    """Its own tool that takes nothing and returns its state as text; empty: it has none, and forks repeat the calls."""
    restore: str = ""
    """Its own tool that takes such a text as `state` and goes on from there."""

    def target(self) -> "StdioServerParameters | str":
        """Return what the SDK's client connects to."""
        if self.url:
            return self.url
        first, *rest = self.command
        return StdioServerParameters(command=first, args=rest, cwd=self.cwd or None, env=dict(self.env) or None)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallLimits:
    """How long a server may take, and how much it may say."""

    start_s: float
    """Seconds until it is ready."""
    call_s: float
    """Seconds for one call."""
    max_chars: int
    """Characters of one answer. A longer one is cut, and says so."""


class Connection:
    """A connection to one server, which starts with it. `close` ends both."""

    def __init__(self, config: ServerConfig, limits: CallLimits) -> None:
        self.config = config
        self._limits = limits
        self._ready: asyncio.Future[Client] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self._task = asyncio.create_task(self._live())

    async def _live(self) -> None:
        try:
            # Twice as long, so that `_within` gives up first and names the setting.
            async with Client(self.config.target(), read_timeout_seconds=2 * self._limits.call_s) as client:
                if not self._ready.done():
                    self._ready.set_result(client)
                await self._stop.wait()
        except Exception as error:  # noqa: BLE001 the server and its SDK are somebody else's code
            if not self._ready.done():
                self._ready.set_exception(EnvError(f"MCP server {self.config.name} cannot be used: {error!r}"))
                self._ready.exception()  # looked at, so that asyncio does not complain where nobody waits for it

    async def _client(self) -> Client:
        try:
            async with asyncio.timeout(self._limits.start_s):
                return await asyncio.shield(self._ready)
        except TimeoutError:
            raise EnvTimeoutError(
                f"MCP server {self.config.name} did not start within env.args.start_timeout_s={self._limits.start_s:g}"
            ) from None

    async def tools(self) -> list[dict[str, Json]]:
        """Return the schemas of its tools, in the form that chat templates take."""
        listed = await self._within((await self._client()).list_tools(), "list_tools")
        return [
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema},
            }
            for tool in listed.tools
        ]

    async def call(self, name: str, arguments: Mapping[str, Json]) -> str:
        """Return the answer in words. What the tool or the protocol finds wrong with the call is an answer too.

        Raises EnvError when the server itself fails, and EnvTimeoutError when it is too slow.
        """
        try:
            result = await self._within((await self._client()).call_tool(name, dict(arguments)), name)
        except MCPError as error:
            if error.error.code not in _CALLS_FAULT:
                raise EnvError(f"MCP server {self.config.name}: {name}: {error}") from error
            return cut_text(f"error: {error}", max_chars=self._limits.max_chars)
        texts = [part.text if part.type == "text" else f"({part.type})" for part in result.content]
        text = "\n".join(texts) or json.dumps(result.structured_content)
        return cut_text(f"error: {text}" if result.is_error else text, max_chars=self._limits.max_chars)

    async def _within(self, work: Any, what: str) -> Any:
        """Return the answer to `work`. Raises EnvError when it takes too long or the connection ends."""
        asked = asyncio.ensure_future(work)
        try:
            await asyncio.wait({asked, self._task}, timeout=self._limits.call_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
            if self._task.done():
                raise EnvError(f"MCP server {self.config.name} is gone, in the middle of {what}")
            limit_s = self._limits.call_s
            raise EnvTimeoutError(
                f"MCP server {self.config.name}: {what} took longer than env.args.call_timeout_s={limit_s:g}"
            )
        finally:
            if not asked.done():
                asked.cancel()
                with contextlib.suppress(BaseException):  # it was given up: how it ends is of no interest
                    await asked

    async def close(self) -> None:
        """End the connection and its server. One that takes too long is cancelled."""
        self._stop.set()
        await asyncio.wait({self._task}, timeout=self._limits.call_s)
        if not self._task.done():
            self._task.cancel()


def by_tool(listed: Sequence[tuple[ServerConfig, Sequence[Mapping[str, Any]]]]) -> dict[str, str]:
    """Return tool → server. Raises ConfigError when two servers have tools of one name."""
    found: dict[str, str] = {}
    for config, tools in listed:
        for tool in tools:
            name = str(tool["function"]["name"])
            if name in found:
                raise ConfigError(
                    f"env.args.servers: {found[name]} and {config.name} both have a tool {name}; leave one of them out "
                    "with env.args.tools"
                )
            found[name] = config.name
    return found
