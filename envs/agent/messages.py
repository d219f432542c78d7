"""What an agent asks and what it is answered, in one form for all the protocols that the endpoint speaks."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from trace_async.types import Json, Message, Role, TurnLimits


class RequestError(ValueError):
    """The endpoint does not do what a request asks for; the words go to the agent as an HTTP error of 400."""


@dataclass(frozen=True, slots=True)
class Call:
    """A tool call. `arguments` is JSON text, as all the protocols carry it."""

    name: str
    arguments: str

    def normal(self) -> str:
        """The call in one spelling, whatever white space and order of keys a client gave its JSON."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except ValueError:
            arguments = self.arguments
        return json.dumps([self.name, arguments], sort_keys=True)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of a conversation. `calls`: only of the assistant."""

    role: Role
    content: str
    calls: tuple[Call, ...] = ()

    def as_text(self) -> Message:
        """The message for a chat template; tool calls that the policy did not write stand in the Hermes form."""
        calls = [
            f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}\n</tool_call>'
            for call in self.calls
        ]
        return Message(role=self.role, content="\n".join([self.content, *calls] if self.content else calls))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRequest:
    """One request of an agent. `may_call`: tool calls are read out of the answer (not with `tool_choice: none`).

    `wants_logprobs`: the answer has `pieces`.
    """

    messages: tuple[ChatMessage, ...]
    tools: tuple[Mapping[str, Json], ...] = ()
    limits: TurnLimits = field(default_factory=TurnLimits)
    may_call: bool = True
    wants_logprobs: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A turn of the policy as an agent is told it. `number` counts the turns of the rollout from 0.

    `content` is what is left beside `reasoning` and `calls`. `pieces`: the text and the log-probability of each
    token, when they were asked for. `created`: seconds since 1970, kept so that a replay tells the agent the
    same. `token_ids`: all that the policy wrote but the token that ends a turn.
    """

    number: int
    content: str
    reasoning: str
    calls: tuple[Call, ...]
    is_cut: bool
    prompt_tokens: int
    completion_tokens: int
    pieces: tuple[tuple[str, float], ...]
    created: int
    token_ids: tuple[int, ...] = ()

    def call_id(self, index: int) -> str:
        """The same id in every replay, another one for every call of a rollout."""
        return f"call_{self.number}_{index}"


def check_order(messages: Sequence[ChatMessage]) -> None:
    """Raises RequestError where no turn of the assistant can follow."""
    if not messages:
        raise RequestError("messages: there are none")
    if messages[-1].role == "assistant":
        raise RequestError("messages: the last one is the assistant's; end with a user or tool message")
