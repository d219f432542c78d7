"""The same agent with `openai-agents`. Its model is where OPENAI_BASE_URL says."""

import json
import sys

from agents import Agent, OpenAIChatCompletionsModel, Runner, function_tool, set_tracing_disabled
from openai import AsyncOpenAI


def solve(task: dict) -> str:
    set_tracing_disabled(True)  # it would report every run to api.openai.com

    @function_tool
    def look(place: str) -> str:
        """the place that the sign at a place points to"""
        return task["signs"].get(place, "nothing")

    model = OpenAIChatCompletionsModel(model="policy", openai_client=AsyncOpenAI())
    agent = Agent(name="follow", instructions="follow the signs", model=model, tools=[look])
    result = Runner.run_sync(agent, f"go {task['hops']} signs from {task['start']}", max_turns=12)
    return result.final_output


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
