"""The same agent with `smolagents`. Its model is where OPENAI_BASE_URL says."""

import json
import os
import sys

from smolagents import OpenAIServerModel, ToolCallingAgent, tool
from smolagents.monitoring import LogLevel


def solve(task: dict) -> str:

    @tool
    def look(place: str) -> str:
        """the place that the sign at a place points to

        Args:
            place: where the sign stands
        """
        return task["signs"].get(place, "nothing")

    model = OpenAIServerModel("policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"])
    agent = ToolCallingAgent(tools=[look], model=model, max_steps=8, verbosity_level=LogLevel.OFF)
    return agent.run(f"go {task['hops']} signs from {task['start']}")


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
