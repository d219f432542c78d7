"""The turn grammar: strict, total, and clear about what is wrong."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from envs import actions
from envs.actions import Block, Malformed, ToolCall, cut_text, parse_block, parse_tool_calls

PIECES = ["<python>", "</python>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<think>", "{", "}", '"']
PIECES += [
    '{"name": "f", "arguments": {}}',
    "[",
    "\x00",
    "\x1b[31m",
    "\ud800",
    "\u2028",
    "�",
    "NaN",
    "1e999",
    "9" * 5000,
]
TEXTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=8)), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so <python> 1 + 1 </python>", Block("python", "1 + 1")),
        ("<answer>7</answer>\n", Block("answer", "7")),
        ("if a < b then <think> x </think> <answer> 7 </answer>", Block("answer", "7")),
        ("<python>\nif x <= 3:\n  y\n</python>", Block("python", "if x <= 3:\n  y")),
        ("", Malformed(actions.NO_BLOCK)),
        ("7", Malformed(actions.NO_BLOCK)),
        ("< answer > 7 </ answer >", Malformed(actions.NO_BLOCK)),
        ("<answer> 7", Malformed(actions.UNCLOSED)),
        ("7 </answer>", Malformed(actions.UNOPENED)),
        ("<answer> 7 </python>", Malformed(actions.NESTED)),
        ("<python> <answer> 7 </answer> </python>", Malformed(actions.NESTED)),
        ("<answer> 7 </answer> <answer> 8 </answer>", Malformed(actions.TWO_BLOCKS)),
        ("<answer> 7 </answer> done", Malformed(actions.TRAILING)),
        ("<answer> </answer>", Malformed(actions.EMPTY)),
        ("x" * 100_000 + "<answer> 7 </answer>", Malformed(actions.TOO_LONG)),
    ],
)
def test_blocks(text: str, expected: Block | Malformed) -> None:
    assert parse_block(text, ("python", "answer")) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("all done", ()),
        ("", ()),
        ('<tool_call>{"name": "f"}</tool_call>', (ToolCall("f", {}),)),
        (
            'so <tool_call> { "name" : "f" , "arguments" : { "a" : { "b" : [ 1 , "}" ] } } } </tool_call>',
            (ToolCall("f", {"a": {"b": [1, "}"]}}),),
        ),
        (
            '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            (ToolCall("f", {}), ToolCall("g", {})),
        ),
        ('<tool_call>{"name": "f"}', Malformed(actions.UNCLOSED)),
        ('{"name": "f"}</tool_call>', Malformed(actions.UNOPENED)),
        ('</tool_call><tool_call>{"name": "f"}</tool_call>', Malformed(actions.UNOPENED)),
        ('<tool_call>{"name": "f"}</tool_call> ok', Malformed(actions.TRAILING)),
        ('<tool_call>{"name": "f"</tool_call>', Malformed(actions.NOT_JSON)),
        ("<tool_call>f(1)</tool_call>", Malformed(actions.NOT_JSON)),
        ('<tool_call>{"name": "f", "name": "g"}</tool_call>', Malformed(actions.NOT_JSON)),
        ('<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>', Malformed(actions.NOT_JSON)),
        ('<tool_call>{"name": "\\ud800"}</tool_call>', Malformed(actions.NOT_JSON)),
        ("<tool_call>" + "[" * 9_000 + "</tool_call>", Malformed(actions.NOT_JSON)),
        ('<tool_call>["f"]</tool_call>', Malformed(actions.NOT_OBJECT)),
        ('<tool_call>{"arguments": {}}</tool_call>', Malformed(actions.BAD_NAME)),
        ('<tool_call>{"name": ["f"]}</tool_call>', Malformed(actions.BAD_NAME)),
        ('<tool_call>{"name": "f", "arguments": "{}"}</tool_call>', Malformed(actions.BAD_ARGUMENTS)),
        ('<tool_call>{"name": "f", "args": {}}</tool_call>', Malformed(actions.EXTRA_KEYS)),
        ("<tool_call> </tool_call>", Malformed(actions.EMPTY)),
        ('<tool_call>{"name": "f"}</tool_call>' * 9, Malformed(actions.TOO_MANY_CALLS)),
        ("x" * 100_000, Malformed(actions.TOO_LONG)),
    ],
)
def test_tool_calls(text: str, expected: tuple[ToolCall, ...] | Malformed) -> None:
    assert parse_tool_calls(text) == expected


@given(TEXTS)
def test_parsing_is_total_and_says_what_is_wrong(text: str) -> None:
    block = parse_block(text, ("python", "answer"))
    if isinstance(block, Malformed):
        assert block.reason in actions.REASONS
    else:
        assert text.rstrip().endswith(f"</{block.tag}>")
        assert block.content == block.content.strip() != ""
    calls = parse_tool_calls(text)
    if isinstance(calls, Malformed):
        assert calls.reason in actions.REASONS
    else:
        assert len(calls) == text.count("<tool_call>")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(st.characters(codec="utf-8"), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), JSON, max_size=3))
def test_what_was_written_as_json_is_read_back(arguments: dict) -> None:
    body = json.dumps({"name": "f", "arguments": arguments})
    if "tool_call>" not in body:
        assert parse_tool_calls(f"<tool_call>{body}</tool_call>") == (ToolCall("f", arguments),)


@given(st.text(max_size=50), st.integers(1, 30))
def test_cut_text_is_bounded_and_free_of_control_characters(text: str, limit: int) -> None:
    cut = cut_text(text, max_chars=limit)
    assert len(cut) <= limit + len(" [ cut ]")
    assert not [c for c in cut if (c < " " and c not in "\n\t") or "\x7f" <= c <= "\x9f"]
    assert cut.endswith(" [ cut ]") or len(text) <= limit
