"""GeneratorActor: one inference engine behind Ray; and the router by which prompts reach their generator.

A prompt sticks to the generator that holds its prefix; when that one is overloaded, or gone, the prompt spills.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from trace_async.config import Config
from trace_async.engine import EngineDeadError, EngineError, EngineHealth, EngineRequestError, EngineTimeoutError
from trace_async.engines import make_engine
from trace_async.engines.work_clock import WorkClock
from trace_async.types import Completion, SamplingParams
from trace_async.weights import WeightBucket, WeightManifest, WeightUpdate, join_buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStats:
    """Totals since the generator's start. `busy_s`: seconds with at least one request."""

    health: EngineHealth
    busy_s: float
    alive_s: float


class GeneratorActor:
    """Owns one engine; made a Ray actor by the pool. All methods run in the actor's one event loop."""

    def __init__(self, config: Config, policy_path: str, index: int, log_dir: str) -> None:
        self.engine = make_engine(
            config.engine,
            policy_path=Path(policy_path),
            max_context_tokens=config.sampling.max_context_tokens,
            seed=config.seed * 1000 + index,
            log_dir=Path(log_dir),
        )
        self.request_timeout_s = config.engine.request_timeout_s
        self.clock = WorkClock()
        self.num_requests = 0
        self.busy_s = 0.0
        self.busy_since = 0.0
        self.started = time.monotonic()

    async def start(self) -> None:
        await self.engine.start()

    async def generate(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        """One sample. EngineTimeoutError when the engine gave nothing in engine.request_timeout_s of work.

        The time in which weights arrive or the engine is paused is not the engine's: it has limits of its own.
        """
        if self.num_requests == 0:
            self.busy_since = time.monotonic()
        self.num_requests += 1
        answer = asyncio.ensure_future(self.engine.generate(prompt_ids, params))
        try:
            await self.clock.until_done(answer, self.request_timeout_s)
            (completion,) = answer.result()
        except TimeoutError:
            raise EngineTimeoutError(
                f"no completion within engine.request_timeout_s={self.request_timeout_s}; "
                f"{self.num_requests} requests are in flight"
            ) from None
        finally:
            answer.cancel()
            self.num_requests -= 1
            if self.num_requests == 0:
                self.busy_s += time.monotonic() - self.busy_since
        return completion

    async def update_weights(self, update: WeightUpdate) -> int:
        """Returns the policy version served from now on."""
        with self.clock.held():
            await self.engine.update_weights(update)
        return update.manifest.policy_version

    async def receive_weights(self, *parts: WeightBucket | WeightManifest) -> int:
        """`update_weights` with what the learner sends: buckets and, last, their manifest."""
        *buckets, manifest = parts
        assert isinstance(manifest, WeightManifest)
        return await self.update_weights(join_buckets((b for b in buckets if isinstance(b, WeightBucket)), manifest))

    async def pause(self) -> None:
        """Requests in flight and new ones wait until `resume`."""
        await self.engine.pause()
        self.clock.pause()

    async def resume(self) -> None:
        await self.engine.resume()
        self.clock.resume()

    async def stats(self) -> GeneratorStats:
        now = time.monotonic()
        running = now - self.busy_since if self.num_requests else 0.0
        return GeneratorStats(
            health=await self.engine.health(), busy_s=self.busy_s + running, alive_s=now - self.started
        )

    async def close(self) -> None:
        await self.engine.close()


@dataclass(slots=True)
class GeneratorRouter:
    """Chooses a generator for each request of a prompt, retries elsewhere what broke down. One per PromptActor.

    `generators`: name → handle, as the pool last announced it. A generator on which a request broke down is left out
    until the pool announces it anew; with none left, requests wait up to `wait_s` for one.
    """

    spill_requests: int
    wait_s: float
    max_retries: int
    generators: dict[str, ActorHandle] = field(default_factory=dict)
    in_flight: Counter[str] = field(default_factory=Counter)
    num_spilled: int = 0
    num_retried: int = 0
    _announced: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        """The pool's healthy generators, all synced to the current weights."""
        self.generators = dict(generators)
        if self.generators:
            self._announced.set()

    def choose(self, key: str) -> str:
        """Rendezvous hashing keeps a prompt on its generator as others come and go; a full one spills."""
        home = max(self.generators, key=lambda name: hashlib.blake2b(f"{key}|{name}".encode()).digest())
        if self.in_flight[home] < self.spill_requests:
            return home
        least = min(self.generators, key=lambda name: self.in_flight[name])
        # Moving costs a cold prefill: only when the other one is clearly less loaded.
        if self.in_flight[least] * 2 >= self.in_flight[home]:
            return home
        self.num_spilled += 1
        return least

    async def generate(self, key: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        last: BaseException | None = None
        for _ in range(self.max_retries + 1):
            name = await self._pick(key)
            handle = self.generators[name]
            self.in_flight[name] += 1
            try:
                return await handle.generate.remote(prompt_ids, params)
            except EngineRequestError:
                raise
            except (RayActorError, EngineError) as error:
                if self.generators.get(name) is handle:
                    del self.generators[name]
                self.num_retried += 1
                last = error
            finally:
                self.in_flight[name] -= 1
        raise EngineDeadError(f"a request broke down {self.max_retries + 1} times; the last said: {last!r}")

    async def _pick(self, key: str) -> str:
        if not self.generators:
            self._announced.clear()
            try:
                async with asyncio.timeout(self.wait_s):
                    await self._announced.wait()
            except TimeoutError:
                raise EngineDeadError(f"no generator came back within {self.wait_s} s") from None
        return self.choose(key)


def remote_generator(config: Config, policy_path: Path, index: int, log_dir: Path) -> ActorHandle:
    """Start a GeneratorActor in a process of its own; `start` must be awaited before use."""
    actor = ray.remote(GeneratorActor).options(
        num_cpus=config.actors.generator_cpus,
        num_gpus=config.actors.generator_gpus,
        max_concurrency=4096,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config.engine.num_threads)}},
    )
    return actor.remote(config, str(policy_path), index, str(log_dir))
