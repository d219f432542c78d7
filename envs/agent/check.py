"""Check whether an agent can be replayed.

It is run with calls of its own tools, and then twice more from the record. A finding says where the runs part.
"""

import json
import re
from collections.abc import Mapping, Sequence
from random import Random

from envs.agent.env import AgentEnv
from envs.contract.plays import Finding
from trace_async.env import Domain, EnvError, ReplayDivergedError
from trace_async.types import Json, Prompt, StepResult, Task

_NUM_TURNS = 4
_NUM_REPLAYS = 2


async def check_replay(domain: Domain, tasks: Sequence[Task], seed: int = 0) -> list[Finding]:
    """Return a finding for each task whose replay parts, and one that counts the calls that came out the same."""
    findings, num_calls, num_tools = [], 0, 0
    for task in tasks:
        env = domain.make_env(task)
        assert isinstance(env, AgentEnv)
        try:
            calls, tools = await _check_task(env, task, Random(f"{seed}-{task.id}"))
        except ReplayDivergedError as error:
            findings.append(
                Finding("error", f"task {task.id} cannot be replayed, so not continued by Stage 2: {error}")
            )
        except EnvError as error:
            findings.append(Finding("error", f"task {task.id}: {error}"))
        else:
            num_calls, num_tools = num_calls + calls, num_tools + tools
        finally:
            await env.close()
    findings.append(
        Finding("info", f"{num_calls} calls were replayed and came out the same, {num_tools} of them of tools")
    )
    return findings


async def _check_task(env: AgentEnv, task: Task, rng: Random) -> tuple[int, int]:
    """Return (calls replayed, calls of tools among them). Raises ReplayDivergedError with the place where it parts."""
    turns = tool_turns(await env.init(), task, rng)
    result: StepResult | None = None
    played: list[str] = []
    state: AgentEnv | None = None
    for turn in turns:
        result = await env.step(turn)
        played.append(turn)
        if result.done:
            break
        state = await env.fork()
    if state is None:
        return 0, 0
    for _ in range(_NUM_REPLAYS):
        again = await state.fork()
        await again.close()
    # The turn that ended the agent comes after `state`, so no replay makes its call.
    num_calls = len(played) - bool(result and result.done)
    return num_calls * _NUM_REPLAYS, sum("<tool_call>" in turn for turn in played[:num_calls]) * _NUM_REPLAYS


def tool_turns(prompt: Prompt, task: Task, rng: Random) -> list[str]:
    """Write turns as a model might: calls of the agent's tools with arguments that fit their schemas."""
    functions = [function for tool in prompt.tools if isinstance(function := tool.get("function"), dict)]
    words = re.findall(r"\w+", json.dumps(task.data)) or ["a"]
    if not functions:
        return [" ".join(rng.choices(words, k=3)) for _ in range(_NUM_TURNS)]
    turns = []
    for number in range(_NUM_TURNS):
        function = functions[number % len(functions)]
        call = {"name": function.get("name"), "arguments": _arguments(function.get("parameters"), words, rng)}
        turns.append(f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
    return turns


def _arguments(schema: Json, words: Sequence[str], rng: Random) -> dict[str, Json]:
    if not isinstance(schema, Mapping) or not isinstance(properties := schema.get("properties"), Mapping):
        return {}
    required = schema.get("required")
    names = required if isinstance(required, list) else list(properties)
    return {str(name): _value(properties.get(str(name)), words, rng) for name in names}


def _value(schema: Json, words: Sequence[str], rng: Random) -> Json:
    """Return a value of the kind that a JSON schema asks for."""
    if not isinstance(schema, Mapping):
        return rng.choice(words)
    if isinstance(choices := schema.get("enum"), list) and choices:
        return rng.choice(choices)
    plain: dict[Json, Json] = {"integer": rng.randint(0, 9), "number": rng.randint(0, 9) / 2, "boolean": True}
    kind = schema.get("type")
    if kind in plain:
        return plain[kind]
    if kind == "array":
        return [_value(schema.get("items"), words, rng)]
    return _arguments(schema, words, rng) if kind == "object" else rng.choice(words)
