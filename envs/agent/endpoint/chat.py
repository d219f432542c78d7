"""OpenAI's chat completions: a request read, an answer written, whole or as a stream."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from envs.agent.messages import Answer, Call, ChatMessage, ModelRequest, RequestError, check_order
from trace_async.types import Json, Role, TurnLimits

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
_SAMPLING = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty")


class _Model(BaseModel):
    model_config = ConfigDict(extra="allow")


class _Part(_Model):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Function(_Model):
    name: str
    arguments: str = "{}"


class _ToolCall(_Model):
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Model):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[_Part] | None = None
    tool_calls: list[_ToolCall] | None = None


class _Tool(_Model):
    type: Literal["function"]
    function: dict[str, Any]


class _ChatRequest(_Model):
    messages: list[_Message]
    tools: list[_Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    n: int | None = None
    stop: str | list[str] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


def read_chat(body: Mapping[str, Any]) -> tuple[ModelRequest, list[str]]:
    """Return the request, and in words what of it is not done as asked.

    Raises RequestError for what cannot be done.
    """
    try:
        asked = _ChatRequest.model_validate(body)
    except ValidationError as error:
        raise RequestError(in_words(error)) from error
    _refuse(asked, body)
    messages = tuple(_read_message(message, number) for number, message in enumerate(asked.messages))
    check_order(messages)
    may_call, notes = read_tool_choice(asked.tool_choice)
    most = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    request = ModelRequest(
        messages=messages,
        tools=tuple(tool.model_dump() for tool in asked.tools or ()),
        limits=TurnLimits(max_new_tokens=positive("max_tokens", most), stop=_stops(asked.stop)),
        may_call=may_call,
        wants_logprobs=bool(asked.logprobs),
    )
    return request, notes + ignored_sampling(body)


def in_words(error: ValidationError) -> str:
    """Return the first fault of a request, with the place where it stands."""
    first = error.errors()[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"


def ignored_sampling(body: Mapping[str, Any]) -> list[str]:
    """Return a note for each sampling setting of a request, none of which is used.

    The run's own settings win, because the gradient is that of the distribution that was sampled from.
    """
    return [f"{name}={body[name]} is not used, the run's own sampling is" for name in _SAMPLING if body.get(name)]


def read_tool_choice(choice: str | Mapping[str, Any] | None) -> tuple[bool, list[str]]:
    """Return (whether calls are read out of the answer, what is not done as asked)."""
    if choice == "none":
        return False, []
    if choice in (None, "auto"):
        return True, []
    return True, [f"tool_choice={json.dumps(choice)}: the policy is free to answer without this call"]


def positive(name: str, value: int | None) -> int | None:
    """Return the value of a request's field `name`. Raises RequestError when it is below 1."""
    if value is not None and value < 1:
        raise RequestError(f"{name}={value}: must be ≥ 1")
    return value


def _refuse(asked: _ChatRequest, body: Mapping[str, Any]) -> None:
    if asked.n not in (None, 1):
        raise RequestError(f"n={asked.n}: only 1; ask again for another answer")
    if asked.top_logprobs:
        raise RequestError("top_logprobs: only the log-probability of the sampled token is known (logprobs: true)")
    kind = (asked.response_format or {}).get("type", "text")
    if kind != "text":
        raise RequestError(
            f"response_format={kind}: the policy's answers are not constrained while it is trained; ask for the format "
            "in the prompt, or by a tool"
        )
    for name in ("functions", "function_call", "logit_bias", "audio"):
        if body.get(name):
            raise RequestError(f"{name}: not supported")


def _read_message(message: _Message, number: int) -> ChatMessage:
    if isinstance(message.content, list):
        texts = []
        for part in message.content:
            text = part.text if part.text is not None else part.refusal
            if text is None:
                raise RequestError(f"messages.{number}: a part of type {part.type}; the policy reads only text")
            texts.append(text)
        content = "".join(texts)
    else:
        content = message.content or ""
    calls = tuple(Call(call.function.name, call.function.arguments) for call in message.tool_calls or ())
    return ChatMessage(_ROLES[message.role], content, calls)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > 4 or not all(stops):
        raise RequestError("stop: at most 4 strings, none of them empty")
    return stops


def finish_reason(answer: Answer) -> str:
    """Return why the turn ended, in OpenAI's words."""
    if answer.calls:
        return "tool_calls"
    return "length" if answer.is_cut else "stop"


def _usage(answer: Answer) -> dict[str, Json]:
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }


def _tool_calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": answer.call_id(index),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(answer.calls)
    ]


def _logprobs(answer: Answer) -> dict[str, Any] | None:
    if not answer.pieces:
        return None
    content = [
        {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
        for text, logprob in answer.pieces
    ]
    return {"content": content, "refusal": None}


def write_chat(answer: Answer, model: str) -> dict[str, Any]:
    """Return the body of an answer that is not streamed."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.content or (None if answer.calls else "")}
    message["refusal"] = None
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = _tool_calls(answer)
    choice = {"index": 0, "message": message, "logprobs": _logprobs(answer), "finish_reason": finish_reason(answer)}
    return {
        "id": f"chatcmpl-{answer.number}",
        "object": "chat.completion",
        "created": answer.created,
        "model": model,
        "choices": [choice],
        "usage": _usage(answer),
    }


def stream_chat(answer: Answer, model: str, *, include_usage: bool) -> Iterator[str]:
    """Yield the same answer as server-sent events.

    The turn is whole before the first of them, because only its end decides what is a tool call.
    """

    def event(choices: Sequence[Mapping[str, Any]], **more: Any) -> str:
        head = {"id": f"chatcmpl-{answer.number}", "object": "chat.completion.chunk", "created": answer.created}
        return f"data: {json.dumps({**head, 'model': model, 'choices': choices, **more})}\n\n"

    def delta(changes: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        return event([{"index": 0, "delta": changes, "logprobs": logprobs, "finish_reason": finish}])

    yield delta({"role": "assistant", "content": None if answer.calls else ""})
    if answer.reasoning:
        yield delta({"reasoning_content": answer.reasoning})
    if answer.content:
        yield delta({"content": answer.content}, logprobs=_logprobs(answer))
    for index, call in enumerate(_tool_calls(answer)):
        yield delta({"tool_calls": [{"index": index, **call}]})
    yield delta({}, finish=finish_reason(answer))
    if include_usage:
        yield event([], usage=_usage(answer))
    yield "data: [DONE]\n\n"
