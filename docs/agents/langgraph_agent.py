"""The same agent with `langgraph`. Its model is where OPENAI_BASE_URL says."""

import json
import sys

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


def solve(task: dict) -> str:

    @tool
    def look(place: str) -> str:
        """the place that the sign at a place points to"""
        return task["signs"].get(place, "nothing")

    agent = create_agent(ChatOpenAI(model="policy"), tools=[look], system_prompt="follow the signs")
    asked = {"role": "user", "content": f"go {task['hops']} signs from {task['start']}"}
    result = agent.invoke({"messages": [asked]}, config={"recursion_limit": 24})
    return result["messages"][-1].content


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
