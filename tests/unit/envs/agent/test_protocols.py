"""The other two protocols of the endpoint: requests read into the same form, answers written whole and streamed."""

import json
from typing import Any

import pytest

from envs.agent.endpoint.anthropic import read_anthropic, stream_anthropic, write_anthropic
from envs.agent.endpoint.responses import read_responses, stream_responses, write_responses
from envs.agent.messages import Answer, Call, ChatMessage, RequestError

ANSWER = Answer(
    number=1,
    content="so",
    reasoning="",
    calls=(Call("look", '{"place": "p1"}'),),
    is_cut=False,
    prompt_tokens=5,
    completion_tokens=4,
    pieces=(),
    created=9,
)
SCHEMA = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "look", "description": "d", "parameters": SCHEMA}}


def events(lines) -> list[dict[str, Any]]:
    return [json.loads(line.split("data: ", 1)[1]) for line in "".join(lines).strip().split("\n\n")]


def test_anthropics_blocks_become_messages():
    body = {
        "max_tokens": 7,
        "system": [{"type": "text", "text": "be"}],
        "stop_sequences": ["x"],
        "tools": [{"name": "look", "description": "d", "input_schema": SCHEMA}],
        "temperature": 0.5,
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": "hm"},
                    {"type": "text", "text": "so"},
                    {"type": "tool_use", "id": "call_0_0", "name": "look", "input": {"place": "p1"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "call_0_0", "content": [{"type": "text", "text": "p2"}]},
                    {"type": "text", "text": "and now"},
                ],
            },
        ],
    }
    asked, notes = read_anthropic(body)
    assert asked.messages == (
        ChatMessage("system", "be"),
        ChatMessage("user", "go"),
        ChatMessage("assistant", "so", (Call("look", '{"place": "p1"}'),)),
        ChatMessage("tool", "p2"),
        ChatMessage("user", "and now"),
    )
    assert asked.tools == (TOOL,)
    assert (asked.limits.max_new_tokens, asked.limits.stop) == (7, ("x",))
    assert notes == ["temperature=0.5 is not used, the run's own sampling is"]


def test_anthropics_answer_whole_and_streamed_says_the_same():
    whole = write_anthropic(ANSWER, "m")
    assert whole["content"] == [
        {"type": "text", "text": "so"},
        {"type": "tool_use", "id": "call_1_0", "name": "look", "input": {"place": "p1"}},
    ]
    assert (whole["stop_reason"], whole["usage"]) == ("tool_use", {"input_tokens": 5, "output_tokens": 4})
    told = events(stream_anthropic(ANSWER, "m"))
    assert [event["type"] for event in told] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 2,
        "message_delta",
        "message_stop",
    ]
    assert told[2]["delta"] == {"type": "text_delta", "text": "so"}
    assert json.loads(told[5]["delta"]["partial_json"]) == {"place": "p1"}
    assert told[-2]["delta"]["stop_reason"] == "tool_use"


def test_items_of_the_responses_api_become_messages_and_a_turn_is_one_of_them():
    body = {
        "instructions": "be",
        "max_output_tokens": 7,
        "tools": [{"type": "function", "name": "look", "description": "d", "parameters": SCHEMA, "strict": True}],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "go"}]},
            {"type": "reasoning", "summary": []},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "so"}]},
            {"type": "function_call", "call_id": "call_0_0", "name": "look", "arguments": "{}"},
            {"type": "function_call", "call_id": "call_0_1", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_0_0", "output": "p2"},
            {"type": "function_call_output", "call_id": "call_0_1", "output": "p3"},
        ],
    }
    asked, notes = read_responses(body)
    assert asked.messages == (
        ChatMessage("system", "be"),
        ChatMessage("user", "go"),
        ChatMessage("assistant", "so", (Call("look", "{}"), Call("look", "{}"))),
        ChatMessage("tool", "p2"),
        ChatMessage("tool", "p3"),
    )
    assert (asked.tools, asked.limits.max_new_tokens, notes) == ((TOOL,), 7, [])
    assert read_responses({"input": "go"})[0].messages == (ChatMessage("user", "go"),)


def test_a_response_whole_and_streamed_says_the_same():
    whole = write_responses(ANSWER, "m", {})
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]
    assert (whole["output"][1]["call_id"], whole["output"][1]["arguments"]) == ("call_1_0", '{"place": "p1"}')
    told = events(stream_responses(ANSWER, "m", {}))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    assert (told[0]["type"], told[-1]["type"], told[-1]["response"]) == (
        "response.created",
        "response.completed",
        whole,
    )
    done = [event["item"] for event in told if event["type"] == "response.output_item.done"]
    assert done == whole["output"]


@pytest.mark.parametrize(
    ("read", "body", "words"),
    [
        (read_anthropic, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a block of type image"),
        (read_anthropic, {"messages": [{"role": "king", "content": "x"}]}, "user or assistant, not king"),
        (read_anthropic, {"messages": []}, "there are none"),
        (read_anthropic, {}, "messages: Field required"),
        (read_responses, {"input": "x", "previous_response_id": "r"}, "nothing is stored"),
        (read_responses, {"input": "x", "tools": [{"type": "web_search"}]}, "one of type web_search"),
        (read_responses, {"input": "x", "text": {"format": {"type": "json_schema"}}}, "not constrained"),
        (read_responses, {"input": [{"type": "image_call"}]}, "an item of type image_call"),
        (read_responses, {"input": "x", "max_output_tokens": 0}, "max_output_tokens=0: must be ≥ 1"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(read, body: dict, words: str):
    with pytest.raises(RequestError, match=words):
        read(body)
