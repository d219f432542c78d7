"""Read a user's own demonstrations, a JSONL file of chats, and turn each into tokens as a rollout would be.

    {"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}

The policy learns what the assistant writes, including the token that ends its turn. Everything else is context.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from trace_async.policy.warm_start import Demonstration
from trace_async.rollout.renderer import Renderer
from trace_async.run.dataset import read_rows
from trace_async.types import Json, Message, Prompt, Role

ROLES: tuple[Role, ...] = get_args(Role)


def read_chats(path: str | Path, renderer: Renderer) -> list[Demonstration]:
    """Return all chats of the file, with weight 1 for the assistant's tokens and 0 for the others.

    Raises ValueError, which names the file and the chat, for a chat without messages, with unknown roles, or without
    an assistant.
    """
    demos = []
    for number, row in enumerate(read_rows(path, {"messages": list}), 1):
        try:
            demos.append(_demonstration(_messages(row["messages"]), renderer))
        except ValueError as error:
            raise ValueError(f"{path}, chat {number}: {error}") from error
    if not demos:
        raise ValueError(f"{path}: there are no chats")
    return demos


def _messages(values: Json) -> list[Message]:
    assert isinstance(values, list)
    found = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("content"), str):
            raise ValueError(f"a message must be an object with a role and a text content, not {str(value)[:80]}")
        role = next((known for known in ROLES if known == value.get("role")), None)
        if role is None:
            raise ValueError(f"role {value.get('role')!r} is none of {', '.join(ROLES)}")
        found.append(Message(role=role, content=str(value["content"])))
    return found


def _demonstration(messages: Sequence[Message], renderer: Renderer) -> Demonstration:
    turns = [index for index, message in enumerate(messages) if message.role == "assistant"]
    if not turns or turns[0] == 0:
        raise ValueError("there must be a prompt and then a message of the assistant")
    tokens = list(renderer.render_prompt(Prompt(messages=tuple(messages[: turns[0]]))))
    weights = [0.0] * len(tokens)
    for turn, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        written = [*renderer.encode_data(messages[turn].content), renderer.stop_token_ids[0]]
        tokens += written
        weights += [1.0] * len(written)
        if following == len(messages):  # what comes after the last turn teaches nothing
            break
        if following == turn + 1:
            raise ValueError(f"messages {turn} and {following} are both the assistant's: put them into one")
        answer = renderer.render_observation(messages[turn + 1 : following], turn_ended=True)
        tokens += answer
        weights += [0.0] * len(answer)
    return Demonstration(np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32))
