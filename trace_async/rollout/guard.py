"""Guard every method of an environment: of somebody else's code comes a plain value, or an EnvError with words.

| an environment may  | then                                                                                   |
|---------------------|----------------------------------------------------------------------------------------|
| raise anything      | EnvError, naming environment, task and method                                          |
| hang                | cancelled at the method's limit, EnvTimeoutError; the others go on                     |
| give odd values     | converted where the meaning is plain (rollout/values.py), else EnvValueError           |
| block the loop      | told once; with `env.blocking` every call gets a thread of its own, unless the         |
|                     | environment has `blocking = False`: its state belongs to one event loop                |
| fail to close       | counted; the rollout keeps its reward                                                  |
"""

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from trace_async.config import EnvConfig
from trace_async.env import (
    AskingEnv,
    Domain,
    Env,
    EnvError,
    EnvTimeoutError,
    EnvValueError,
    PromptTooLongError,
    ReplayDivergedError,
)
from trace_async.printable import one_line, printable
from trace_async.rollout.call_threads import STOP_GRACE_S, CallThreads, OutranLimitError
from trace_async.rollout.limit_clock import begun, wait_for_work
from trace_async.rollout.loop_watch import LoopWatch
from trace_async.rollout.values import ConvertedTask, RewardRange, checked_prompt, checked_result, checked_task
from trace_async.trees.tree import Fault
from trace_async.types import LossKind, PolicyTurn, Prompt, StepResult, Task, TurnLimits

log = logging.getLogger(__name__)
T = TypeVar("T")

# An environment may raise an EnvError of a class of its own; it becomes the class of ours with the same kind of loss.
_OURS: dict[LossKind, type[EnvError]] = {
    kind.loss: kind for kind in (EnvTimeoutError, EnvValueError, PromptTooLongError, ReplayDivergedError)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvLimits:
    """What is asked of an environment, as the settings of `env` say it. Times are seconds for each call."""

    init_s: float = 120.0
    """For `make_env` and for `init`."""
    step_s: float = 120.0
    """For `step`, `answer` and `next_limits`."""
    fork_s: float = 60.0
    close_s: float = 30.0
    blocking: bool = False
    """Its methods hold the thread that they run in, so each call gets one of its own."""
    reward_range: RewardRange = (0.0, 1.0)
    """The lowest and the highest reward; rewards are mapped from there to [0, 1]."""

    def of(self, method: str) -> tuple[str, float]:
        """Return the setting that bounds a method, and the seconds."""
        setting = {"make_env": "init", "answer": "step", "next_limits": "step"}.get(method, method)
        return f"env.{setting}_timeout_s", getattr(self, f"{setting}_s")


def make_guard(settings: EnvConfig, domain: Domain) -> "EnvGuard":
    """Make the guard of a domain, as the settings of `env` and the domain itself ask for it."""
    low, high = settings.reward_range
    limits = EnvLimits(
        init_s=settings.init_timeout_s,
        step_s=settings.step_timeout_s,
        fork_s=settings.fork_timeout_s,
        close_s=settings.close_timeout_s,
        blocking=settings.blocking or bool(getattr(domain, "blocking", False)),
        reward_range=(low, high),
    )
    return EnvGuard(domain.make_env, limits)


class EnvGuard:
    """Makes guarded environments of one domain."""

    def __init__(self, make_env: Callable[[Task], Env], limits: EnvLimits | None = None) -> None:
        self.limits = limits or EnvLimits()
        self.watch = LoopWatch(self._holds_loop)
        self._make_env = make_env
        self._threads = CallThreads() if self.limits.blocking else None
        self._notes: dict[str, Fault] = {}

    async def make(self, task: Task) -> "GuardedEnv":
        """Make a fresh environment. Raises EnvError."""
        original = task.original if isinstance(task, ConvertedTask) else task
        env = await self.call(task, "make_env", partial(self._make_env, original), partial(self._checked_env, task))
        return GuardedEnv(self, task, env)

    def _checked_env(self, task: Task, env: Env) -> Env:
        checked_task(task)
        return whole_env(env)

    async def call(
        self,
        task: Task,
        method: str,
        call: Callable[[], Awaitable[Any] | Any],
        check: Callable[[Any], T],
        *,
        in_loop: bool = False,
    ) -> T:
        """Return the checked answer of one method. `in_loop`: also where others get a thread. Raises EnvError."""
        where = f"{named(task)}: {method}()"
        setting, limit_s = self.limits.of(method)
        try:
            if self._threads is not None and not in_loop:
                answer = await self._threads.run(call, limit_s)
            else:
                answer = await within(limit_s, self.watch.drive(where, invoked(call)))
            return check(answer)
        except OutranLimitError:
            raise EnvTimeoutError(f"{where} did not end within {setting}={limit_s:g}", method=method) from None
        except EnvError as error:
            raise _OURS.get(error.loss, EnvError)(f"{where}: {printable(str(error), 2_000)}", method=method) from error
        except BaseException as error:
            # Somebody else's code: it may raise anything, sys.exit() and a panic in Rust included.
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | GeneratorExit):
                raise
            raise EnvError(f"{where} raised {words_of(error)}", method=method) from error

    def note(self, what: str, words: str) -> None:
        """Count something that costs no rollout; the words of the first time are kept and logged."""
        before = self._notes.get(what)
        if before is None:
            log.warning("%s", words)
            before = Fault(0, words)
        self._notes[what] = replace(before, count=before.count + 1)

    def take_notes(self) -> dict[str, Fault]:
        """Return what was noted since this was last asked."""
        notes, self._notes = self._notes, {}
        return notes

    def _holds_loop(self, where: str, seconds: float) -> None:
        method = where.rpartition(" ")[2].removesuffix("()")
        self.note(
            f"{method}.holds_loop",
            f"{where} kept all other prompts of its process waiting for {seconds:.1f} s: it waits without await "
            "(time.sleep, requests, a long computation). Make it asynchronous, or set env.blocking=true, which runs "
            "this environment's methods in threads",
        )


