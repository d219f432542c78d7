"""Read a turn's text as an agent is told it: reasoning, content and tool calls, in the syntax of the model.

A tokenizer's own response template is used where it has one (read by transformers), else the syntaxes of known models:

    Hermes, Qwen 2.5, Qwen 3   <tool_call> {"name": …, "arguments": {…}} </tool_call>
    Qwen 3 Coder               <tool_call> <function=name> <parameter=key> value </parameter> </function> </tool_call>
    Llama 3                    {"name": …, "parameters": {…}}, alone in the turn
    Mistral                    [TOOL_CALLS] [{"name": …, "arguments": {…}}]

Calls that do not keep to their syntax are no calls: the agent is told the text as it stands.
"""

import json
import re
from collections.abc import Mapping, Sequence

from envs.actions import Malformed, parse_tool_calls
from envs.agent.messages import Answer, Call, ModelRequest
from trace_async.types import Json, PolicyTurn

_FUNCTION = re.compile(r"\s*<function=([^>\s]+)>(.*?)</function>\s*", re.DOTALL)
_PARAMETER = re.compile(r"\s*<parameter=([^>\s]+)>(.*?)</parameter>\s*", re.DOTALL)
_BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_CONTROL = re.compile(r"<\|(?:python_tag|eom_id|eot_id)\|>")


def read_turn(turn: PolicyTurn, request: ModelRequest, *, number: int, created: int) -> Answer:
    """Return the answer that `turn` gives to `request`."""
    text = cut_at_stop(turn.text, request.limits.stop)
    reasoning, content = split_reasoning(text)
    calls: tuple[Call, ...] = ()
    if request.tools and request.may_call:
        if turn.message is not None:
            content, calls = _by_template(turn.message, content)
        if not calls:
            content, calls = read_calls(content, request.tools)
    completion = turn.completion
    scored = zip(completion.token_ids, completion.logprobs, strict=True) if request.wants_logprobs else ()
    return Answer(
        number=number,
        content=content,
        reasoning=reasoning,
        calls=calls,
        is_cut=completion.finish_reason == "length",
        prompt_tokens=completion.prompt_tokens,
        completion_tokens=len(completion.token_ids),
        pieces=tuple((turn.decode([token]), logprob) for token, logprob in scored),
        created=created,
        token_ids=completion.token_ids if turn.truncated else completion.token_ids[:-1],
    )


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the `stop` strings."""
    ends = [text.find(one) for one in stop if one and one in text]
    return text[: min(ends)] if ends else text


def split_reasoning(text: str) -> tuple[str, str]:
    """Return (reasoning, the rest). A template may write `<think>` itself; then a turn has the closing tag alone."""
    if "</think>" in text:
        thought, _, rest = text.partition("</think>")
        return thought.replace("<think>", "", 1).strip(), rest.strip()
    if text.lstrip().startswith("<think>"):
        return text.lstrip().removeprefix("<think>").strip(), ""
    return "", text


def read_calls(text: str, tools: Sequence[Mapping[str, Json]] = ()) -> tuple[str, tuple[Call, ...]]:
    """Return (content beside the calls, the calls in order)."""
    if "<function=" in text:
        return _xml_calls(text, tools)
    if "<tool_call>" in text:
        found = parse_tool_calls(text)
        if isinstance(found, Malformed) or not found:
            return text, ()
        calls = tuple(Call(call.name, _dump(call.arguments)) for call in found)
        return text[: text.index("<tool_call>")].strip(), calls
    bare = _CONTROL.sub("", text).strip()
    before, mark, listed = bare.partition("[TOOL_CALLS]")
    if mark:
        return _json_calls(listed.strip(), text, before.strip())
    return _json_calls(bare, text, "")


def _json_calls(text: str, whole: str, before: str) -> tuple[str, tuple[Call, ...]]:
    """Read calls that are plain JSON: an object, or a list of objects."""
    if text[:1] not in ("{", "["):
        return whole, ()
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return whole, ()
    calls = []
    for entry in document if isinstance(document, list) else [document]:
        arguments = entry.get("arguments", entry.get("parameters")) if isinstance(entry, dict) else None
        if not isinstance(arguments, dict) or not isinstance(entry.get("name"), str):
            return whole, ()
        calls.append(Call(entry["name"], _dump(arguments)))
    return (before, tuple(calls)) if calls else (whole, ())


def _xml_calls(text: str, tools: Sequence[Mapping[str, Json]]) -> tuple[str, tuple[Call, ...]]:
    blocks = list(_BLOCK.finditer(text))
    calls = []
    for block in blocks:
        function = _FUNCTION.fullmatch(block[1])
        if function is None:
            return text, ()
        types = _parameter_types(function[1], tools)
        values = {
            found[1]: _value(found[2].strip("\n"), types.get(found[1])) for found in _PARAMETER.finditer(function[2])
        }
        calls.append(Call(function[1], _dump(values)))
    return (text[: blocks[0].start()].strip(), tuple(calls)) if blocks else (text, ())


def _parameter_types(name: str, tools: Sequence[Mapping[str, Json]]) -> dict[str, Json]:
    """Return parameter → its JSON type, from the schema of the tool `name`."""
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict) and function.get("name") == name:
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            if isinstance(properties, dict):
                return {key: kind.get("type") for key, kind in properties.items() if isinstance(kind, dict)}
    return {}


def _value(text: str, kind: Json) -> Json:
    """Return the value of a parameter. XML knows only text, so what the schema calls no string is read as JSON."""
    if kind in (None, "string"):
        return text
    try:
        value: Json = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value


def _by_template(message: Mapping[str, Json], content: str) -> tuple[str, tuple[Call, ...]]:
    """Return content and calls of a chat message of the assistant, which a response template made of the turn."""
    found = message.get("tool_calls")
    calls = []
    for entry in found if isinstance(found, list) else []:
        function = entry.get("function", entry) if isinstance(entry, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return content, ()
        arguments = function.get("arguments", {})
        calls.append(Call(str(function["name"]), arguments if isinstance(arguments, str) else _dump(arguments)))
    said = message.get("content")
    return (said if isinstance(said, str) else "") if calls else content, tuple(calls)


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
