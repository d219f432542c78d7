"""The same agent over the `anthropic` client. Its model is where ANTHROPIC_BASE_URL says."""

import json
import sys

from anthropic import Anthropic

LOOK = {
    "name": "look",
    "description": "the place that the sign at a place points to",
    "input_schema": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
}


def solve(task: dict) -> str:
    client = Anthropic()
    messages = [{"role": "user", "content": f"go {task['hops']} signs from {task['start']}"}]
    while True:
        with client.messages.stream(
            model="policy", system="follow the signs", max_tokens=200, messages=messages, tools=[LOOK]
        ) as stream:
            answer = stream.get_final_message()
        messages.append({"role": "assistant", "content": answer.content})
        calls = [block for block in answer.content if block.type == "tool_use"]
        if not calls:
            return answer.content[0].text
        results = [
            {
                "type": "tool_result",
                "tool_use_id": call.id,
                "content": task["signs"].get(call.input.get("place"), "nothing"),
            }
            for call in calls
        ]
        messages.append({"role": "user", "content": results})


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
