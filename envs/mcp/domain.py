"""The domain `mcp`: tasks that are solved with the tools of MCP servers. Every rollout has servers of its own.

A turn of the model is either tool calls, or its last words, which the verifier judges. A state is the list of calls
that led to it. So a fork starts the servers anew and repeats these calls, or lets a server restore its own snapshot.
When a repeated call gets another answer than before, the fork has diverged.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from envs.agent.domain import load_function, read_split, words
from envs.agent.messages import Call
from envs.agent.tool_calls import read_calls, split_reasoning
from envs.agent.verifier import CommandVerifier, FunctionVerifier, Outcome
from envs.mcp.servers import CallLimits, Connection, ServerConfig, by_tool
from trace_async.config import ConfigError
from trace_async.env import ReplayDivergedError
from trace_async.types import Json, Message, Prompt, Split, StepResult, Task


@dataclass(frozen=True, slots=True)
class Made:
    """A call that was made."""

    call: Call
    """Name and arguments."""
    answer: str
    """What the server returned, as the model saw it."""


class McpEnv:
    """One rollout. Its servers start when it makes its first call; those of a frozen one when it is first used."""

    blocking = False  # a connection lives in one event loop

    def __init__(self, domain: "Mcp", task: Task, made: Sequence[Made] = (), turns: int = 0) -> None:
        self._domain = domain
        self._task = task
        self._made = list(made)
        self._turns = turns
        self._live: dict[str, Connection] | None = None
        self._is_frozen = False
        self._saved: Mapping[str, str] = {}  # name of a server that can save its state → that state, after `_made`

    async def init(self) -> Prompt:
        tools = await self._domain.listed_tools()
        messages = [Message(role="user", content=str(self._task.data["prompt"]))]
        if self._domain.instructions:
            messages.insert(0, Message(role="system", content=self._domain.instructions))
        return Prompt(messages=tuple(messages), tools=tuple(tools.values()))

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        tools = await self._domain.listed_tools()
        self._turns += 1
        _, content = split_reasoning(action)
        content, calls = read_calls(content, list(tools.values()))
        if not calls and not truncated:
            outcome = Outcome(result=content, error="", answer=content, num_turns=self._turns)
            return self._end(await self._domain.verifier.reward(self._task.data, outcome))
        if self._turns >= self._domain.max_turns:
            return self._end(0.0)
        if not calls:
            return StepResult(messages=(Message(role="user", content="error: the turn was cut before it ended"),))
        answers = [await self._call(call) for call in calls]
        return StepResult(messages=tuple(Message(role="tool", content=answer or "(nothing)") for answer in answers))

    def _end(self, reward: float) -> StepResult:
        metrics = {"requests": float(self._turns), "tool_calls": float(len(self._made))}
        return StepResult(done=True, reward=reward, metrics=metrics)

    async def _call(self, call: Call) -> str:
        answer = await self._answer(call)
        self._made.append(Made(call, answer))
        return answer

    async def _answer(self, call: Call) -> str:
        server = self._domain.server_of.get(call.name)
        if server is None:
            return f"error: there is no tool {call.name}"
        connection = (await self._servers())[server]
        return await connection.call(call.name, json.loads(call.arguments))

    async def _servers(self) -> dict[str, Connection]:
        """Return the rollout's servers. Starts them and brings them to its state where they do not run yet."""
        if self._live is None:
            self._live = {config.name: self._domain.connect(config) for config in self._domain.servers}
            if self._made:
                await self._replay(self._live)
        return self._live

    async def _replay(self, servers: Mapping[str, Connection]) -> None:
        restored = set()
        for name, state in self._saved.items():
            await servers[name].call(servers[name].config.restore, {"state": state})
            restored.add(name)
        for number, made in enumerate(self._made):
            server = self._domain.server_of.get(made.call.name)
            # Nothing to repeat: no server answered, or its state is restored, or it has none.
            if server is None or server in restored or servers[server].config.stateless:
                continue
            again = await servers[server].call(made.call.name, json.loads(made.call.arguments))
            if again != made.answer:
                raise ReplayDivergedError(
                    f"call {number + 1} of the replay, {made.call.name}, answered {made.answer[:120]!r} and now "
                    f"answers {again[:120]!r}"
                )

    async def fork(self) -> "McpEnv":
        """Return the state of a running environment, frozen, or a running environment in the state of a frozen one.

        Raises ReplayDivergedError when repeated calls get other answers than before.
        """
        twin = McpEnv(self._domain, self._task, self._made, self._turns)
        twin._saved = self._saved
        if self._is_frozen:
            try:
                await twin._servers()
            except BaseException:
                await twin.close()
                raise
            return twin
        twin._is_frozen = True
        saved = {}
        for name, connection in (self._live or {}).items():
            if connection.config.save:
                saved[name] = await connection.call(connection.config.save, {})
        if saved:
            twin._saved = saved
        return twin

    async def close(self) -> None:
        """End the servers of this rollout; those that all rollouts share stay."""
        live, self._live = self._live, None
        owned = [connection for connection in (live or {}).values() if not connection.config.stateless]
        await asyncio.gather(*(connection.close() for connection in owned))


