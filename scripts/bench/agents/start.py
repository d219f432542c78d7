"""What a rollout costs that starts a process: as a command, and forked from an interpreter that has imported the agent.

    python -m scripts.bench.agents.start openai_agents_sdk pydantic_ai_agent --rollouts 8

Agents are those of `docs/agents/`, in `.venvs/agents` (`scripts/setup_agents.sh`). Each rollout is played alone: it
asks, is told to look once, asks again and is given its last words. Processor time is that of all its processes; that of
the interpreter that forks is shared out over all rollouts.
"""

import argparse
import asyncio
import time
from pathlib import Path

import psutil

from envs.agent.example import Follow
from trace_async.types import Prompt

AGENTS = Path("docs/agents").absolute()
PYTHON = Path(".venvs/agents/bin/python").absolute()


async def measure(framework: str, way: str, num_rollouts: int) -> dict[str, float]:
    """Seconds by the clock, and of the processors, of a rollout; both with the first one, which imports, apart."""
    if way == "command":
        domain = Follow(command=[str(PYTHON), str(AGENTS / f"{framework}.py")])
    else:
        domain = Follow(agent=f"{framework}:solve", python=str(PYTHON), cwd=str(AGENTS))
    clock: list[float] = []
    tasks = [task for task in domain.tasks("train") if task.data["hops"] == 1][: num_rollouts + 1]
    before = 0.0
    try:
        for number, task in enumerate(tasks):
            if number == 1:
                before = _children_s()
            started = time.perf_counter()
            env = domain.make_env(task)
            prompt = await env.init()
            call = f'<tool_call> {{"name": "look", "arguments": {{"place": "{task.data["start"]}"}}}} </tool_call>'
            await env.step(call)
            ended = await env.step(last_words(prompt, f"at {task.data['answer']}"))
            assert ended.reward == 1.0
            await env.close()
            clock.append(time.perf_counter() - started)
        running_s = _running_s()
    finally:
        await domain.close()
    spent_s = _children_s() - before if way == "command" else running_s / len(tasks) * num_rollouts
    return {
        "first_s": clock[0],
        "clock_s": sum(clock[1:]) / num_rollouts,
        "cpu_s": spent_s / num_rollouts,
    }


def last_words(prompt: Prompt, text: str) -> str:
    """As the agent wants them: in words, or by the tool that it brings for them."""
    for tool in prompt.tools:
        function = tool.get("function")
        if isinstance(function, dict) and function.get("name") == "final_answer":
            return f'<tool_call> {{"name": "final_answer", "arguments": {{"answer": "{text}"}}}} </tool_call>'
    return text


def _children_s() -> float:
    """Processor seconds of processes of ours that have ended."""
    times = psutil.Process().cpu_times()
    return times.children_user + times.children_system


def _running_s() -> float:
    """Of those that run, their own ended children included: the interpreter that forks."""
    return sum(
        times.user + times.system + times.children_user + times.children_system
        for times in (process.cpu_times() for process in psutil.Process().children())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("frameworks", nargs="+")
    parser.add_argument("--rollouts", type=int, default=8)
    args = parser.parse_args()
    for framework in args.frameworks:
        for way in ("command", "fork"):
            figures = asyncio.run(measure(framework, way, args.rollouts))
            print(f"{framework:<20} {way:<8} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
