"""Agents that know nothing of training: they look numbers up with a tool and add them, over plain HTTP.

The task is `{"keys": ["a", "b"], "answer": …}`; the tool `lookup` knows NUMBERS. The last words are the result.
"""

import asyncio
import json
import os
import random
import subprocess
import sys
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp

NUMBERS = {"a": 1, "b": 2, "c": 3}
TOOL: dict[str, Any] = {
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


async def counter(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """Three turns in the words of the tiny policy, whatever it says; `acts` of the task says what goes wrong."""
    acts = task.get("acts")
    if acts == "never_asks":
        return "nothing to ask"
    messages: list[dict[str, Any]] = [{"role": "user", "content": f"w{task['word']}"}]
    for turn in range(3):
        message = (await ask(base_url, api_key, {"model": "any", "messages": messages}))["choices"][0]["message"]
        if turn == 1 and acts == "crashes":
            raise OSError("the agent's disk is full")
        if turn == 1 and acts == "hangs":
            await asyncio.sleep(3600)
        messages += [message, {"role": "user", "content": f"w{50 + turn}"}]
    if acts == "asks_late":
        LATE.append(asyncio.create_task(_asks_late(task, base_url, api_key, messages)))
    return " ".join(message["content"] for message in messages if message["role"] == "assistant")


LATE: list[asyncio.Task[None]] = []


async def _asks_late(task: Mapping[str, Any], base_url: str, api_key: str, messages: list[dict[str, Any]]) -> None:
    """Goes on after its end; what it is told is written to the file that the task names."""
    await asyncio.sleep(0.1)
    try:
        told = str(await ask(base_url, api_key, {"model": "any", "messages": messages}))
    except RuntimeError as error:
        told = str(error)
    with Path(task["told"]).open("a", encoding="utf-8") as file:  # noqa: ASYNC230 a line
        file.write(f"{told}\n")


def mostly_even(task: Mapping[str, Any], outcome: Any) -> float:
    """The verifier of `counter`: more of the words that were said have an even number than an odd one."""
    numbers = [int(word[1:]) for word in str(outcome.result).split() if word[:1] == "w" and word[1:].isdigit()]
    return float(sum(1 if number % 2 == 0 else -1 for number in numbers) > 0)


def right_sum(task: Mapping[str, Any], outcome: Any) -> float:
    """The verifier."""
    return float(str(outcome.result).strip() == str(task["answer"]))


def plain_counter(task: Mapping[str, Any], base_url: str, api_key: str) -> str:
    """`counter` as a command that starts a process of its own beside it; `pids` of the task names the folder where both
    leave their process ids."""
    child = subprocess.Popen(["sleep", "3600"])
    for pid in (os.getpid(), child.pid):
        (Path(task["pids"]) / str(pid)).touch()
    said = asyncio.run(counter(task, base_url, api_key))
    child.kill()
    child.wait()
    return said


def main() -> None:
    """As a command: task on standard input, model in the environment."""
    agent = plain_counter if sys.argv[1:] == ["counter"] else plain_adder
    print(agent(json.load(sys.stdin), os.environ["OPENAI_BASE_URL"], os.environ["OPENAI_API_KEY"]))


if __name__ == "__main__":
    main()
