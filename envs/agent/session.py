"""Run one agent, answer its requests, and keep the record that brings it back to any of its turns.

    record    (request, answer) (request, answer) … (request, answer)      what was answered so far, in order
    replay    a fresh run of the same agent; its requests are answered from the record, its next one is live

A request is known by its digest (`conversation.py`). The same digest stands for the same tokens, because it covers what
the policy wrote by its place and everything else by its text. If one of the first t requests of a replay is not in the
record, something in the agent or its tools is not deterministic: ReplayDivergedError says where the two runs part.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from envs.agent.conversation import Conversation, Place
from envs.agent.messages import Answer, ChatMessage, ModelRequest
from envs.agent.runners.runner import Access, AgentFailed, Runner, Running
from trace_async.env import EnvTimeoutError, ReplayDivergedError
from trace_async.types import Json, Message

_SHOWN_CHARS = 120
_Event = TypeVar("_Event")


class RolloutOverError(Exception):
    """The rollout that a request belongs to has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One request and its answer."""

    key: bytes
    """The digest of the request."""
    request: ModelRequest
    """With its new messages alone: whole histories, kept turn by turn, would grow with the square of the turns."""
    answer: Answer
    """What the policy wrote."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request that waits for its answer."""

    request: ModelRequest
    """With its new messages alone."""
    place: Place
    """Where it stands in the rollout's conversations."""
    answer: "asyncio.Future[Answer]"
    """What the endpoint waits for."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How the agent ended."""

    result: Json = None
    """What it returned."""
    failure: AgentFailed | None = None
    """Why it did not return; None when it did."""


class Receiver(Protocol):
    """Who answers the requests under one secret path."""

    async def receive(self, request: ModelRequest, *, is_retry: bool) -> Answer:
        """Return the answer to `request`. Raises RolloutOverError when the rollout has ended."""
        ...


