"""Find out where a request goes on: which turn of the policy it follows, and what is new in it.

    request 0   system, user                                   → turn 0
    request 1   system, user, assistant, tool                  → follows turn 0; new: tool      → turn 1
    request 2   system, "summary of the above"                 → follows no turn: a conversation of its own

What the policy wrote is known by its place: the assistant's message that stands where turn k was given *is* turn k,
whatever the client did to its text. Several turns given at one place are told apart by text and calls.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field

from envs.agent.messages import Answer, ChatMessage, ModelRequest

_THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a request stands in the conversations of a rollout."""

    key: bytes
    """A digest of all that the request says."""
    after: int | None
    """The number of the policy's turn that it goes on from; None when it begins a conversation."""
    new: tuple[ChatMessage, ...]
    """The messages after that turn, or all of them."""


@dataclass(slots=True)
class Conversation:
    """The turns that were given so far, by the digest of what stood before them."""

    _given_at: dict[bytes, int] = field(default_factory=dict)
    """Digest of a request → the turn that was given to it last."""
    _by_text: dict[tuple[bytes, str], int] = field(default_factory=dict)
    """Digest of a request and text of a turn → the turn: tells apart several that were given to one request."""
    _after: dict[int, bytes] = field(default_factory=dict)
    """Turn → digest of all up to its end."""
    _tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Text of a turn → its tokens."""

    def place(self, request: ModelRequest) -> Place:
        """Return the place of a request. This costs one short digest a message."""
        digest = _digest(b"", json.dumps(request.tools, sort_keys=True))
        after, start, in_echo = None, 0, False
        for number, message in enumerate(request.messages):
            turn = self._turn_at(digest, message) if message.role == "assistant" else None
            if turn is not None:
                digest, after, start, in_echo = self._after[turn], turn, number + 1, True
            elif in_echo and message.role == "assistant":
                start = number + 1  # a client that splits a turn into several messages: still the same turn
            else:
                digest, in_echo = _digest(digest, _normal(message)), False
        return Place(digest, after, request.messages[start:])

    def add(self, key: bytes, answer: Answer) -> None:
        """Remember `answer` as what follows the request `key`."""
        turn = answer.number
        self._given_at[key] = turn
        self._after[turn] = _digest(key, f"turn {turn}")
        said = ChatMessage("assistant", answer.content, answer.calls)
        if answer.token_ids and not answer.reasoning:
            self._tokens[_normal(said)] = answer.token_ids
        for form in (said, ChatMessage("assistant", "", answer.calls)):
            self._by_text[key, _normal(form)] = turn

    def tokens_of(self, message: ChatMessage) -> tuple[int, ...] | None:
        """Return the tokens that the policy wrote when it said this, wherever the message stands now.

        None when the policy did not say it, or thought aloud, which templates leave out when they repeat a turn.
        """
        return self._tokens.get(_normal(message)) if message.role == "assistant" else None

    def _turn_at(self, digest: bytes, message: ChatMessage) -> int | None:
        turn = self._by_text.get((digest, _normal(message)))
        return self._given_at.get(digest) if turn is None else turn


def _normal(message: ChatMessage) -> str:
    """Return a message in one spelling. White space and thoughts may come and go in the assistant's own text alone."""
    content = message.content
    if message.role == "assistant":
        content = " ".join(_THOUGHT.sub("", content).split())
    return json.dumps([message.role, content, [call.normal() for call in message.calls]])


def _digest(before: bytes, text: str) -> bytes:
    return hashlib.blake2b(before + text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
