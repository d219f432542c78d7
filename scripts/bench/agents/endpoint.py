"""How much time a turn takes beside the engine: agents over the endpoint, with an engine that answers at once.

    python -m scripts.bench.agents.endpoint --rollouts 500 --turns 8

Every rollout is an agent in plain HTTP that asks `--turns` times; its history grows by a tool's answer each turn. What
is measured is everything but the engine: HTTP both ways, JSON, finding the place in the record, the agent's own work.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

from envs.agent.domain import Agent
from envs.agent.example import LOOK
from envs.agent.verifier import Outcome

ANSWER = '<tool_call>\n{"name": "look", "arguments": {"place": "p1"}}\n</tool_call>'


async def asker(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Be an agent whose tool answers with 200 characters."""
    messages: list[Any] = [{"role": "system", "content": "x" * 500}, {"role": "user", "content": str(task["id"])}]
    async with aiohttp.ClientSession(headers={"authorization": f"Bearer {api_key}"}) as client:
        for _ in range(int(task["turns"])):
            body = {"model": "policy", "messages": messages, "tools": [LOOK]}
            async with client.post(f"{base_url}/chat/completions", json=body) as response:
                message = (await response.json())["choices"][0]["message"]
            messages += [message, {"role": "tool", "tool_call_id": "c", "content": "y" * 200}]
    return "done"


def passed(task: Mapping[str, Any], outcome: Outcome) -> bool:
    return True


async def measure(num_rollouts: int, num_turns: int) -> dict[str, float]:
    """Milliseconds of a turn: of a rollout alone (median), and with all at once, by the clock and of the CPU (which a
    busy machine does not change). Agents and endpoint share the process, so both are in it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tasks.jsonl"
        rows = [{"id": f"{number}", "turns": num_turns} for number in range(num_rollouts + 1)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        here = "scripts.bench.agents.endpoint"
        domain = Agent(
            tasks=str(path), num_heldout=1, agent=f"{here}:asker", verifier=f"{here}:passed", max_turns=num_turns + 1
        )
        tasks = domain.tasks("train")
        alone: list[float] = []
        await _play(domain, tasks[0], [])
        await _play(domain, tasks[0], alone)
        seconds: list[float] = []
        started, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(_play(domain, task, seconds) for task in tasks))
        took, cpu = time.perf_counter() - started, time.process_time() - cpu
        await domain.close()
    return {
        "alone_ms": 1000 * statistics.median(alone),
        "at_once_ms_a_turn": 1000 * took / len(seconds),
        "at_once_cpu_ms_a_turn": 1000 * cpu / len(seconds),
        "turns_per_s": len(seconds) / took,
    }


async def _play(domain: Agent, task: Any, seconds: list[float]) -> None:
    env = domain.make_env(task)
    try:
        await env.init()
        done = False
        while not done:
            started = time.perf_counter()
            done = (await env.step(ANSWER)).done
            seconds.append(time.perf_counter() - started)
    finally:
        await env.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=500)
    parser.add_argument("--turns", type=int, default=8)
    args = parser.parse_args()
    for name, value in asyncio.run(measure(args.rollouts, args.turns)).items():
        print(f"{name:<24} {value:8.2f}")


if __name__ == "__main__":
    main()
