"""The requests of agents and their answers, in one form for all the protocols that the endpoint speaks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trace_async.types import Json, Message, Role, TurnLimits


class RequestError(ValueError):
    """The endpoint does not do what a request asks for; the words go to the agent as an HTTP error of 400."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call."""

    name: str
    """Of the tool."""
    arguments: str
    """JSON text, as all the protocols carry it."""

    def normal(self) -> str:
        """Return the call in one spelling, whatever white space and order of keys a client gave its JSON."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = self.arguments
        return json.dumps([self.name, arguments], sort_keys=True)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation."""

    role: Role
    """Who says it."""
    content: str
    """Its text, without the calls."""
    calls: tuple[Call, ...] = ()
    """The assistant's tool calls; empty for other roles."""

    def as_text(self) -> Message:
        """Return the message for a chat template. Calls that the policy did not write are put in the Hermes form."""
        calls = [
            f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
            for call in self.calls
        ]
        return Message(role=self.role, content="\n".join([self.content, *calls] if self.content else calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One request of an agent."""

    messages: tuple[ChatMessage, ...]
    """The conversation up to the turn that is asked for."""
    tools: tuple[Mapping[str, Json], ...] = ()
    """The schemas of the tools that may be called."""
    limits: TurnLimits = field(default_factory=TurnLimits)
    """What ends the turn."""
    may_call: bool = True
    """Tool calls are read out of the answer; not so with `tool_choice: none`."""
    wants_logprobs: bool = False
    """The answer is to have `pieces`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A turn of the policy, as the agent is told it."""

    number: int
    """Which turn of the rollout it is, from 0."""
    content: str
    """Its text without `reasoning` and `calls`."""
    reasoning: str
    """What the policy thought aloud."""
    calls: tuple[Call, ...]
    """The tool calls in it, in order."""
    is_cut: bool
    """It was cut at its limit of tokens."""
    prompt_tokens: int
    """Tokens before the turn."""
    completion_tokens: int
    """Tokens of the turn, the one that ends it included."""
    pieces: tuple[tuple[str, float], ...]
    """Text and log-probability of each token; empty unless they were asked for."""
    created: int
    """Seconds since 1970, kept so that a replay tells the agent the same."""
    token_ids: tuple[int, ...] = ()
    """What the policy wrote, without the token that ends a turn."""

    def call_id(self, index: int) -> str:
        """Return the id of a call: the same in every replay, another one for every call of a rollout."""
        return f"call_{self.number}_{index}"


def check_order(messages: Sequence[ChatMessage]) -> None:
    """Raise RequestError where no turn of the assistant can follow."""
    if not messages:
        raise RequestError("messages: there are none")
    if messages[-1].role == "assistant":
        raise RequestError("messages: the last one is the assistant's; end with a user or tool message")
