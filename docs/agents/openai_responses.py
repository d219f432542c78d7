"""The same agent with `openai-agents` over the responses API, streamed. Its model is where OPENAI_BASE_URL says."""

import asyncio
import json
import sys

from agents import Agent, OpenAIResponsesModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


async def run(agent: Agent, question: str):
    result = Runner.run_streamed(agent, question, max_turns=12)
    async for _ in result.stream_events():
        pass
    return result


def solve(task: dict) -> str:
    set_tracing_disabled(True)  # it would report every run to api.openai.com

    @function_tool
    def look(place: str) -> str:
        """the place that the sign at a place points to"""
        return task["signs"].get(place, "nothing")

    model = OpenAIResponsesModel(model="policy", openai_client=AsyncOpenAI())
    agent = Agent(name="follow", instructions="follow the signs", model=model, tools=[look])
    result = asyncio.run(run(agent, f"go {task['hops']} signs from {task['start']}"))
    return result.final_output


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
