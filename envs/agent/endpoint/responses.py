"""OpenAI's responses: a request read, an answer written, whole or as a stream.

Nothing is stored: a request brings all of its history, and `previous_response_id` is refused.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.agent.endpoint.chat import ignored_sampling, in_words, positive, read_tool_choice
from envs.agent.messages import Answer, Call, ChatMessage, ModelRequest, RequestError, check_order
from trace_async.types import Role, TurnLimits

_ROLES: dict[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Part(_Model):
    type: str
    text: str = ""


class _Item(_Model):
    type: str = "message"
    role: str = ""
    content: str | list[_Part] | None = None
    name: str = ""
    arguments: str = "{}"
    output: str | list[_Part] | None = None


class _Tool(_Model):
    type: str
    name: str = ""
    description: str | None = None
    parameters: dict[str, Any] | None = None


class _Request(_Model):
    input: str | list[_Item]
    instructions: str | None = None
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    max_output_tokens: int | None = None
    text: dict[str, Any] | None = None
    previous_response_id: str | None = None


def read_responses(body: Mapping[str, Any]) -> tuple[ModelRequest, list[str]]:
    """Return the request, and what of it is not done as asked; see `chat.read_chat`. Raises RequestError."""
    try:
        asked = _Request.model_validate(body)
    except ValidationError as error:
        raise RequestError(in_words(error)) from error
    if asked.previous_response_id:
        raise RequestError("previous_response_id: nothing is stored; send the whole history in input")
    kind = ((asked.text or {}).get("format") or {}).get("type", "text")
    if kind != "text":
        raise RequestError(f"text.format={kind}: the policy's answers are not constrained while it is trained")
    messages = [ChatMessage("system", asked.instructions)] if asked.instructions else []
    if isinstance(asked.input, str):
        messages.append(ChatMessage("user", asked.input))
    else:
        for number, item in enumerate(asked.input):
            _add_item(messages, item, f"input.{number}")
    check_order(messages)
    may_call, notes = read_tool_choice(asked.tool_choice)
    request = ModelRequest(
        messages=tuple(messages),
        tools=tuple(_read_tool(tool) for tool in asked.tools or ()),
        limits=TurnLimits(max_new_tokens=positive("max_output_tokens", asked.max_output_tokens)),
        may_call=may_call,
    )
    return request, notes + ignored_sampling(body)


def _read_tool(tool: _Tool) -> dict[str, Any]:
    if tool.type != "function":
        raise RequestError(f"tools: one of type {tool.type}; only functions, which the agent carries out itself")
    function = {"name": tool.name, "description": tool.description or "", "parameters": tool.parameters or {}}
    return {"type": "function", "function": function}


def _add_item(messages: list[ChatMessage], item: _Item, where: str) -> None:
    """Add an item to the messages. A turn of the policy is several items: what it says, and each call."""
    if item.type == "message":
        if item.role not in _ROLES:
            raise RequestError(f"{where}.role: {', '.join(_ROLES)}, not {item.role!r}")
        messages.append(ChatMessage(_ROLES[item.role], _text(item.content, where)))
    elif item.type == "function_call":
        last = messages[-1] if messages and messages[-1].role == "assistant" else None
        call = Call(item.name, item.arguments)
        if last is not None:
            messages[-1] = ChatMessage("assistant", last.content, (*last.calls, call))
        else:
            messages.append(ChatMessage("assistant", "", (call,)))
    elif item.type == "function_call_output":
        messages.append(ChatMessage("tool", _text(item.output, where)))
    elif item.type != "reasoning":
        raise RequestError(f"{where}: an item of type {item.type}; not supported")


def _text(content: "str | list[_Part] | None", where: str) -> str:
    if not isinstance(content, list):
        return content or ""
    odd = [part.type for part in content if part.type not in ("input_text", "output_text", "text", "refusal")]
    if odd:
        raise RequestError(f"{where}: a part of type {odd[0]}; the policy reads only text")
    return "".join(part.text for part in content)


def write_responses(answer: Answer, model: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    output: list[dict[str, Any]] = []
    if answer.content or not answer.calls:
        text = {"type": "output_text", "text": answer.content, "annotations": [], "logprobs": []}
        message = {"type": "message", "role": "assistant", "status": "completed", "content": [text]}
        output.append({"id": f"msg_{answer.number}", **message})
    for index, call in enumerate(answer.calls):
        ids = {"id": f"fc_{answer.number}_{index}", "call_id": answer.call_id(index)}
        output.append(
            {"type": "function_call", **ids, "name": call.name, "arguments": call.arguments, "status": "completed"}
        )
    return {
        "id": f"resp_{answer.number}",
        "object": "response",
        "created_at": answer.created,
        "status": "incomplete" if answer.is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if answer.is_cut else None,
        "error": None,
        "model": model,
        "instructions": body.get("instructions"),
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": body.get("tool_choice") or "auto",
        "tools": body.get("tools") or [],
        "metadata": {},
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def stream_responses(answer: Answer, model: str, body: Mapping[str, Any]) -> Iterator[str]:
    """Yield the same answer as server-sent events."""
    whole = write_responses(answer, model, body)
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": {**whole, "status": "in_progress", "output": [], "usage": None}}
    ]
    for index, item in enumerate(whole["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "message":
            (part,) = item["content"]
            added: dict[str, Any] = {**item, "status": "in_progress", "content": []}
            within = {**place, "content_index": 0}
            inner = [
                {"type": "response.content_part.added", **within, "part": {**part, "text": ""}},
                {"type": "response.output_text.delta", **within, "delta": part["text"], "logprobs": []},
                {"type": "response.output_text.done", **within, "text": part["text"], "logprobs": []},
                {"type": "response.content_part.done", **within, "part": part},
            ]
        else:
            added = {**item, "status": "in_progress", "arguments": ""}
            arguments, name = item["arguments"], item["name"]
            inner = [
                {"type": "response.function_call_arguments.delta", **place, "delta": arguments},
                {"type": "response.function_call_arguments.done", **place, "name": name, "arguments": arguments},
            ]
        events += [{"type": "response.output_item.added", "output_index": index, "item": added}, *inner]
        events.append({"type": "response.output_item.done", "output_index": index, "item": item})
    events.append({"type": f"response.{whole['status']}", "response": whole})
    for number, event in enumerate(events):
        yield f"event: {event['type']}\ndata: {json.dumps({**event, 'sequence_number': number})}\n\n"
