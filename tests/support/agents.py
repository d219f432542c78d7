"""Agents that know nothing of training: they look numbers up with a tool and add them, over plain HTTP.

The task is `{"keys": ["a", "b"], "answer": …}`; the tool `lookup` knows NUMBERS. The last words are the result.
"""

import asyncio
import json
import random
import sys
import urllib.request
from collections.abc import Mapping
from typing import Any

import aiohttp

NUMBERS = {"a": 1, "b": 2, "c": 3}
TOOL = {
    "type": "function",
    "function": {
        "name": "lookup",
        "description": "the number of a key",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]},
    },
}


def first_messages(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"role": "system", "content": "You add numbers."},
        {"role": "user", "content": f"sum of {' '.join(task['keys'])}"},
    ]


def body(messages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"model": "any", "messages": messages, "tools": [TOOL], **more}


def use_tools(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool's answers to the calls of a turn."""
    answers = []
    for call in message.get("tool_calls") or []:
        key = json.loads(call["function"]["arguments"]).get("key")
        answers.append({"role": "tool", "tool_call_id": call["id"], "content": str(NUMBERS.get(key, "unknown key"))})
    return answers


async def ask(base_url: str, api_key: str, asked: Mapping[str, Any], **headers: str) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession(headers={"authorization": f"Bearer {api_key}", **headers}) as client,
        client.post(f"{base_url}/chat/completions", json=asked) as response,
    ):
        answer = await response.json()
        if response.status != 200:
            raise RuntimeError(answer["error"]["message"])
        return answer


async def adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    messages = first_messages(task)
    while True:
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        messages.append(message)
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        messages += answers


async def untidy_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Writes the history in its own words: drops contents, dumps arguments anew, forgets the calls' ids."""
    messages = first_messages(task)
    while True:
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        for call in message["tool_calls"]:
            call["function"]["arguments"] = json.dumps(json.loads(call["function"]["arguments"]), indent=4)
        messages.append({"role": "assistant", "content": None, "tool_calls": message["tool_calls"]})
        messages += answers


async def retelling_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Tells the model's turns in its own words, in two messages."""
    messages = first_messages(task)
    while True:
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        messages += [{"role": "assistant", "content": "I looked"}, {"role": "assistant", "content": "something up"}]
        messages += answers


async def random_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Its tool answers something else each time: it cannot be replayed."""
    messages = first_messages(task)
    while True:
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        messages.append(message)
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        messages += [{**answer, "content": str(random.random())} for answer in answers]


def plain_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """The same without asyncio, for threads and commands."""
    messages = first_messages(task)
    while True:
        request = urllib.request.Request(
            f"{base_url}/chat/completions",
            data=json.dumps(body(messages)).encode(),
            headers={"content-type": "application/json", "authorization": f"Bearer {api_key}"},
        )
        with urllib.request.urlopen(request) as response:
            message = json.load(response)["choices"][0]["message"]
        messages.append(message)
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        messages += answers


async def compacting_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Sums its history up after every second turn and goes on from that; the last turn of the model stays."""
    messages = first_messages(task)
    for turn in range(8):
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        messages.append(message)
        answers = use_tools(message)
        if not answers:
            return str(message["content"])
        messages += answers
        if turn % 2:
            messages = [messages[0], {"role": "user", "content": f"turn {turn} is over"}, *messages[-2:]]
    return ""


async def delegating_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Asks for a plan, has a helper look things up in a conversation of its own, and goes on with its own one."""
    messages = first_messages(task)
    plan = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
    helper = [{"role": "user", "content": "help"}]
    found = (await ask(base_url, api_key, body(helper)))["choices"][0]["message"]
    helper += [found, *use_tools(found)]
    told = (await ask(base_url, api_key, body(helper)))["choices"][0]["message"]
    messages += [plan, {"role": "user", "content": f"the helper says {told['content']}"}]
    return str((await ask(base_url, api_key, body(messages)))["choices"][0]["message"]["content"])


async def voting_adder(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Asks the same three times at once and goes on from each of the answers in turn."""
    messages = first_messages(task)
    votes = await asyncio.gather(*(ask(base_url, api_key, body(messages)) for _ in range(3)))
    last = ""
    for vote in votes:
        heard = [*messages, vote["choices"][0]["message"], {"role": "user", "content": "sure?"}]
        last = (await ask(base_url, api_key, body(heard)))["choices"][0]["message"]["content"]
    return last


async def wordy(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Answers the model at length."""
    messages = first_messages(task)
    for _ in range(2):
        message = (await ask(base_url, api_key, body(messages)))["choices"][0]["message"]
        messages += [message, {"role": "user", "content": "word " * 200}]
    return ""


async def sleeper(task: Mapping[str, Any], base_url: str, api_key: str) -> None:
    """Asks nothing and does not end."""
    await asyncio.sleep(3600)


def right_sum(task: Mapping[str, Any], outcome: Any) -> float:
    """The verifier."""
    return float(str(outcome.result).strip() == str(task["answer"]))


def main() -> None:
    """As a command: task on standard input, model in the environment."""
    import os

    print(plain_adder(json.load(sys.stdin), os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]))


if __name__ == "__main__":
    main()
