"""A plain loop over the `openai` client. It knows nothing of training: its model is where OPENAI_BASE_URL says."""

import json
import os
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


def main() -> None:
    task = json.load(sys.stdin)
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
            print(message.content)
            return
        for call in message.tool_calls:
            place = json.loads(call.function.arguments).get("place")
            found = task["signs"].get(place, "nothing")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": found})


if __name__ == "__main__":
    assert os.environ.get("OPENAI_BASE_URL"), "run by trace-async train, which says where the model is"
    main()
