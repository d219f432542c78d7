"""The turn grammar of search agents: a free thought, then one action `search [ query ]` or `answer [ text ]`."""

import re
from dataclasses import dataclass
from typing import Literal

from envs.actions import EMPTY, MAX_ACTION_CHARS, NO_BLOCK, TOO_LONG, TRAILING, TWO_BLOCKS, Malformed

UNCLOSED_BRACKET = "the bracket is not closed"

_ACTION = re.compile(r"(?<!\w)(search|answer)\s*\[", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class SearchAction:
    """The action of a turn."""

    name: Literal["search", "answer"]
    """What is to be done."""
    text: str
    """The query or the answer, never blank."""


def parse_search_action(turn: str) -> SearchAction | Malformed:
    """Return the one action that ends the turn; brackets inside its text must be balanced. Never raises."""
    if len(turn) > MAX_ACTION_CHARS:
        return Malformed(TOO_LONG)
    found = _ACTION.search(turn)
    if found is None:
        return Malformed(NO_BLOCK)
    end = _closing_bracket(turn, found.end())
    if end is None:
        return Malformed(UNCLOSED_BRACKET)
    rest = turn[end + 1 :]
    if _ACTION.search(rest):
        return Malformed(TWO_BLOCKS)
    if rest.strip():
        return Malformed(TRAILING)
    text = " ".join(turn[found.end() : end].split())
    if not text:
        return Malformed(EMPTY)
    return SearchAction("search" if found[1].lower() == "search" else "answer", text)


def _closing_bracket(text: str, start: int) -> int | None:
    depth = 1
    for position in range(start, len(text)):
        if text[position] == "[":
            depth += 1
        elif text[position] == "]":
            depth -= 1
            if depth == 0:
                return position
    return None
