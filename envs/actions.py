"""Read the action out of a turn's text, strictly. Nothing here raises: a Malformed says in words what is wrong.

Two forms: tagged blocks (`<python> … </python>`, `<answer> … </answer>`) and tool calls in the Hermes/Qwen format
(`<tool_call>{"name": …, "arguments": {…}}</tool_call>`). Text before the action is the model's thought and is free.
The reasons are made of plain words between spaces, so that a word-level tokenizer can know each of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trace_async.env import CUT_MARK
from trace_async.types import Json

MAX_ACTION_CHARS = 20_000
"""Longer turns are malformed: nobody means 20 kB of action, and parsing stays cheap."""

TOO_LONG = "the turn is too long"
TRUNCATED = "the turn was cut at its token limit before it ended"
NO_BLOCK = "no action found"
UNCLOSED = "the last tag is not closed"
UNOPENED = "a closing tag comes without its opening tag"
TWO_BLOCKS = "more than one action in the turn"
NESTED = "a tag stands inside another"
TRAILING = "text follows after the action"
EMPTY = "the action is empty"
NOT_JSON = "the tool call is not valid json"
NOT_OBJECT = "the tool call is not a json object"
BAD_NAME = "the tool call has no name"
BAD_ARGUMENTS = "the arguments are not a json object"
EXTRA_KEYS = "the tool call has other keys than name and arguments"
TOO_MANY_CALLS = "too many tool calls in one turn"

REASONS = (
    *(TOO_LONG, TRUNCATED, NO_BLOCK, UNCLOSED, UNOPENED, TWO_BLOCKS, NESTED, TRAILING, EMPTY),
    *(NOT_JSON, NOT_OBJECT, BAD_NAME, BAD_ARGUMENTS, EXTRA_KEYS, TOO_MANY_CALLS),
)


@dataclass(frozen=True, slots=True)
class Malformed:
    """A turn that is no action."""

    reason: str
    """Why: one of REASONS."""


@dataclass(frozen=True, slots=True)
class Block:
    """An action of the form `<tag> content </tag>`."""

    tag: str
    """Which of the allowed tags it is."""
    content: str
    """Without white space around it."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """An action of the form `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

    name: str
    """Of the tool."""
    arguments: Mapping[str, Json]
    """By parameter; the tool's schema is not checked here."""


def parse_block(text: str, tags: Sequence[str]) -> Block | Malformed:
    """Return the one block that ends the turn, with one of `tags`. Other tags (`<think>`, a < b) are plain text."""
    if len(text) > MAX_ACTION_CHARS:
        return Malformed(TOO_LONG)
    found = list(re.finditer(rf"<(/?)({'|'.join(map(re.escape, tags))})>", text))
    if not found:
        return Malformed(NO_BLOCK)
    opening, *rest = found
    if opening[1]:
        return Malformed(UNOPENED)
    if not rest:
        return Malformed(UNCLOSED)
    closing, *more = rest
    if not closing[1] or closing[2] != opening[2]:
        return Malformed(NESTED)
    if more:
        return Malformed(TWO_BLOCKS)
    if text[closing.end() :].strip():
        return Malformed(TRAILING)
    content = text[opening.end() : closing.start()].strip()
    return Block(opening[2], content) if content else Malformed(EMPTY)


def parse_tool_calls(text: str, *, max_calls: int = 8) -> tuple[ToolCall, ...] | Malformed:
    """Return the tool calls of a turn, in order. There are none when the turn only talks to the user."""
    if len(text) > MAX_ACTION_CHARS:
        return Malformed(TOO_LONG)
    calls: list[ToolCall] = []
    rest = text
    while "<tool_call>" in rest:
        before, _, rest = rest.partition("<tool_call>")
        if "</tool_call>" in before:
            return Malformed(UNOPENED)
        body, closing, rest = rest.partition("</tool_call>")
        if not closing:
            return Malformed(UNCLOSED)
        if len(calls) == max_calls:
            return Malformed(TOO_MANY_CALLS)
        call = _parse_call(body)
        if isinstance(call, Malformed):
            return call
        calls.append(call)
    if "</tool_call>" in rest:
        return Malformed(UNOPENED)
    if calls and rest.strip():
        return Malformed(TRAILING)
    return tuple(calls)


def _parse_call(body: str) -> ToolCall | Malformed:
    if not body.strip():
        return Malformed(EMPTY)
    try:
        call = json.loads(body, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
        json.dumps(call, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError):  # also numbers of too many digits, lone surrogates, braces nested too deep
        return Malformed(NOT_JSON)
    if not isinstance(call, dict):
        return Malformed(NOT_OBJECT)
    if not isinstance(call.get("name"), str) or not call["name"]:
        return Malformed(BAD_NAME)
    if not isinstance(call.get("arguments", {}), dict):
        return Malformed(BAD_ARGUMENTS)
    if set(call) - {"name", "arguments"}:
        return Malformed(EXTRA_KEYS)
    return ToolCall(call["name"], call.get("arguments", {}))


def _unique_keys(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key is given twice")
    return keys


def _no_constant(name: str) -> Json:
    raise ValueError(f"{name} is not JSON")


def cut_text(text: str, *, max_chars: int) -> str:
    """Return `text`, or its first `max_chars` characters and a note, without control characters but newline and tab."""
    kept = "".join(c for c in text[: max_chars + 1] if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f"))
    if len(text) <= max_chars:
        return kept
    return kept[:max_chars].rstrip() + CUT_MARK
