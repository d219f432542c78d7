"""Check whether an environment keeps the contract of `trace_async/env.py`: play it in many ways, report in words."""

import asyncio
import contextlib
import gc
import os
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from random import Random

from envs.contract.plays import BrokenError, Finding, HangsError, Play, Player, called, checked_env, kind, must_be_equal
from envs.tasks import load_splits
from trace_async.config import ConfigError, EnvConfig
from trace_async.env import Demonstrator, Domain, Env, EnvError
from trace_async.printable import one_line
from trace_async.rollout.values import shown_task
from trace_async.types import Task

_MAX_TURNS = 200
_SLOW_STEP_S = 1.0
_ODD_TEXTS = (
    *("", " ", "\n\t", "\x00\x1b[31m", "\ufffd\u2028\U0001f600", "[" * 3000, "{" * 3000, "}" * 3000, "<" * 3000),
    *('"' * 3000, "a" * 100_000, "[] " * 30_000, "<answer>", "</answer>", "answer [", "search [ ]", "<python>"),
    *("<tool_call>", '<tool_call>{"name": 3}</tool_call>', "<tool_call>null</tool_call>", "<|im_end|>", "done"),
)


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
        self._num_tasks = num_tasks
        self._rng = Random(seed)
        self._player = Player(domain, self._rng, settings)
        self._report = self._player.report

    async def run(self) -> list[Finding]:
        tasks: list[Task] = []
        try:
            tasks = self._check_tasks()
        except BrokenError as error:
            self._report("error", str(error))
        try:
            await self._check_plays(tasks)
        except HangsError:
            self._report("warning", "the rest was not tried: what hangs once would hold up the check for long")
        close = getattr(self._domain, "close", None)
        if close is not None:
            with contextlib.suppress(HangsError):  # nothing comes after it
                await self._guarded(self._player.awaited("the domain's close", close), "the domain")
        return list(dict.fromkeys(self._player.findings))

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
                self._player.findings += await own_check(tasks)
            self._check_leaks(before)
            self._check_time()

    async def _guarded(self, check: Coroutine[None, None, None], what: str) -> None:
        try:
            await check
        except BrokenError as error:
            self._report("error", f"{what}: {error}")
            if isinstance(error, HangsError):
                raise
        except EnvError as error:
            self._report("error", f"{what}: the environment itself broke down: {error}")

    def _check_tasks(self) -> list[Task]:
        """Check the lists of tasks. Returns a sample of both splits."""
        lacks = [name for name in ("name", "tasks", "make_env") if not hasattr(self._domain, name)]
        if lacks:
            raise BrokenError(f"the domain {type(self._domain).__name__} has no {', '.join(lacks)}")
        sample: list[Task] = []
        known: dict[str, str] = {}
        for split in ("train", "heldout"):
            tasks = called(f"tasks({split!r})", partial(self._domain.tasks, split), Sequence)
            self._report("info", f"{len(tasks)} tasks in {split}")
            if not len(tasks):
                self._report("error", f"the split {split} has no tasks")
                continue
            some = [tasks[i] for i in self._rng.sample(range(len(tasks)), min(len(tasks), 200))]
            for task in some:
                if not isinstance(task, Task):
                    raise BrokenError(f"tasks({split!r}) holds {kind(task)} instead of Task")
            again = self._domain.tasks(split)
            first = range(min(20, len(tasks)))
            if len(again) != len(tasks) or any(_shown(tasks[i]) != _shown(again[i]) for i in first):
                self._report("error", f"tasks({split!r}) gives other tasks the second time")
            for task in some:
                shown = shown_task(task)
                own = [shown.id] + ([repr(shown.data)] if shown.data else [])
                if any(known.setdefault(name, split) != split for name in own):
                    self._report("error", f"task {one_line(shown.id)} is in train and in heldout")
            if len({shown_task(task).id for task in some}) < len(some):
                self._report("error", f"two tasks of {split} have the same id")
            sample += some[: self._num_tasks]
        try:
            for note in load_splits(self._domain).notes:
                self._report("warning", note)
        except ConfigError as error:
            self._report("error", str(error))
        return sample

    async def _check_task(self, task: Task) -> None:
        scripts = [self._player.random_turns(task) for _ in range(2)]
        if isinstance(self._domain, Demonstrator):
            scripts.insert(0, self._player.demonstrate(task, Random(f"{task.id}")))
        for turns in scripts:
            first = await self._player.play(task, turns)
            must_be_equal(
                first, await self._player.play(task, turns), "the same turns, played again, give another result"
            )
            for fork_after in {0, len(first.results) // 2, max(0, len(first.results) - 1)}:
                await self._check_fork(task, turns, first, fork_after)
        await self._check_odd_texts(task)

    async def _check_fork(self, task: Task, turns: Sequence[str], first: Play, fork_after: int) -> None:
        env = self._player.make_env(task)
        forks: list[Env] = []
        try:
            original = await self._player.init(env)
            await self._player.go_on(env, turns[:fork_after], original)
            forks = [checked_env(await self._player.awaited("fork", env.fork), "fork") for _ in range(3)]
            other = Play(original.prompt)
            await self._player.go_on(forks[0], [*self._player.random_turns(task), *turns], other)
            await self._player.awaited("close", forks[0].close)
            same = Play(original.prompt, [*original.results])
            await self._player.go_on(forks[1], turns[fork_after:], same)
            must_be_equal(
                first, same, f"forks after turn {fork_after} see each other: the second one goes on differently"
            )
            await self._player.go_on(env, turns[fork_after:], original)
            must_be_equal(first, original, f"an environment forked after turn {fork_after} sees what its forks did")
            late = Play(original.prompt, original.results[:fork_after])
            await self._player.go_on(forks[2], turns[fork_after:], late)
            must_be_equal(first, late, f"a fork after turn {fork_after} sees later turns of what it was forked from")
        finally:
            for one in (env, *forks):
                await self._player.awaited("close", one.close)

    async def _check_odd_texts(self, task: Task) -> None:
        for odd in _ODD_TEXTS:
            play = await self._player.play(task, [odd], truncated=odd == "done")
            if play.reward:
                self._report("error", f"task {task.id}: the turn {odd[:20]!r} alone is rewarded with {play.reward}")
        env = self._player.make_env(task)
        play = await self._player.init(env)
        await self._player.go_on(env, [self._rng.choice(_ODD_TEXTS[:9]) for _ in range(_MAX_TURNS)], play)
        for _ in range(2):
            await self._player.awaited("close", env.close)
        if play.reward is None:
            self._report(
                "error", f"task {task.id}: not over after {_MAX_TURNS} useless turns; end it after a number of turns"
            )

    async def _check_verifier(self, tasks: Sequence[Task]) -> None:
        lucky = [
            (await self._player.play(task, self._player.random_turns(task))).reward for task in tasks for _ in range(3)
        ]
        share = sum(bool(reward) for reward in lucky) / len(lucky)
        if share > 0.05:
            self._report("error", f"random turns are rewarded in {share:.0%} of the plays")
        if not isinstance(self._domain, Demonstrator):
            self._report("info", "no demonstrations: needs a policy from policy.path")
            return
        shown = []
        for task in tasks:
            for seed in range(3):
                turns = self._player.demonstrate(task, Random(seed))
                play = await self._player.play(task, turns)
                if play.reward is None or len(play.results) != len(turns):
                    self._report("error", f"task {task.id}: a demonstration does not end with the task")
                shown.append(play.reward or 0.0)
        mean = sum(shown) / len(shown)
        self._report("info", f"demonstrations are rewarded with {mean:.2f} on average")
        if mean == 0:
            self._report("error", "no demonstration is ever rewarded: is the verifier right?")
        elif mean == 1:
            self._report("warning", "every demonstration succeeds: a policy taught by them has little left to learn")

    def _check_leaks(self, before: dict[str, int]) -> None:
        for name, number in _resources().items():
            allowed = before[name] + 2
            if number > allowed:
                self._report(
                    "error",
                    f"{name} left open: {number}, after the first tasks {allowed - 2}; give them back in close()",
                )

    def _check_time(self) -> None:
        if self._player.seconds:
            mean, worst = sum(self._player.seconds) / len(self._player.seconds), max(self._player.seconds)
            self._report("info", f"a step takes {1000 * mean:.2f} ms on average, {1000 * worst:.1f} ms at most")
            if mean > _SLOW_STEP_S:
                self._report("warning", f"steps take {mean:.1f} s on average: rollouts will wait for the environment")


def _shown(task: Task) -> str:
    """Return what tasks are compared by: plain values, because arrays have no truth value."""
    return repr(shown_task(task))


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