class GuardedEnv:
    """One environment of a task, behind its guard."""

    def __init__(self, guard: EnvGuard, task: Task, env: Env) -> None:
        self._guard = guard
        self._task = task
        self._env = env
        self._asking = env if isinstance(env, AskingEnv) else None
        self._in_loop = getattr(env, "blocking", None) is False

    async def init(self) -> Prompt:
        return await self._call("init", self._env.init, checked_prompt)

    async def next_limits(self) -> TurnLimits:
        """Return what the environment asks of the next turn; nothing where it leaves all to the run."""
        if self._asking is None:
            return TurnLimits()
        return await self._call("next_limits", self._asking.next_limits, _checked_limits)

    async def step(self, turn: PolicyTurn) -> StepResult:
        """Carry out one turn of the policy. The reward is in [0, 1], whatever `env.reward_range` is."""
        check = partial(checked_result, reward_range=self._guard.limits.reward_range)
        if self._asking is not None:
            return await self._call("answer", partial(self._asking.answer, turn), check)
        step = partial(self._env.step, turn.text, truncated=turn.truncated)
        return await self._call("step", step, check)

    async def fork(self) -> "GuardedEnv":
        env = await self._call("fork", self._env.fork, whole_env)
        return GuardedEnv(self._guard, self._task, env)

    async def close(self) -> None:
        """Close it. Never raises: a reward that the verifier gave stays, whatever becomes of the state afterwards."""
        try:
            await self._call("close", self._env.close, lambda _: None)
        except EnvError as error:
            self._guard.note(f"close.{error.loss}", str(error))

    async def _call(self, method: str, call: Callable[[], Awaitable[Any] | Any], check: Callable[[Any], T]) -> T:
        return await self._guard.call(self._task, method, call, check, in_loop=self._in_loop)


def whole_env(env: Env) -> Env:
    """Return the environment itself, when it has all methods that one must have. Raises EnvValueError."""
    lacks = [name for name in ("init", "step", "fork", "close") if not callable(getattr(env, name, None))]
    if lacks:
        raise EnvValueError(f"gives a {type(env).__name__} without {', '.join(lacks)}")
    return env


async def invoked(call: Callable[[], Awaitable[T] | T]) -> T:
    """Return what `call` gives, awaited where it can be. Raises EnvError for what would end the loop."""
    try:
        answer = call()
        return await answer if isinstance(answer, Awaitable) else answer
    except (SystemExit, BaseExceptionGroup) as error:
        # Either would end the event loop, and with it every prompt.
        raise EnvError(f"raised {words_of(error)}") from error
    except KeyboardInterrupt as error:
        if threading.current_thread() is threading.main_thread():
            raise  # somebody pressed Ctrl-C
        raise EnvError(f"raised {words_of(error)}") from error


async def within(limit_s: float, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` gives. Raises OutranLimitError after `limit_s` seconds, not counting those it waits for room.

    Unlike asyncio.wait_for it also comes back when the work does not let itself be cancelled.
    """
    task, clock = begun(work)
    try:
        await wait_for_work(task, clock, limit_s)
    finally:
        ended = task.done()
        if not ended:
            await cancel_for_good(task)
    if not ended:
        raise OutranLimitError
    if task.cancelled():
        raise EnvError("cancelled itself")
    try:
        return task.result()
    except GeneratorExit as error:  # it was raised in there; nobody is closing this coroutine
        raise EnvError("raised GeneratorExit") from error


async def cancel_for_good(task: "asyncio.Task[Any]") -> None:
    """Cancel `task`, and leave it behind if it goes on all the same."""
    task.cancel()
    await asyncio.wait({task}, timeout=STOP_GRACE_S)
    if not task.done():
        log.error("a call of an environment swallows its cancellation, and is left behind")
    # Its error is looked at, so that asyncio does not complain that nobody has.
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())


def _checked_limits(limits: object) -> TurnLimits:
    if not isinstance(limits, TurnLimits):
        raise EnvValueError(f"gives a {type(limits).__name__} instead of TurnLimits")
    return limits


def words_of(error: BaseException) -> str:
    """Return what was raised as text, even where its own words raise."""
    try:
        text = str(error)
    except Exception as inner:  # noqa: BLE001 - somebody else's __str__
        text = f"(its text raises {type(inner).__name__})"
    return f"{type(error).__name__}: {printable(text, 2_000)}" if text else type(error).__name__


def named(task: Task) -> str:
    """Return a task as errors name it; ids are data and may hold anything."""
    return f"environment {one_line(str(task.domain))}, task {one_line(str(task.id))}"
