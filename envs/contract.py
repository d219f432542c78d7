"""Check whether an environment keeps the contract of `trace_async/env.py`: play it in many ways, report in words."""

import asyncio
import contextlib
import gc
import inspect
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Literal, TypeVar

from envs import describe
from envs.tasks import load_splits
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import Demonstrator, Domain, Env, EnvError, EnvValueError
from trace_async.printable import one_line
from trace_async.rollout.call_threads import OutranLimitError
from trace_async.rollout.guard import invoked, within
from trace_async.rollout.loop_watch import LoopWatch
from trace_async.rollout.values import checked_prompt, checked_result, shown_task
from trace_async.types import Message, Prompt, StepResult, Task

_Answer = TypeVar("_Answer")

_MAX_TURNS = 200
_MAX_CHARS = 1_000_000
_STEP_TIMEOUT_S = 60.0
_SLOW_STEP_S = 1.0
_SLOW_STRETCH_S = 0.25
_ODD_TEXTS = (
    *("", " ", "\n\t", "\x00\x1b[31m", "\ufffd\u2028\U0001f600", "[" * 3000, "{" * 3000, "}" * 3000, "<" * 3000),
    *('"' * 3000, "a" * 100_000, "[] " * 30_000, "<answer>", "</answer>", "answer [", "search [ ]", "<python>"),
    *("<tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>null</tool_call>", "<|im_end|>", "done"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found."""

    level: Literal["error", "warning", "info"]
    """error: the contract is broken, and training would go wrong | warning: worth a look | info: measured."""
    text: str
    """What it is, in words."""


@dataclass(slots=True)
class _Play:
    """What one playing of a task brought: everything that must be the same at a repetition."""

    prompt: tuple[Message, ...] = ()
    results: list[StepResult] = field(default_factory=list)

    @property
    def reward(self) -> float | None:
        return self.results[-1].reward if self.results else None


class _BrokenError(Exception):
    """The environment broke its contract in the middle of a play; the text says how."""


class _HangsError(_BrokenError):
    """A call did not end within its limit; nothing more is tried, since every further one may take as long."""


def check_domain(
    domain: Domain, *, num_tasks: int = 10, seed: int = 0, settings: EnvConfig | None = None
) -> list[Finding]:
    """Play `num_tasks` tasks of each split with demonstrations (if there are any), random words and odd texts."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(_Check(domain, num_tasks, seed, settings or EnvConfig()).run())
    finally:
        # Not asyncio.run: it would wait for ever for a call that swallows its cancellation.
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left, timeout=2.0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


class _Check:
    def __init__(self, domain: Domain, num_tasks: int, seed: int, settings: EnvConfig) -> None:
        self._domain = domain
        low, high = settings.reward_range
        self._reward_range = (low, high)
        self._limit_s = min(_STEP_TIMEOUT_S, settings.step_timeout_s)
        # What runs in threads may wait as it likes; here it is played in the loop all the same.
        self._may_block = settings.blocking or bool(getattr(domain, "blocking", False))
        self._watch = LoopWatch(self._holds_loop, slow_s=_SLOW_STRETCH_S)
        self._told: set[str] = set()
        self._num_tasks = num_tasks
        self._rng = Random(seed)
        self._findings: list[Finding] = []
        self._seconds: list[float] = []

    async def run(self) -> list[Finding]:
        tasks: list[Task] = []
        try:
            tasks = self._check_tasks()
        except _BrokenError as error:
            self._add("error", str(error))
        try:
            await self._check_plays(tasks)
        except _HangsError:
            self._add("warning", "the rest was not tried: what hangs once would hold up the check for long")
        close = getattr(self._domain, "close", None)
        if close is not None:
            with contextlib.suppress(_HangsError):  # nothing comes after it
                await self._guarded(self._awaited("the domain's close", close), "the domain")
        return list(dict.fromkeys(self._findings))

    async def _check_plays(self, tasks: list[Task]) -> None:
        if tasks:
            firsts = list({task.domain: task for task in reversed(tasks)}.values())
            for task in firsts:
                await self._guarded(self._check_task(task), f"task {task.id}")
            before = _resources()  # the first task of a domain may start what the domain keeps
            for task in tasks:
                if task not in firsts:
                    await self._guarded(self._check_task(task), f"task {task.id}")
            await self._guarded(self._check_verifier(tasks), "verifier")
            own_check = getattr(self._domain, "check", None)  # what only this kind of domain can get wrong
            if own_check is not None:
                self._findings += await own_check(tasks)
            self._check_leaks(before)
            self._check_time()

    async def _guarded(self, check: Coroutine[None, None, None], what: str) -> None:
        try:
            await check
        except _BrokenError as error:
            self._add("error", f"{what}: {error}")
            if isinstance(error, _HangsError):
                raise
        except EnvError as error:
            self._add("error", f"{what}: the environment itself broke down: {error}")

    def _holds_loop(self, what: str, seconds: float) -> None:
        method = what.partition("(")[0]
        if not self._may_block and method not in self._told:
            self._told.add(method)
            self._add(
                "error",
                f"{method} held the event loop for {seconds:.1f} s: it waits or computes without await (time.sleep, "
                "requests), and every other prompt of the process stands still. Make it asynchronous, or set "
                "env.blocking=true (or `blocking = True` on the domain): then it runs in a thread",
            )

    def _convert(self, what: str, given: object, plain: object) -> None:
        """Tell once of a value that has a plain meaning but not the type that the contract names."""
        if type(given) is not type(plain) and what not in self._told:
            self._told.add(what)
            self._add("warning", f"{what} is a {type(given).__name__}: {plain!r} is taken for it")

    def _add(self, level: Literal["error", "warning", "info"], text: str) -> None:
        self._findings.append(Finding(level, text))

    def _check_tasks(self) -> list[Task]:
        """Check the lists of tasks. Returns a sample of both splits."""
        lacks = [name for name in ("name", "tasks", "make_env") if not hasattr(self._domain, name)]
        if lacks:
            raise _BrokenError(f"the domain {type(self._domain).__name__} has no {', '.join(lacks)}")
        sample: list[Task] = []
        known: dict[str, str] = {}
        for split in ("train", "heldout"):
            tasks = _called(f"tasks({split!r})", partial(self._domain.tasks, split), Sequence)
            self._add("info", f"{len(tasks)} tasks in {split}")
            if not len(tasks):
                self._add("error", f"the split {split} has no tasks")
                continue
            some = [tasks[i] for i in self._rng.sample(range(len(tasks)), min(len(tasks), 200))]
            for task in some:
                if not isinstance(task, Task):
                    raise _BrokenError(f"tasks({split!r}) holds {_kind(task)} instead of Task")
            again = self._domain.tasks(split)
            first = range(min(20, len(tasks)))
            if len(again) != len(tasks) or any(_shown(tasks[i]) != _shown(again[i]) for i in first):
                self._add("error", f"tasks({split!r}) gives other tasks the second time")
            for task in some:
                shown = shown_task(task)
                own = [shown.id] + ([repr(shown.data)] if shown.data else [])
                if any(known.setdefault(name, split) != split for name in own):
                    self._add("error", f"task {one_line(shown.id)} is in train and in heldout")
            if len({shown_task(task).id for task in some}) < len(some):
                self._add("error", f"two tasks of {split} have the same id")
            sample += some[: self._num_tasks]
        try:
            for note in load_splits(self._domain).notes:
                self._add("warning", note)
        except ConfigError as error:
            self._add("error", str(error))
        return sample

    async def _check_task(self, task: Task) -> None:
        scripts = [self._random_turns(task) for _ in range(2)]
        if isinstance(self._domain, Demonstrator):
            scripts.insert(0, self._demonstrate(task, Random(f"{task.id}")))
        for turns in scripts:
            first = await self._play(task, turns)
            self._compare(first, await self._play(task, turns), "the same turns, played again, give another result")
            for fork_after in {0, len(first.results) // 2, max(0, len(first.results) - 1)}:
                await self._check_fork(task, turns, first, fork_after)
        await self._check_odd_texts(task)

    async def _check_fork(self, task: Task, turns: Sequence[str], first: _Play, fork_after: int) -> None:
        env = self._make_env(task)
        forks: list[Env] = []
        try:
            original = await self._init(env)
            await self._go_on(env, turns[:fork_after], original)
            forks = [_checked_env(await self._awaited("fork", env.fork), "fork") for _ in range(3)]
            other = _Play(original.prompt)
            await self._go_on(forks[0], [*self._random_turns(task), *turns], other)
            await self._awaited("close", forks[0].close)
            same = _Play(original.prompt, [*original.results])
            await self._go_on(forks[1], turns[fork_after:], same)
            self._compare(
                first, same, f"forks after turn {fork_after} see each other: the second one goes on differently"
            )
            await self._go_on(env, turns[fork_after:], original)
            self._compare(first, original, f"an environment forked after turn {fork_after} sees what its forks did")
            late = _Play(original.prompt, original.results[:fork_after])
            await self._go_on(forks[2], turns[fork_after:], late)
            self._compare(first, late, f"a fork after turn {fork_after} sees later turns of what it was forked from")
        finally:
            for one in (env, *forks):
                await self._awaited("close", one.close)

    async def _check_odd_texts(self, task: Task) -> None:
        for odd in _ODD_TEXTS:
            play = await self._play(task, [odd], truncated=odd == "done")
            if play.reward:
                self._add("error", f"task {task.id}: the turn {odd[:20]!r} alone is rewarded with {play.reward}")
        env = self._make_env(task)
        play = await self._init(env)
        await self._go_on(env, [self._rng.choice(_ODD_TEXTS[:9]) for _ in range(_MAX_TURNS)], play)
        for _ in range(2):
            await self._awaited("close", env.close)
        if play.reward is None:
            self._add(
                "error", f"task {task.id}: not over after {_MAX_TURNS} useless turns; end it after a number of turns"
            )

    async def _check_verifier(self, tasks: Sequence[Task]) -> None:
        lucky = [(await self._play(task, self._random_turns(task))).reward for task in tasks for _ in range(3)]
        share = sum(bool(reward) for reward in lucky) / len(lucky)
        if share > 0.05:
            self._add("error", f"random turns are rewarded in {share:.0%} of the plays")
        if not isinstance(self._domain, Demonstrator):
            self._add("info", "no demonstrations: needs a policy from policy.path")
            return
        shown = []
        for task in tasks:
            for seed in range(3):
                turns = self._demonstrate(task, Random(seed))
                play = await self._play(task, turns)
                if play.reward is None or len(play.results) != len(turns):
                    self._add("error", f"task {task.id}: a demonstration does not end with the task")
                shown.append(play.reward or 0.0)
        mean = sum(shown) / len(shown)
        self._add("info", f"demonstrations are rewarded with {mean:.2f} on average")
        if mean == 0:
            self._add("error", "no demonstration is ever rewarded: is the verifier right?")
        elif mean == 1:
            self._add("warning", "every demonstration succeeds: a policy taught by them has little left to learn")

    async def _play(self, task: Task, turns: Sequence[str], *, truncated: bool = False) -> _Play:
        env = self._make_env(task)
        try:
            play = await self._init(env)
            await self._go_on(env, turns, play, truncated=truncated)
        finally:
            await self._awaited("close", env.close)
        return play

    async def _awaited(self, what: str, call: Callable[[], Awaitable[_Answer]], kind: type | None = None) -> _Answer:
        try:
            work: Coroutine[Any, Any, _Answer] = self._watch.drive(what, invoked(call))
            answer = await within(self._limit_s, work)
        except OutranLimitError as error:
            raise _HangsError(f"{what} takes longer than {self._limit_s:g} s") from error
        except EnvError as error:
            if isinstance(error.__cause__, BaseException) and str(error).startswith("raised "):
                raise _BrokenError(f"{what} raises {str(error).removeprefix('raised ')}") from error
            raise
        except Exception as error:
            raise _BrokenError(f"{what} raises {describe(error)}") from error
        if kind is not None and not isinstance(answer, kind):
            raise _BrokenError(f"{what} gives {_kind(answer)} instead of {kind.__name__}")
        return answer

    def _make_env(self, task: Task) -> Env:
        self._watch.enter("make_env()")
        try:
            return _checked_env(_called("make_env", lambda: self._domain.make_env(task)), "make_env")
        finally:
            self._watch.leave()

    def _demonstrate(self, task: Task, rng: Random) -> list[str]:
        assert isinstance(self._domain, Demonstrator)
        domain = self._domain
        return list(_called("demonstrate", lambda: domain.demonstrate(task, rng), Sequence))

    async def _init(self, env: Env) -> _Play:
        prompt = _plain("init", partial(checked_prompt, await self._awaited("init", env.init, Prompt)))
        if not prompt.messages or prompt.messages[-1].role != "user":
            raise _BrokenError("init gives a prompt that does not end with a user message")
        return _Play(prompt.messages)

    async def _go_on(self, env: Env, turns: Sequence[str], play: _Play, *, truncated: bool = False) -> None:
        for turn in turns:
            if play.reward is not None:
                return
            started = time.perf_counter()
            what = f"step({turn[:60]!r})"
            result = await self._awaited(what, partial(env.step, turn, truncated=truncated), StepResult)
            self._seconds.append(time.perf_counter() - started)
            result = self._checked_result(what, result)
            if any(message.role == "assistant" for message in result.messages):
                raise _BrokenError("an observation has the role assistant")
            play.results.append(result)

    def _checked_result(self, what: str, given: StepResult) -> StepResult:
        result = _plain(what, partial(checked_result, given, self._reward_range))
        if result.done:
            self._convert("the reward", given.reward, result.reward)
            for name, value in given.metrics.items():
                self._convert(f"the metric {name!r}", value, float(value))
        longest = max((len(message.content) for message in result.messages), default=0)
        if longest > _MAX_CHARS and "long" not in self._told:
            self._told.add("long")
            self._add(
                "warning",
                f"an observation has {longest:,} characters: all but the first few thousand are cut "
                "(sampling.max_observation_tokens); cut it in the environment, by what matters",
            )
        return result

    def _random_turns(self, task: Task) -> list[str]:
        words = ["answer", "search", "[", "]", "<answer>", "</answer>", "the", "42", "yes", "no", "done", "guess"]
        if isinstance(self._domain, Demonstrator):
            words += [word for turn in self._demonstrate(task, self._rng) for word in turn.split()]
        return [" ".join(self._rng.choices(words, k=self._rng.randint(1, 12))) for _ in range(6)]

    def _compare(self, one: _Play, other: _Play, problem: str) -> None:
        if one.prompt != other.prompt:
            raise _BrokenError("the prompt is another one when the task is started again; it must not change")
        if one.results != other.results:
            pairs = zip(one.results, other.results, strict=False)
            turn = next((number for number, (a, b) in enumerate(pairs, 1) if a != b), len(other.results))
            raise _BrokenError(f"{problem} (turn {turn})")

    def _check_leaks(self, before: dict[str, int]) -> None:
        for name, number in _resources().items():
            allowed = before[name] + 2
            if number > allowed:
                self._add(
                    "error",
                    f"{name} left open: {number}, after the first tasks {allowed - 2}; give them back in close()",
                )

    def _check_time(self) -> None:
        if self._seconds:
            mean, worst = sum(self._seconds) / len(self._seconds), max(self._seconds)
            self._add("info", f"a step takes {1000 * mean:.2f} ms on average, {1000 * worst:.1f} ms at most")
            if mean > _SLOW_STEP_S:
                self._add("warning", f"steps take {mean:.1f} s on average: rollouts will wait for the environment")


def _shown(task: Task) -> str:
    """Return what tasks are compared by: plain values, because arrays have no truth value."""
    return repr(shown_task(task))


def _called(what: str, call: Callable[[], _Answer], kind: type | None = None) -> _Answer:
    try:
        answer = call()
    except BaseException as error:  # somebody else's code
        if isinstance(error, KeyboardInterrupt):
            raise
        raise _BrokenError(f"{what} raises {describe(error)}") from error
    if kind is not None and not isinstance(answer, kind):
        raise _BrokenError(f"{what} gives {_kind(answer)} instead of {kind.__name__}")
    return answer


def _plain(what: str, check: Callable[[], _Answer]) -> _Answer:
    try:
        return check()
    except EnvValueError as error:
        raise _BrokenError(f"{what}: {error}") from error


def _checked_env(env: Env, what: str) -> Env:
    """Return `env`. Raises _BrokenError when it lacks a method that an environment must have."""
    methods = ("init", "step", "fork", "close")
    lacks = [name for name in methods if not inspect.iscoroutinefunction(getattr(env, name, None))]
    if lacks:
        raise _BrokenError(f"{what} gives {_kind(env)} without async {', '.join(lacks)}")
    return env


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _resources() -> dict[str, int]:
    gc.collect()
    children = 0
    for thread in Path("/proc/self/task").iterdir():
        children += len((thread / "children").read_text().split())
    return {
        "file descriptors": len(os.listdir("/proc/self/fd")),
        "child processes": children,
        "asyncio tasks": len(asyncio.all_tasks()),
    }
