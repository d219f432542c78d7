"""Play tasks of an environment under limits, and note in words what breaks the contract on the way."""

import inspect
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, Literal, TypeVar

from envs import describe
from trace_async.config import EnvConfig
from trace_async.env import Demonstrator, Domain, Env, EnvError, EnvValueError
from trace_async.rollout.call_threads import OutranLimitError
from trace_async.rollout.guard import invoked, within
from trace_async.rollout.loop_watch import LoopWatch
from trace_async.rollout.values import checked_prompt, checked_result
from trace_async.types import Message, Prompt, StepResult, Task

_Answer = TypeVar("_Answer")

_MAX_CHARS = 1_000_000
_STEP_TIMEOUT_S = 60.0
_SLOW_STRETCH_S = 0.25


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    level: Literal["error", "warning", "info"]
    """error: the contract is broken, and training would go wrong | warning: worth a look | info: measured."""
    text: str
    """What it is, in words."""


@dataclass(slots=True)
class Play:
    """What one playing of a task brought: everything that must be the same at a repetition."""

    prompt: tuple[Message, ...] = ()
    results: list[StepResult] = field(default_factory=list)

    @property
    def reward(self) -> float | None:
        return self.results[-1].reward if self.results else None


class BrokenError(Exception):
    """The environment broke its contract in the middle of a play; the text says how."""


class HangsError(BrokenError):
    """A call did not end within its limit; nothing more is tried, since every further one may take as long."""


class Player:
    """Plays tasks of one domain, turn by turn. What it notes is in `findings`, and how long steps took in `seconds`."""

    def __init__(self, domain: Domain, rng: Random, settings: EnvConfig) -> None:
        self.findings: list[Finding] = []
        self.seconds: list[float] = []
        self._domain = domain
        self._rng = rng
        low, high = settings.reward_range
        self._reward_range = (low, high)
        self._limit_s = min(_STEP_TIMEOUT_S, settings.step_timeout_s)
        # What runs in threads may wait as it likes; here it is played in the loop all the same.
        self._may_block = settings.blocking or bool(getattr(domain, "blocking", False))
        self._watch = LoopWatch(self._holds_loop, slow_s=_SLOW_STRETCH_S)
        self._reported: set[str] = set()

    def report(self, level: Literal["error", "warning", "info"], text: str) -> None:
        """Add one finding."""
        self.findings.append(Finding(level, text))

    async def play(self, task: Task, turns: Sequence[str], *, truncated: bool = False) -> Play:
        """Start `task`, take `turns` until it is over, and close it."""
        env = self.make_env(task)
        try:
            play = await self.init(env)
            await self.go_on(env, turns, play, truncated=truncated)
        finally:
            await self.awaited("close", env.close)
        return play

    def make_env(self, task: Task) -> Env:
        """Make the environment of a task. Raises BrokenError where the domain gives none."""
        self._watch.enter("make_env()")
        try:
            return checked_env(called("make_env", lambda: self._domain.make_env(task)), "make_env")
        finally:
            self._watch.leave()

    def demonstrate(self, task: Task, rng: Random) -> list[str]:
        """Return the turns of one of the domain's own demonstrations."""
        assert isinstance(self._domain, Demonstrator)
        domain = self._domain
        return list(called("demonstrate", lambda: domain.demonstrate(task, rng), Sequence))

    async def init(self, env: Env) -> Play:
        """Start a task. Returns a play that holds its prompt and no turn yet."""
        prompt = plain("init", partial(checked_prompt, await self.awaited("init", env.init, Prompt)))
        if not prompt.messages or prompt.messages[-1].role != "user":
            raise BrokenError("init gives a prompt that does not end with a user message")
        return Play(prompt.messages)

    async def go_on(self, env: Env, turns: Sequence[str], play: Play, *, truncated: bool = False) -> None:
        """Take `turns` until the task is over, and add their results to `play`."""
        for turn in turns:
            if play.reward is not None:
                return
            started = time.perf_counter()
            what = f"step({turn[:60]!r})"
            result = await self.awaited(what, partial(env.step, turn, truncated=truncated), StepResult)
            self.seconds.append(time.perf_counter() - started)
            result = self._checked_result(what, result)
            if any(message.role == "assistant" for message in result.messages):
                raise BrokenError("an observation has the role assistant")
            play.results.append(result)

    def random_turns(self, task: Task) -> list[str]:
        """Return six turns of up to twelve random words, among them those of a demonstration."""
        words = ["answer", "search", "[", "]", "<answer>", "</answer>", "the", "42", "yes", "no", "done", "guess"]
        if isinstance(self._domain, Demonstrator):
            words += [word for turn in self.demonstrate(task, self._rng) for word in turn.split()]
        return [" ".join(self._rng.choices(words, k=self._rng.randint(1, 12))) for _ in range(6)]

    async def awaited(self, what: str, call: Callable[[], Awaitable[_Answer]], of: type | None = None) -> _Answer:
        """Return the answer of one call. Raises BrokenError where it raises, HangsError where it outruns its limit, and
        BrokenError where the answer is not one `of` this type."""
        try:
            work: Coroutine[Any, Any, _Answer] = self._watch.drive(what, invoked(call))
            answer = await within(self._limit_s, work)
        except OutranLimitError as error:
            raise HangsError(f"{what} takes longer than {self._limit_s:g} s") from error
        except EnvError as error:
            if isinstance(error.__cause__, BaseException) and str(error).startswith("raised "):
                raise BrokenError(f"{what} raises {str(error).removeprefix('raised ')}") from error
            raise
        except Exception as error:
            raise BrokenError(f"{what} raises {describe(error)}") from error
        if of is not None and not isinstance(answer, of):
            raise BrokenError(f"{what} gives {kind(answer)} instead of {of.__name__}")
        return answer

    def _checked_result(self, what: str, given: StepResult) -> StepResult:
        result = plain(what, partial(checked_result, given, self._reward_range))
        if result.done:
            self._convert("the reward", given.reward, result.reward)
            for name, value in given.metrics.items():
                self._convert(f"the metric {name!r}", value, float(value))
        longest = max((len(message.content) for message in result.messages), default=0)
        if longest > _MAX_CHARS and "long" not in self._reported:
            self._reported.add("long")
            self.report(
                "warning",
                f"an observation has {longest:,} characters: all but the first few thousand are cut "
                "(sampling.max_observation_tokens); cut it in the environment, by what matters",
            )
        return result

    def _holds_loop(self, what: str, seconds: float) -> None:
        method = what.partition("(")[0]
        if not self._may_block and method not in self._reported:
            self._reported.add(method)
            self.report(
                "error",
                f"{method} held the event loop for {seconds:.1f} s: it waits or computes without await (time.sleep, "
                "requests), and every other prompt of the process stands still. Make it asynchronous, or set "
                "env.blocking=true (or `blocking = True` on the domain): then it runs in a thread",
            )

    def _convert(self, what: str, given: object, plain: object) -> None:
        """Tell once of a value that has a plain meaning but not the type that the contract names."""
        if type(given) is not type(plain) and what not in self._reported:
            self._reported.add(what)
            self.report("warning", f"{what} is a {type(given).__name__}: {plain!r} is taken for it")