class Mcp:
    """The domain in which a model solves tasks with the tools of MCP servers.

    `servers`: name → `command` (a list) or `url`, and what else `ServerConfig` has. `tasks`: a JSONL file whose rows
    have a `prompt`. `heldout`, `num_heldout`, `verifier`: as in the domain `agent`. `tools`: the names of those that
    the model sees; empty: all. `instructions`: the system message. `max_turns`: of the model in a rollout; one that
    needs more ends with reward 0. `call_timeout_s`, `start_timeout_s`, `max_observation_chars`: see `CallLimits`.
    """

    name = "mcp"

    def __init__(
        self,
        *,
        servers: Mapping[str, Mapping[str, Any]],
        tasks: str,
        verifier: str | Sequence[str],
        heldout: str = "",
        num_heldout: int = 100,
        tools: Sequence[str] = (),
        instructions: str = "",
        max_turns: int = 16,
        call_timeout_s: float = 30.0,
        start_timeout_s: float = 30.0,
        verifier_timeout_s: float = 60.0,
        max_observation_chars: int = 4000,
    ) -> None:
        if not servers:
            raise ConfigError("env.args.servers: name at least one, with command or url")
        self.servers = [_server(name, settings) for name, settings in servers.items()]
        bounds = {"max_turns": max_turns, "call_timeout_s": call_timeout_s, "start_timeout_s": start_timeout_s}
        for setting, value in {**bounds, "max_observation_chars": max_observation_chars}.items():
            if not value > 0:
                raise ConfigError(f"env.args.{setting}={value}: must be > 0")
        self._split = read_split(tasks, heldout, num_heldout, self.name)
        for task in (task for split in self._split.values() for task in split):
            if not isinstance(task.data.get("prompt"), str):
                raise ConfigError(f"env.args.tasks={tasks}, task {task.id}: has no prompt")
        self.verifier: FunctionVerifier | CommandVerifier
        if isinstance(verifier, str):
            self.verifier = FunctionVerifier(load_function("verifier", verifier), verifier_timeout_s)
        else:
            self.verifier = CommandVerifier(words("verifier", verifier), verifier_timeout_s)
        self.instructions = instructions
        self.max_turns = max_turns
        self.server_of: dict[str, str] = {}  # tool → server; filled by `listed_tools`
        self._shown = tuple(tools)
        self._limits = CallLimits(start_s=start_timeout_s, call_s=call_timeout_s, max_chars=max_observation_chars)
        self._tools: dict[str, dict[str, Json]] | None = None
        self._shared: dict[str, Connection] = {}

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._split[split]

    def make_env(self, task: Task) -> McpEnv:
        return McpEnv(self, task)

    def connect(self, config: ServerConfig) -> Connection:
        """Return a new connection, or for a stateless server the one that all rollouts share."""
        if not config.stateless:
            return Connection(config, self._limits)
        if config.name not in self._shared:
            self._shared[config.name] = Connection(config, self._limits)
        return self._shared[config.name]

    async def listed_tools(self) -> dict[str, dict[str, Json]]:
        """Return the schemas that the model sees, by name. The servers are asked once."""
        if self._tools is None:
            connections = [self.connect(config) for config in self.servers]
            try:
                listed = [(one.config, await one.tools()) for one in connections]
            finally:
                await asyncio.gather(*(one.close() for one in connections if not one.config.stateless))
            self._tools = self._chosen(listed)
        return self._tools

    def _chosen(self, listed: Sequence[tuple[ServerConfig, Sequence[dict[str, Json]]]]) -> dict[str, dict[str, Json]]:
        hidden = {tool for config, _ in listed for tool in (config.save, config.restore)}

        def name(tool: Mapping[str, Any]) -> str:
            return str(tool["function"]["name"])

        shown = [
            (config, [t for t in tools if name(t) not in hidden and (not self._shown or name(t) in self._shown)])
            for config, tools in listed
        ]
        self.server_of = by_tool(shown)
        missing = set(self._shown) - set(self.server_of)
        if missing:
            raise ConfigError(f"env.args.tools: no server has {', '.join(sorted(missing))}")
        return {name(tool): tool for _, tools in shown for tool in tools}

    async def close(self) -> None:
        """End the connections that all rollouts share."""
        await asyncio.gather(*(connection.close() for connection in self._shared.values()))
        self._shared = {}


def _server(name: str, settings: Mapping[str, Any]) -> ServerConfig:
    values = dict(settings)
    command = values.pop("command", ())
    try:
        config = ServerConfig(
            name=name, command=tuple(words(f"servers.{name}.command", command)) if command else (), **values
        )
    except TypeError as error:
        raise ConfigError(f"env.args.servers.{name}: {error}") from error
    if bool(config.command) == bool(config.url):
        raise ConfigError(f"env.args.servers.{name}: give either command (a list) or url")
    if bool(config.save) != bool(config.restore):
        raise ConfigError(f"env.args.servers.{name}: save and restore go together")
    return config
