"""Anthropic's messages: a request read, an answer written, whole or as a stream."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.agent.endpoint.chat import ignored_sampling, in_words, positive, read_tool_choice
from envs.agent.messages import Answer, Call, ChatMessage, ModelRequest, RequestError, check_order
from trace_async.types import Role, TurnLimits

_CHOICES = {"auto": "auto", "any": "required", "tool": "required", "none": "none"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Block(_Model):
    type: str
    text: str = ""
    name: str = ""
    input: Any = None
    content: "str | list[_Block] | None" = None


class _Message(_Model):
    role: str
    content: str | list[_Block]


class _Tool(_Model):
    name: str
    description: str = ""
    input_schema: dict[str, Any]


class _Request(_Model):
    messages: list[_Message]
    system: str | list[_Block] | None = None
    tools: list[_Tool] | None = None
    tool_choice: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None
    max_tokens: int | None = None


def read_anthropic(body: Mapping[str, Any]) -> tuple[ModelRequest, list[str]]:
    """Return the request, and what of it is not done as asked; see `chat.read_chat`. Raises RequestError."""
    try:
        asked = _Request.model_validate(body)
    except ValidationError as error:
        raise RequestError(in_words(error)) from error
    messages = [ChatMessage("system", _text(asked.system, "system"))] if asked.system else []
    for number, message in enumerate(asked.messages):
        messages += _read_message(message, f"messages.{number}")
    check_order(messages)
    may_call, notes = read_tool_choice(_CHOICES.get(str((asked.tool_choice or {}).get("type", "auto")), "auto"))
    request = ModelRequest(
        messages=tuple(messages),
        tools=tuple(
            {
                "type": "function",
                "function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema},
            }
            for tool in asked.tools or ()
        ),
        limits=TurnLimits(
            max_new_tokens=positive("max_tokens", asked.max_tokens), stop=tuple(asked.stop_sequences or ())
        ),
        may_call=may_call,
    )
    return request, notes + ignored_sampling(body)


def _read_message(message: _Message, where: str) -> list[ChatMessage]:
    """Return one message as one or several.

    Anthropic puts results of tools into a user's message; here each is a message of its own.
    """
    if message.role not in ("user", "assistant"):
        raise RequestError(f"{where}.role: user or assistant, not {message.role}")
    role: Role = "user" if message.role == "user" else "assistant"
    if isinstance(message.content, str):
        return [ChatMessage(role, message.content)]
    results: list[ChatMessage] = []
    texts, calls = [], []
    for block in message.content:
        if block.type == "text":
            texts.append(block.text)
        elif block.type == "tool_use":
            calls.append(Call(block.name, json.dumps(block.input or {}, ensure_ascii=False)))
        elif block.type == "tool_result":
            results.append(ChatMessage("tool", _text(block.content, where)))
        elif block.type not in ("thinking", "redacted_thinking"):
            raise RequestError(f"{where}: a block of type {block.type}; the policy reads only text")
    if texts or calls or not results:
        results.append(ChatMessage(role, "".join(texts), tuple(calls)))
    return results


def _text(content: "str | list[_Block] | None", where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    odd = [block.type for block in content if block.type != "text"]
    if odd:
        raise RequestError(f"{where}: a block of type {odd[0]}; the policy reads only text")
    return "".join(block.text for block in content)


def _arguments(call: Call) -> Any:
    try:
        return json.loads(call.arguments)
    except ValueError:  # a response template may give text that is not JSON, for which this dialect has no place
        return {}


def write_anthropic(answer: Answer, model: str) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    content: list[dict[str, Any]] = []
    if answer.content or not answer.calls:
        content.append({"type": "text", "text": answer.content})
    for index, call in enumerate(answer.calls):
        content.append({"type": "tool_use", "id": answer.call_id(index), "name": call.name, "input": _arguments(call)})
    reason = "tool_use" if answer.calls else ("max_tokens" if answer.is_cut else "end_turn")
    return {
        "id": f"msg_{answer.number}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.completion_tokens},
    }


def stream_anthropic(answer: Answer, model: str) -> Iterator[str]:
    """Yield the same answer as server-sent events."""
    whole = write_anthropic(answer, model)

    def event(kind: str, **data: Any) -> str:
        return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n"

    usage = {**whole["usage"], "output_tokens": 0}
    yield event("message_start", message={**whole, "content": [], "stop_reason": None, "usage": usage})
    for index, block in enumerate(whole["content"]):
        if block["type"] == "text":
            empty, delta = {**block, "text": ""}, {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"], ensure_ascii=False)}
        yield event("content_block_start", index=index, content_block=empty)
        yield event("content_block_delta", index=index, delta=delta)
        yield event("content_block_stop", index=index)
    yield event(
        "message_delta",
        delta={"stop_reason": whole["stop_reason"], "stop_sequence": None},
        usage={"output_tokens": answer.completion_tokens},
    )
    yield event("message_stop")