class Endpoint(Protocol):
    """Opens secret paths; see `endpoint/server.py`."""

    async def open(self, receiver: Receiver) -> Access:
        """Open a new path to `receiver`. Raises EnvError when there can be none."""
        ...

    def close(self, access: Access) -> None:
        """Forget the path."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """The state that a replay must reach."""

    record: Sequence[Exchange]
    """What was answered. The session that writes it shares it, and only appends to it."""
    length: int
    """How many exchanges of the record come before the state."""
    pending: Pending
    """The request that is asked next."""


@dataclass(slots=True, eq=False)
class Session:
    """One run of an agent, in one event loop: `start`, then `next_event` and `give` in turn, then `close`."""

    endpoint: Endpoint
    runner: Runner
    task: Mapping[str, Json]
    timeout_s: float
    """Seconds that the agent may take from an answer to its next request or its end."""
    record: list[Exchange] = field(default_factory=list)
    """What was answered so far, in order."""
    _conversation: Conversation = field(default_factory=Conversation)
    _goal: Goal | None = None
    _open: set[int] = field(default_factory=set)
    """Of the exchanges to be replayed, those that the agent has not asked for yet."""
    _waiting: "deque[Pending]" = field(default_factory=deque)
    """Live requests that nobody has taken yet."""
    _asked: list[Pending] = field(default_factory=list)
    """All live requests so far."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a request, an answer from the record or the agent's end may be what somebody waits for."""
    _parted: str = ""
    """How a replay parted from the recorded run; empty while it has not."""
    _access: Access | None = None
    _running: Running | None = None
    _end: "asyncio.Task[Ended] | None" = None
    _is_closed: bool = False

    async def start(self) -> None:
        """Open the secret path and run the agent."""
        self._access = await self.endpoint.open(self)
        self._running = await self.runner.start(self.task, self._access)
        self._end = asyncio.create_task(self._wait_for_end(self._running))

    async def _wait_for_end(self, running: Running) -> Ended:
        try:
            return Ended(result=await running.result())
        except AgentFailed as failure:
            return Ended(failure=failure)
        finally:
            self._changed.set()

    async def replay(self, goal: Goal) -> Pending:
        """Start the agent, bring it to the state of `goal`, and return the request that is live.

        Raises ReplayDivergedError when the agent asks something else, or ends before.
        """
        self._goal, self._open = goal, set(range(goal.length))
        self.record = list(goal.record[: goal.length])
        await self.start()

        def arrived() -> Pending | None:
            live = [one for one in self._waiting if one.place.key == goal.pending.place.key]
            if self._parted:
                raise ReplayDivergedError(self._parted)
            if live and not self._open:
                return live[0]
            if self._end is not None and self._end.done():
                done = goal.length - len(self._open)
                raise ReplayDivergedError(f"the agent ended {_how(self._end.result())} after call {done}")
            return None

        pending = await self._until(arrived)
        self._waiting.remove(pending)
        self._goal = None
        return pending

    async def next_event(self) -> Pending | Ended:
        """Return the next request, or the agent's end. Waits at most as long as it may take between two requests."""

        def arrived() -> Pending | Ended | None:
            if self._end is not None and self._end.done():
                return self._end.result()  # requests that still wait belong to nobody
            return self._waiting.popleft() if self._waiting else None

        return await self._until(arrived)

    async def _until(self, arrived: Callable[[], _Event | None]) -> _Event:
        try:
            # A replay goes through all its calls within one wait.
            async with asyncio.timeout(self.timeout_s * (1 + len(self._open))):
                while (found := arrived()) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return found
        except TimeoutError:
            raise EnvTimeoutError(
                f"the agent neither asked for a turn nor ended within env.args.turn_timeout_s={self.timeout_s:g}"
            ) from None

    def give(self, pending: Pending, answer: Answer) -> None:
        """Answer a live request."""
        self._keep(Exchange(key=pending.place.key, request=pending.request, answer=answer))
        if not pending.answer.done():
            pending.answer.set_result(answer)

    def _keep(self, exchange: Exchange) -> None:
        self.record.append(exchange)
        self._conversation.add(exchange.key, exchange.answer)

    def in_own_tokens(self, message: ChatMessage) -> Message:
        """Return a message for the template, the policy's own words in the tokens that it wrote."""
        return replace(message.as_text(), token_ids=self._conversation.tokens_of(message))

    async def receive(self, request: ModelRequest, *, is_retry: bool) -> Answer:
        """Return the answer to a request from the endpoint, from the record or from the policy.

        `is_retry`: the client says that it asks the same once more. Raises RolloutOverError after the end.
        """
        if self._is_closed:
            raise RolloutOverError
        place = self._conversation.place(request)
        if is_retry and (known := self._answer_under_way(place)) is not None:
            return await asyncio.shield(known)
        if self._goal is not None:
            replayed = self._from_record(place)
            if replayed is not None:
                return replayed
            self._check_known(replace(request, messages=place.new), place)
        pending = Pending(replace(request, messages=place.new), place, asyncio.get_running_loop().create_future())
        self._waiting.append(pending)
        self._asked.append(pending)
        self._changed.set()
        return await pending.answer

    def _answer_under_way(self, place: Place) -> "asyncio.Future[Answer] | None":
        """Return the last answer to the same request, given or to come."""
        return next((one.answer for one in reversed(self._asked) if one.place.key == place.key), None)

    def _from_record(self, place: Place) -> Answer | None:
        assert self._goal is not None
        for index in sorted(self._open):
            exchange = self._goal.record[index]
            if exchange.key == place.key:
                self._open.discard(index)
                self._conversation.add(exchange.key, exchange.answer)
                self._changed.set()
                return exchange.answer
        return None

    def _check_known(self, request: ModelRequest, place: Place) -> None:
        """Note that the replay has parted from the recorded run, if that never made this request.

        Several requests at once may come in another order, so one that the recorded run made later is no parting.
        """
        goal = self._goal
        assert goal is not None
        if place.key == goal.pending.place.key or any(one.key == place.key for one in goal.record):
            return
        number = goal.length - len(self._open)
        expected = goal.record[min(self._open)].request if self._open else goal.pending.request
        self._parted = f"call {number + 1} of the replay is another one: {first_difference(expected, request)}"
        self._changed.set()

    async def close(self) -> None:
        """End the agent and refuse whatever it still asks. A second call does nothing more."""
        self._is_closed = True
        if self._access is not None:
            self.endpoint.close(self._access)
        for pending in self._asked:
            if not pending.answer.done():
                pending.answer.set_exception(RolloutOverError())
                pending.answer.exception()  # whoever asked may be gone; then nobody else looks at it
        if self._running is not None:
            await self._running.stop()
        if self._end is not None:
            self._end.cancel()
            await asyncio.wait([self._end])


def _how(end: Ended) -> str:
    return f"with {end.failure}" if end.failure is not None else "by itself"


def first_difference(expected: ModelRequest, found: ModelRequest) -> str:
    """Say in words where the new messages of two requests part."""
    if expected.tools != found.tools:
        return "it has other tools"
    for number, (old, new) in enumerate(zip(expected.messages, found.messages, strict=False)):
        if old != new:
            return f"new message {number} was {_shown(old)} and is {_shown(new)}"
    return f"it has {len(found.messages)} new messages, and had {len(expected.messages)}"


def _shown(message: ChatMessage) -> str:
    text = message.content or ", ".join(call.name for call in message.calls)
    return f"{message.role} {text[:_SHOWN_CHARS]!r}"
