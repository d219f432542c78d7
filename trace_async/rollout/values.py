"""Check what an environment gives: convert it where the meaning is plain, else refuse it in words that name the field.

Somebody else's code gives numpy scalars, truth values, integer ids, None. A reward of `True` plainly is 1; a reward of
NaN is nothing, and would spread through predictor, checkpoint and weights. Nothing leaves here that cannot be written
and read back.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from numbers import Real
from typing import get_args

from trace_async.env import EnvValueError
from trace_async.types import Json, Message, Prompt, Role, StepResult, Task

RewardRange = tuple[float, float]

MAX_METRICS = 200
MAX_NAME = 100
MAX_MESSAGES = 200
MAX_BITS = 10_000
"""Of a whole number in a task's data: 3,010 digits. Python's JSON reads no number of more than 4,300."""
_ROLES = get_args(Role)
# What the trainer itself notes of a rollout: a metric of the same name would be taken for it.
_OUR_METRICS = frozenset({"overlong"})
_ODD_IN_A_NAME = re.compile(r"[^\w.\- ]", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertedTask(Task):
    """A task of which something was converted; the environment is still given `original`."""

    original: Task


def checked_task(task: object) -> Task:
    """Return the task in plain values: itself where it has only those. Raises EnvValueError."""
    if not isinstance(task, Task):
        raise EnvValueError(f"a task must be a Task, not {_kind(task)}")
    if isinstance(task, ConvertedTask):
        return task
    names = {name: _name(getattr(task, name), f"task.{name}") for name in ("id", "domain", "kind")}
    data = plain_json(task.data, "task.data")
    if not isinstance(data, dict):
        raise EnvValueError(f"task.data must be a mapping, not {_kind(task.data)}")
    # Plain first: an array cannot be compared for a truth value.
    if _is_plain(task.data) and all(type(getattr(task, name)) is str for name in names):
        return task
    return ConvertedTask(**names, data=data, original=task)


def shown_task(task: Task) -> Task:
    """Return the task as `checked_task` does; of one that it refuses, only what can be shown."""
    try:
        plain = checked_task(task)
    except EnvValueError:
        return Task(id=str(task.id), domain=str(task.domain), kind=str(task.kind), data={})
    return Task(id=plain.id, domain=plain.domain, kind=plain.kind, data=plain.data)


def checked_prompt(prompt: object) -> Prompt:
    """Return the prompt in plain values. Raises EnvValueError."""
    if not isinstance(prompt, Prompt):
        raise EnvValueError(f"gives {_kind(prompt)} instead of a Prompt")
    tools = plain_json(prompt.tools, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise EnvValueError("tools must be mappings")
    messages = _checked_messages(prompt.messages)
    if not messages:
        raise EnvValueError("the prompt has no messages")
    return replace(prompt, messages=messages, tools=tuple(tools))  # type: ignore[arg-type]


def checked_result(result: object, reward_range: RewardRange) -> StepResult:
    """Return the result with its reward mapped from `reward_range` to [0, 1]. Raises EnvValueError."""
    if not isinstance(result, StepResult):
        raise EnvValueError(f"gives {_kind(result)} instead of a StepResult")
    if not result.done:
        if result.prompt is not None:
            return StepResult(prompt=checked_prompt(result.prompt))
        return StepResult(messages=_checked_messages(result.messages), after=result.after)
    reward = _mapped(plain_number(result.reward, "reward"), reward_range)
    return StepResult(done=True, reward=reward, metrics=checked_metrics(result.metrics))


def checked_metrics(metrics: object) -> dict[str, float]:
    """Return the metrics as finite numbers, by names that are not ours. Raises EnvValueError."""
    if not isinstance(metrics, Mapping):
        raise EnvValueError(f"metrics must be a mapping of numbers, not {_kind(metrics)}")
    if len(metrics) > MAX_METRICS:
        raise EnvValueError(f"there are {len(metrics)} metrics of one rollout; at most {MAX_METRICS}")
    named: dict[str, object] = {}
    for name in metrics:
        plain = _metric_name(name)
        if plain in named:
            both = " and ".join(f"metrics[{_shown(one)}]" for one in (named[plain], name))
            raise EnvValueError(f"{both} would both be called {plain!r}; rename one")
        named[plain] = name
    return {plain: plain_number(metrics[name], f"metrics[{name!r}]") for plain, name in named.items()}


def plain_number(value: object, field: str) -> float:
    """Return a finite float for whatever plainly is a number: truth values, integers, numpy and torch scalars.

    Raises EnvValueError, which names `field`.
    """
    number = _unwrapped(value)
    if isinstance(number, Real | Decimal):
        try:
            plain = float(number)
        except (OverflowError, ValueError):
            plain = math.inf
        if math.isfinite(plain):
            return plain
    raise EnvValueError(f"{field} must be a finite number, not {_shown(value)}")


def plain_json(value: object, field: str, depth: int = 0) -> Json:
    """Return the value as JSON holds it. Raises EnvValueError, which names the field that JSON cannot hold."""
    if depth > 100:
        raise EnvValueError(f"{field} is nested more than 100 deep")
    value = _unwrapped(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int) and value.bit_length() <= MAX_BITS:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, Mapping):
        return {_name(key, field): plain_json(item, f"{field}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [plain_json(item, f"{field}[{index}]", depth + 1) for index, item in enumerate(value)]
    if hasattr(value, "tolist"):  # an array of numpy or torch
        return plain_json(value.tolist(), field, depth + 1)
    raise EnvValueError(
        f"{field} must be JSON (text, finite numbers, truth values, lists, mappings), not {_shown(value)}"
    )


def _mapped(reward: float, reward_range: RewardRange) -> float:
    low, high = reward_range
    share = (reward - low) / (high - low)
    # Sums such as 0.1 · 10 end a rounding error beyond the end of the range.
    if not -1e-6 <= share <= 1 + 1e-6:
        raise EnvValueError(
            f"the reward {reward} is outside of [{low:g}, {high:g}]; set env.reward_range to the range of rewards"
        )
    return min(1.0, max(0.0, share))


def _checked_messages(messages: object) -> tuple[Message, ...]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise EnvValueError(f"messages must be a tuple of Message, not {_kind(messages)}")
    if len(messages) > MAX_MESSAGES:
        raise EnvValueError(f"there are {len(messages)} messages; at most {MAX_MESSAGES}")
    return tuple(_checked_message(message, f"messages[{index}]") for index, message in enumerate(messages))


def _checked_message(message: object, field: str) -> Message:
    if not isinstance(message, Message):
        raise EnvValueError(f"{field} must be a Message, not {_kind(message)}")
    if message.role not in _ROLES:
        raise EnvValueError(f"{field}.role must be one of {', '.join(_ROLES)}, not {_shown(message.role)}")
    if not isinstance(message.content, str):
        raise EnvValueError(f"{field}.content must be text, not {_shown(message.content)}")
    return replace(message, content=str(message.content), token_ids=_checked_tokens(message.token_ids, field))


def _checked_tokens(token_ids: object, field: str) -> tuple[int, ...] | None:
    if token_ids is None:
        return None
    ids = [_unwrapped(token) for token in token_ids] if isinstance(token_ids, Sequence) else [None]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise EnvValueError(f"{field}.token_ids must be token ids (whole numbers from 0), not {_shown(token_ids)}")
    return tuple(int(token) for token in ids)  # type: ignore[call-overload]


def _metric_name(name: object) -> str:
    text = _ODD_IN_A_NAME.sub("_", _name(name, "the name of a metric"))[:MAX_NAME].strip()
    return f"env_{text}" if text in _OUR_METRICS or not text.strip("._- ") else text


def _name(value: object, field: str) -> str:
    """Return text, or an integer as text."""
    value = _unwrapped(value)
    if isinstance(value, str) and value:
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise EnvValueError(f"{field} must be text that is not empty, not {_shown(value)}")


def _unwrapped(value: object) -> object:
    """Return the Python value of a numpy or torch scalar; anything else as it is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    return value


def _is_plain(value: object) -> bool:
    """Return whether all in `value` is of JSON's own types: numpy's types are not, though they compare equal."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _shown(value: object) -> str:
    """Return the value in few characters, whatever it is."""
    if isinstance(value, str | bytes):
        return repr(value[:60]) + ("…" if len(value) > 60 else "")
    try:
        text = repr(value)
    except Exception as error:  # noqa: BLE001 - somebody else's __repr__
        return f"a {type(value).__name__} (its repr raises {type(error).__name__})"
    return text if len(text) <= 60 else f"a {type(value).__name__}"