def must_be_equal(one: Play, other: Play, problem: str) -> None:
    """Raise BrokenError with `problem` and the first turn that differs, unless both plays went alike."""
    if one.prompt != other.prompt:
        raise BrokenError("the prompt is another one when the task is started again; it must not change")
    if one.results != other.results:
        pairs = zip(one.results, other.results, strict=False)
        turn = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), len(other.results))
        raise BrokenError(f"{problem} (turn {turn})")


def called(what: str, call: Callable[[], _Answer], of: type | None = None) -> _Answer:
    """Return the answer of a synchronous call of somebody else's code. Raises BrokenError."""
    try:
        answer = call()
    except BaseException as error:  # somebody else's code
        if isinstance(error, KeyboardInterrupt):
            raise
        raise BrokenError(f"{what} raises {describe(error)}") from error
    if of is not None and not isinstance(answer, of):
        raise BrokenError(f"{what} gives {kind(answer)} instead of {of.__name__}")
    return answer


def plain(what: str, check: Callable[[], _Answer]) -> _Answer:
    """Run one of the checks of values. Raises BrokenError in place of EnvValueError."""
    try:
        return check()
    except EnvValueError as error:
        raise BrokenError(f"{what}: {error}") from error


def checked_env(env: Env, what: str) -> Env:
    """Return `env`. Raises BrokenError when it lacks a method that an environment must have."""
    methods = ("init", "step", "fork", "close")
    lacks = [name for name in methods if not inspect.iscoroutinefunction(getattr(env, name, None))]
    if lacks:
        raise BrokenError(f"{what} gives {kind(env)} without async {', '.join(lacks)}")
    return env


def kind(value: object) -> str:
    """Say in words of which type a value is."""
    return "None" if value is None else f"a {type(value).__name__}"
