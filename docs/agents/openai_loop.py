"""A plain loop over the `openai` client. It knows nothing of training: its model is where OPENAI_BASE_URL says."""

import json
import sys

from openai import OpenAI

LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "the place that the sign at a place points to",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}


def solve(task: dict) -> str:
    client = OpenAI()
    messages = [
        {"role": "system", "content": "follow the signs"},
        {"role": "user", "content": f"go {task['hops']} signs from {task['start']}"},
    ]
    while True:
        answer = client.chat.completions.create(model="policy", messages=messages, tools=[LOOK])
        message = answer.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            return message.content
        for call in message.tool_calls:
            place = json.loads(call.function.arguments).get("place")
            found = task["signs"].get(place, "nothing")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


if __name__ == "__main__":
    print(solve(json.load(sys.stdin)))
