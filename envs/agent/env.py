"""Make an environment of a running agent, by turning control round.

    init    starts the agent and waits for its first request
    step    answers the request with the policy's turn, and waits for the next one or the agent's end
    fork    hands on the record: a fork is a fresh run of the agent, replayed to the same turn

A fork costs nothing until it is used: then its agent starts, its first calls are answered from the record, and its
next call is live (`session.py`).
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from envs.agent.messages import ModelRequest
from envs.agent.session import Ended, Goal, Pending, Session
from envs.agent.tool_calls import read_turn
from envs.agent.verifier import CommandVerifier, FunctionVerifier, Outcome
from trace_async.env import EnvError
from trace_async.types import Completion, Message, PolicyTurn, Prompt, StepResult, Task, TurnLimits, VersionSpan

_KEPT_PROMPTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSettings:
    """What ends a rollout beside the agent's own end."""

    max_turns: int
    """Turns of the model in a rollout. An agent that asks for more ends with reward 0."""
    model_errors: frozenset[str]
    """Names of exceptions that are the policy's own doing: reward 0. Any other error of an agent is a break-down."""


@dataclass(slots=True, eq=False)
class FirstRequests:
    """Keeps the first request of the tasks that were started last.

    The predictor looks at the prompts of many tasks that then get no rollout. Without this each look would start an
    agent.
    """

    kept: "OrderedDict[str, ModelRequest]" = field(default_factory=OrderedDict)
    """Task id → its first request, the oldest first."""

    def get(self, task_id: str) -> ModelRequest | None:
        return self.kept.get(task_id)

    def put(self, task_id: str, request: ModelRequest) -> None:
        self.kept[task_id] = request
        if len(self.kept) > _KEPT_PROMPTS:
            self.kept.popitem(last=False)


class AgentEnv:
    """One rollout of an agent, or the frozen state of one (`goal`), which starts when it is used."""

    blocking = False  # requests wait in one event loop; agents and plain verifiers never run in it

    def __init__(
        self,
        task: Task,
        make_session: Callable[[], Session],
        verifier: FunctionVerifier | CommandVerifier,
        settings: AgentSettings,
        first_requests: FirstRequests,
        goal: Goal | None = None,
    ) -> None:
        self._task = task
        self._make_session = make_session
        self._verifier = verifier
        self._settings = settings
        self._first_requests = first_requests
        self._goal = goal
        self._session: Session | None = None
        self._pending: Pending | None = None
        self._limits = goal.pending.request.limits if goal is not None else TurnLimits()
        self._said = ""

    async def init(self) -> Prompt:
        """Return the agent's first request.

        It is known when the task was started before. Then the agent itself starts with its first turn.
        """
        known = self._first_requests.get(self._task.id)
        if known is None:
            known = (await self._start()).request
            self._first_requests.put(self._task.id, known)
        self._limits = known.limits
        return Prompt(messages=_messages(known), tools=known.tools)

    def next_limits(self) -> TurnLimits:
        return self._limits

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        """Take a turn of which only the text is known, as in demonstrations."""
        nothing = Completion(
            token_ids=(),
            logprobs=(),
            version_spans=(VersionSpan(0, 0),),
            finish_reason="length" if truncated else "stop",
            prompt_tokens=0,
            cached_tokens=0,
        )
        return await self.answer(PolicyTurn(text=action, truncated=truncated, completion=nothing, decode=lambda _: ""))

    async def answer(self, turn: PolicyTurn) -> StepResult:
        """Answer the request that waits with `turn`, and wait for the agent's next request or its end."""
        pending = await self._live()
        assert self._session is not None
        number = len(self._session.record)
        answer = read_turn(turn, pending.request, number=number, created=int(time.time()))
        self._said = answer.content
        self._session.give(pending, answer)
        self._pending = None
        event = await self._session.next_event()
        if isinstance(event, Ended):
            return await self._judged(event, number + 1)
        if number + 1 >= self._settings.max_turns:
            return self._end(0.0, number + 1, {"max_turns_reached": 1.0})
        self._pending, self._limits = event, event.request.limits
        if event.place.after is None:
            return StepResult(prompt=self._prompt(event.request))
        after = event.place.after if event.place.after != number else None
        return StepResult(messages=_messages(event.request), after=after)

    def _prompt(self, request: ModelRequest) -> Prompt:
        """Return the prompt of a request that begins a conversation of its own.

        What the policy said in an earlier one stays in the tokens in which it was written.
        """
        assert self._session is not None
        return Prompt(messages=tuple(map(self._session.in_own_tokens, request.messages)), tools=request.tools)

    async def fork(self) -> "AgentEnv":
        """Return the state of a running agent, frozen, or the agent of a frozen state, run again up to there.

        Raises ReplayDivergedError when it does not come back to the same request.
        """
        if self._session is not None and self._pending is not None:
            goal = Goal(record=self._session.record, length=len(self._session.record), pending=self._pending)
            return self._twin(goal)
        twin = self._twin(self._goal)
        if self._goal is not None:
            try:
                await twin._live()
            except BaseException:
                await twin.close()
                raise
        return twin

    def _twin(self, goal: Goal | None) -> "AgentEnv":
        twin = AgentEnv(self._task, self._make_session, self._verifier, self._settings, self._first_requests, goal)
        twin._limits = self._limits
        return twin

    async def _live(self) -> Pending:
        """Return the request that waits for this turn. Starts or replays the agent where it does not run yet."""
        if self._pending is not None:
            return self._pending
        assert self._session is None, "init comes first, and nothing after the end"
        if self._goal is not None:
            self._session = self._make_session()
            self._pending = await self._session.replay(self._goal)
            return self._pending
        known = self._first_requests.get(self._task.id)
        pending = await self._start()
        if known is not None and known != pending.request:
            raise EnvError(
                "the agent's first request is another one than in an earlier rollout of the same task: it must depend "
                "on the task alone (`trace-async env check agent` shows where it parts)"
            )
        return pending

    async def _start(self) -> Pending:
        self._session = self._make_session()
        await self._session.start()
        event = await self._session.next_event()
        if isinstance(event, Ended):
            how = f"failed: {event.failure}" if event.failure is not None else f"returned {str(event.result)[:200]!r}"
            raise EnvError(f"the agent never asked for a turn; it {how}")
        self._pending = event
        return event

    async def _judged(self, end: Ended, num_turns: int) -> StepResult:
        if end.failure is not None:
            if self._settings.model_errors.isdisjoint(end.failure.names):
                raise EnvError(
                    f"the agent failed: {end.failure} (when this is the model's doing, name the exception in "
                    "env.args.model_errors)"
                )
            return self._end(0.0, num_turns, {"agent_error": 1.0})
        outcome = Outcome(result=end.result, error="", answer=self._said, num_turns=num_turns)
        return self._end(await self._verifier.reward(self._task.data, outcome), num_turns, {})

    def _end(self, reward: float, num_turns: int, metrics: Mapping[str, float]) -> StepResult:
        return StepResult(done=True, reward=reward, metrics={"requests": float(num_turns), **metrics})

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


def _messages(request: ModelRequest) -> tuple[Message, ...]:
    return tuple(message.as_text() for message in request.messages)
