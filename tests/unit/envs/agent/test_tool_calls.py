"""What an agent is told of a turn: content, reasoning and calls, in the syntaxes of several models."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs.agent.messages import Call, ModelRequest
from envs.agent.tool_calls import cut_at_stop, read_calls, read_turn, split_reasoning
from trace_async.types import Completion, PolicyTurn, TurnLimits, VersionSpan

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"n": {"type": "integer"}, "word": {"type": "string"}}},
    },
}
HERMES = '<tool_call>\n{"name": "add", "arguments": {"n": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (HERMES, "", [("add", {"n": 1})]),
        (f"first this\n{HERMES}\n{HERMES}", "first this", [("add", {"n": 1}), ("add", {"n": 1})]),
        (
            "<tool_call>\n<function=add>\n<parameter=n>\n7\n</parameter>\n<parameter=word>\n7\n</parameter>\n"
            "</function>\n</tool_call>",
            "",
            [("add", {"n": 7, "word": "7"})],
        ),
        ('{"name": "add", "parameters": {"n": 2}}', "", [("add", {"n": 2})]),
        ('<|python_tag|>{"name": "add", "parameters": {"n": 2}}<|eom_id|>', "", [("add", {"n": 2})]),
        ('so [TOOL_CALLS] [{"name": "add", "arguments": {"n": 3}}]', "so", [("add", {"n": 3})]),
    ],
)
def test_calls_are_read_in_the_syntax_of_the_model(text: str, content: str, calls: list):
    found, read = read_calls(text, [TOOL])
    assert (found, [(call.name, json.loads(call.arguments)) for call in read]) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "just words",
        "<tool_call>",
        '<tool_call>{"name": "add"',
        '<tool_call>{"name": 3}</tool_call>',
        f"{HERMES} and more words",
        "<tool_call><function=add><parameter=n>1</parameter></tool_call>",
        "<function=add></function>",
        '{"answer": 3}',
        '[{"name": "add", "arguments": {}}, 4]',
        "[1, 2]",
        "[" * 50_000,
        "[TOOL_CALLS] nothing",
    ],
)
def test_what_does_not_keep_to_the_syntax_stays_text(text: str):
    assert read_calls(text, [TOOL]) == (text, ())


@given(st.text(alphabet='<>/{}[]"functio=tool_callname:,paremguts ', max_size=60))
def test_no_text_breaks_the_reader(text: str):
    read_calls(text, [TOOL])
    split_reasoning(text)


def test_thoughts_are_told_apart_from_what_is_said():
    assert split_reasoning("<think>\nhm\n</think>\n\nyes") == ("hm", "yes")
    assert split_reasoning("hm\n</think>\n\nyes") == ("hm", "yes")  # the template wrote <think> itself
    assert split_reasoning("<think> cut in the mid") == ("cut in the mid", "")
    assert split_reasoning(" yes ") == ("", " yes ")


def test_a_stop_string_and_what_follows_are_not_told():
    assert cut_at_stop("one STOP two END", ["END", "STOP"]) == "one "
    assert cut_at_stop("one", ["", "x"]) == "one"


def turn(text: str, message: dict | None = None) -> PolicyTurn:
    completion = Completion(
        token_ids=(5, 6),
        logprobs=(-0.1, -0.2),
        version_spans=(VersionSpan(0, 0),),
        finish_reason="length",
        prompt_tokens=3,
        cached_tokens=0,
    )
    return PolicyTurn(
        text=text, truncated=True, completion=completion, decode=lambda ids: f"t{ids[0]}", message=message
    )


def test_a_turn_is_told_as_the_request_asked():
    asked = ModelRequest(messages=(), tools=(TOOL,), limits=TurnLimits(stop=("!",)), wants_logprobs=True)
    answer = read_turn(turn(f"<think>a</think>{HERMES}! rest"), asked, number=4, created=9)
    assert (answer.number, answer.content, answer.reasoning) == (4, "", "a")
    assert answer.calls == (Call("add", '{"n": 1}'),)
    assert (answer.is_cut, answer.prompt_tokens, answer.completion_tokens) == (True, 3, 2)
    assert answer.pieces == (("t5", -0.1), ("t6", -0.2))


def test_without_tools_or_with_tool_choice_none_a_call_is_only_text():
    for asked in (ModelRequest(messages=()), ModelRequest(messages=(), tools=(TOOL,), may_call=False)):
        answer = read_turn(turn(HERMES), asked, number=0, created=0)
        assert (answer.content, answer.calls, answer.pieces) == (HERMES, (), ())


def test_a_tokenizers_own_response_template_is_believed_before_the_known_syntaxes():
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"n": 2}}}]
    asked = ModelRequest(messages=(), tools=(TOOL,))
    answer = read_turn(turn("‹add n=2›", {"content": "so", "tool_calls": calls}), asked, number=0, created=0)
    assert (answer.content, answer.calls) == ("so", (Call("add", '{"n": 2}'),))
