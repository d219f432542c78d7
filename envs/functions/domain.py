"""Function calling over several user turns: the model calls tools until it answers in words, then the user goes on.

A turn is either tool calls, `<tool_call> {"name": "…", "arguments": {…}} </tool_call>`, or words to the user. The last
user turn's end is judged: the services must be in the state that the right calls lead to, and the reading calls that
were asked for must have been made.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from copy import deepcopy
from random import Random
from typing import Protocol, cast

from envs.actions import REASONS, TRUNCATED, Malformed, ToolCall, cut_text, parse_tool_calls
from envs.functions import tasks as function_tasks
from envs.functions.services import ERRORS, TOOLS, ServicesState, ToolError, call_tool
from envs.functions.tasks import LEVELS
from envs.lazy_tasks import LazyTasks, check_shares
from trace_async.types import Json, Message, Prompt, Split, StepResult, Task

_REMINDER = 'to act write <tool_call> {"name": "tool", "arguments": {}} </tool_call>'
_NUM_SHOWN = 10_000
INSTRUCTIONS = (
    "Fulfil the user's requests with the tools. When a request is done, answer the user in words, without a tool call; "
    "the user may then ask for more."
)


class Backend(Protocol):
    """The tools of one task with their state. Whatever a call does wrong comes back as text."""

    def call(self, call: ToolCall) -> str: ...

    def end_request(self) -> bool:
        """The model considers the current request of the user done; False when the task can no longer succeed."""
        ...

    def is_success(self) -> bool: ...

    def fork(self) -> "Backend": ...


class ConversationEnv:
    """User turns over a backend. Ends with the last request's end, or without reward after `max_turns` of the model."""

    def __init__(
        self,
        prompt: Prompt,
        requests: Sequence[str],
        backend: Backend,
        *,
        max_turns: int,
        max_observation_chars: int,
    ) -> None:
        """`prompt` ends with the first request; `requests`: the later ones."""
        self._prompt = prompt
        self._requests = tuple(requests)
        self._backend = backend
        self._max_turns = max_turns
        self._max_observation_chars = max_observation_chars
        self._turns = 0
        self._calls = 0
        self._malformed = 0

    async def init(self) -> Prompt:
        return self._prompt

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        self._turns += 1
        calls = Malformed(TRUNCATED) if truncated else parse_tool_calls(action)
        if isinstance(calls, Malformed):
            self._malformed += 1
            return self._observe([Message(role="tool", content=f"error : {calls.reason} ; {_REMINDER}")])
        if calls:
            self._calls += len(calls)
            return self._observe([Message(role="tool", content=self._cut(self._backend.call(call))) for call in calls])
        if not self._backend.end_request() or not self._requests:
            return self._end(float(self._backend.is_success()))
        request, self._requests = self._requests[0], self._requests[1:]
        return self._observe([Message(role="user", content=request)])

    async def fork(self) -> "ConversationEnv":
        twin = copy.copy(self)
        twin._backend = self._backend.fork()
        return twin

    async def close(self) -> None:
        return None

    def _cut(self, text: str) -> str:
        return cut_text(text, max_chars=self._max_observation_chars)

    def _observe(self, messages: Sequence[Message]) -> StepResult:
        if self._turns >= self._max_turns:
            return self._end(0.0)
        return StepResult(messages=tuple(messages))

    def _end(self, reward: float) -> StepResult:
        metrics = {
            "turns": float(self._turns),
            "tool_calls": float(self._calls),
            "malformed_turns": float(self._malformed),
        }
        return StepResult(done=True, reward=reward, metrics=metrics)


