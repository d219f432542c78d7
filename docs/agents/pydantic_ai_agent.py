"""The same agent with `pydantic-ai`. Its model is where OPENAI_BASE_URL says."""

import json
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel


def solve(task: dict) -> str:
    agent = Agent(OpenAIChatModel("policy"), instructions="follow the signs")

    @agent.tool_plain
    def look(place: str) -> str:
        """the place that the sign at a place points to"""
        return task["signs"].get(place, "nothing")

    return agent.run_sync(f"go {task['hops']} signs from {task['start']}").output


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
