"""Any domain, made to misbehave: now and then it raises, hangs, or answers with what no environment should."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

from envs import load_domain
from trace_async.config import EnvConfig
from trace_async.types import Prompt, Split, StepResult, Task

METHODS = ("init", "step", "fork", "close")


class Misbehaving:
    """`env.args={env: {name: …, args: …}, share: .02, seed: 1}`: `share` of all calls go wrong."""

    name = "misbehaving"

    def __init__(self, *, env: Mapping[str, Any], share: float = 0.02, seed: int = 0) -> None:
        self.inner = load_domain(EnvConfig(**env))
        self.share = share
        self.random = Random(seed)

    def tasks(self, split: Split) -> Sequence[Task]:
        return self.inner.tasks(split)

    def make_env(self, task: Task) -> "MisbehavingEnv":
        return MisbehavingEnv(self.inner.make_env(task), self)

    async def misbehave(self, method: str) -> None:
        """Raise or hang, for `share` of the calls."""
        if self.random.random() < self.share:
            if self.random.random() < 0.5:
                raise RuntimeError(f"chaos: {method} raises")
            await asyncio.sleep(3600)


class MisbehavingEnv:
    def __init__(self, inner: Any, domain: Misbehaving) -> None:
        self.inner, self.domain = inner, domain

    async def init(self) -> Prompt:
        await self.domain.misbehave("init")
        prompt: Prompt = await self.inner.init()
        return prompt

    async def step(self, action: str, *, truncated: bool = False) -> StepResult:
        await self.domain.misbehave("step")
        result: StepResult = await self.inner.step(action, truncated=truncated)
        if result.done and self.domain.random.random() < self.domain.share:
            return replace(result, reward=float("nan"))
        return result

    async def fork(self) -> "MisbehavingEnv":
        await self.domain.misbehave("fork")
        return MisbehavingEnv(await self.inner.fork(), self.domain)

    async def close(self) -> None:
        await self.inner.close()
        await self.domain.misbehave("close")