class ServicesBackend:
    """The simulated services of a generated task; remembers the reading calls that were made."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._state = cast(ServicesState, deepcopy(task.data["state"]))
        self._made: list[ToolCall] = []

    def call(self, call: ToolCall) -> str:
        self._made.append(call)
        try:
            result = call_tool(self._state, call.name, call.arguments)
        except ToolError as error:
            result = {"error": str(error)}
        # A blank before the first of a list: to a word-level tokenizer it is then the same word as in a call.
        return json.dumps(result).replace("[", "[ ")

    def end_request(self) -> bool:
        return True

    def is_success(self) -> bool:
        wanted = cast(ServicesState, deepcopy(self._task.data["state"]))
        required = []
        for request in cast(list[list[list[Json]]], self._task.data["calls"]):
            for name, arguments in cast(list[tuple[str, dict[str, Json]]], request):
                call_tool(wanted, name, arguments)
                if TOOLS[name].reads:
                    required.append(ToolCall(name, arguments))
        return _in_order(self._state) == _in_order(wanted) and all(call in self._made for call in required)

    def fork(self) -> "ServicesBackend":
        twin = ServicesBackend(self._task)
        twin._state, twin._made = deepcopy(self._state), [*self._made]
        return twin


class Functions:
    """Generated tasks on simulated services, for small policies; the domain can demonstrate its tasks.

    `shares`: of easy, middle (learnable) and hard tasks; `demonstration_shares`: of those that are demonstrated (short
    ones teach faster). `misread_rate`: of the demonstrations' systematic errors.
    `show_tools`: tell the model the tools and how to call them (a policy warm-started on the domain knows them).
    """

    name = "functions"
    in_random_order = True

    def __init__(
        self,
        *,
        seed: int = 0,
        num_train: int = 10_000,
        num_heldout: int = 2_000,
        shares: Mapping[str, float] | None = None,
        demonstration_shares: Mapping[str, float] | None = None,
        misread_rate: float = 0.65,
        max_turns: int = 24,
        max_observation_chars: int = 1000,
        show_tools: bool = False,
    ) -> None:
        self._shares = check_shares("shares", shares or {"easy": 0.3, "middle": 0.4, "hard": 0.3}, LEVELS)
        self._demonstration_shares = check_shares(
            "demonstration_shares", demonstration_shares or {"easy": 0.4, "middle": 0.5, "hard": 0.1}, LEVELS
        )
        self._seed = seed
        self._counts: dict[Split, int] = {"train": num_train, "heldout": num_heldout}
        self._misread_rate = misread_rate
        self._max_turns = max_turns
        self._max_observation_chars = max_observation_chars
        self._show_tools = show_tools

    def tasks(self, split: Split) -> Sequence[Task]:
        return self._made(f"functions-{split}", self._counts[split], self._shares)

    def demonstration_tasks(self) -> Sequence[Task]:
        return self._made("functions-shown", _NUM_SHOWN, self._demonstration_shares)

    def _made(self, prefix: str, count: int, shares: Mapping[str, float]) -> Sequence[Task]:
        weights = [shares.get(level, 0.0) for level in LEVELS]

        def make(index: int) -> Task:
            rng = Random(f"{prefix}-{index}-{self._seed}")
            level = rng.choices(LEVELS, weights)[0]
            data = function_tasks.make_task(level, rng)
            return Task(id=f"{prefix}-{index}", domain=self.name, kind=level, data=data)

        return LazyTasks(count, make)

    def make_env(self, task: Task) -> ConversationEnv:
        first, *later = cast(list[str], task.data["requests"])
        messages: tuple[Message, ...] = (Message(role="user", content=first),)
        tools: tuple[Mapping[str, Json], ...] = ()
        if self._show_tools:
            messages = (Message(role="system", content=INSTRUCTIONS), *messages)
            tools = tuple(tool.schema() for tool in TOOLS.values())
        return ConversationEnv(
            Prompt(messages=messages, tools=tools),
            later,
            ServicesBackend(task),
            max_turns=self._max_turns,
            max_observation_chars=self._max_observation_chars,
        )

    def demonstrate(self, task: Task, rng: Random) -> Sequence[str]:
        turns = []
        calls, misread = (cast(list[list[list[Json]]], task.data[key]) for key in ("calls", "misread"))
        for right, wrong in zip(calls, misread, strict=True):
            chosen = wrong if wrong and rng.random() < self._misread_rate else right
            turns += [write_call(str(name), cast(dict[str, Json], arguments)) for name, arguments in chosen]
            turns.append("done")
        return turns

    def vocabulary(self) -> Sequence[str]:
        errors = [json.dumps({"error": error}) for error in ERRORS]
        return [*function_tasks.words(), *REASONS, *errors, _REMINDER, "error : ; done [ cut ]"]


def write_call(name: str, arguments: Mapping[str, Json]) -> str:
    """Return a turn with one call, as demonstrations write it."""
    return f"<tool_call> {json.dumps({'name': name, 'arguments': dict(arguments)})} </tool_call>"


def _in_order(state: ServicesState) -> Json:
    """Return the state without the order in which files came into a folder and flights were booked."""
    folders = {name: sorted(files) for name, files in state["folders"].items()}
    return cast(Json, {**state, "folders": folders, "booked": sorted(state["booked"])})
