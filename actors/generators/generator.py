"""Run one inference engine in a Ray actor of its own."""

import asyncio
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.actor import ActorHandle

from trace_async.config import Config
from trace_async.engine import EngineError, EngineHealth, EngineTimeoutError, WeightSyncError
from trace_async.engines import make_engine
from trace_async.engines.work_clock import WorkClock
from trace_async.types import Completion, SamplingParams
from trace_async.weight_delta import WeightDelta, apply_delta
from trace_async.weights import WeightBucket, WeightManifest, WeightUpdate, join_buckets


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStats:
    """A snapshot of one generator. The seconds are totals since its start."""

    health: EngineHealth
    num_requests: int
    """Requests that it has accepted and not answered."""
    busy_s: float
    """Seconds with at least one request."""
    alive_s: float
    """Seconds since it was made."""


class GeneratorActor:
    """Owns one engine. The pool makes it a Ray actor, and all methods run in the actor's one event loop."""

    def __init__(self, config: Config, policy_path: str, index: int, log_dir: str) -> None:
        self.engine = make_engine(
            config.engine,
            policy_path=Path(policy_path),
            max_context_tokens=config.sampling.max_context_tokens,
            seed=config.seed * 1000 + index,
            log_dir=Path(log_dir),
        )
        self.name = f"{config.name} generator-{index}"
        self.request_timeout_s = config.engine.request_timeout_s
        self.clock = WorkClock()
        self.takes_deltas = config.engine.weight_delta
        self.base: WeightUpdate | None = None  # with engine.weight_delta: what it serves, for the next delta
        self.num_requests = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.busy_s = 0.0
        self.busy_since = 0.0
        self.started = time.monotonic()

    def __repr__(self) -> str:
        """Return the name under which Ray's dashboard and logs show the actor."""
        return self.name

    async def start(self) -> None:
        """Load the model. Must have ended before any other method is called."""
        await self.engine.start()

    async def generate(self, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        """Return one sample.

        Raises EngineTimeoutError when the engine has not answered within `engine.request_timeout_s` of its own work.
        Time in which new weights arrive does not count; weight updates have limits of their own. Raises EngineError
        when the answer cannot be trained on (`checked`).
        """
        if self.num_requests == 0:
            self.busy_since = time.monotonic()
        self.num_requests += 1
        self.idle.clear()
        answer = asyncio.ensure_future(self.engine.generate(prompt_ids, params))
        try:
            await self.clock.until_done(answer, self.request_timeout_s)
            return checked(answer.result())
        except TimeoutError:
            raise EngineTimeoutError(
                f"no completion within engine.request_timeout_s={self.request_timeout_s}; "
                f"{self.num_requests} requests are in flight"
            ) from None
        finally:
            answer.cancel()
            self.num_requests -= 1
            if self.num_requests == 0:
                self.idle.set()
                self.busy_s += time.monotonic() - self.busy_since

    async def update_weights(self, update: WeightUpdate) -> int:
        """Serve new weights. Returns the policy version that is served from now on."""
        with self.clock.held():
            await self.engine.update_weights(update)
        return update.manifest.policy_version

    async def receive_weights(self, *parts: WeightBucket | WeightManifest) -> int:
        """Serve the weights that the learner sends as `parts`: buckets and, last, their manifest.

        Ray fetches an argument from the object store only if it is passed by itself, not inside a list.
        """
        *buckets, manifest = parts
        assert isinstance(manifest, WeightManifest)
        update = join_buckets((b for b in buckets if isinstance(b, WeightBucket)), manifest)
        self.base = None
        version = await self.update_weights(update)
        if self.takes_deltas:
            self.base = await asyncio.to_thread(_own_copy, update)
        return version

    async def receive_delta(self, delta: WeightDelta, manifest: WeightManifest) -> int:
        """Serve the weights that it has, changed by `delta`. The engine checks the whole, as for `receive_weights`.

        Raises WeightSyncError when they are not those that the delta changes. The whole must be sent then.
        """
        base, self.base = self.base, None  # while it changes it is neither version
        if base is None or base.tensors is None or base.manifest.policy_version != delta.base_version:
            served = base.manifest.policy_version if base is not None else None
            raise WeightSyncError(f"a delta changes weights version {delta.base_version}, and here is {served}")
        try:
            await asyncio.to_thread(apply_delta, base.tensors, delta)
        except ValueError as error:
            raise WeightSyncError(str(error)) from error
        update = replace(base, manifest=manifest)
        version = await self.update_weights(update)
        self.base = update
        return version

    async def stats(self) -> GeneratorStats:
        """Return a snapshot. Raises EngineDeadError or EngineTimeoutError when the engine does not answer."""
        now = time.monotonic()
        running = now - self.busy_since if self.num_requests else 0.0
        return GeneratorStats(
            health=await self.engine.health(),
            num_requests=self.num_requests,
            busy_s=self.busy_s + running,
            alive_s=now - self.started,
        )

    async def drained(self) -> None:
        """Wait until no request is in flight. Only useful for a generator that gets no new ones."""
        await self.idle.wait()

    async def close(self) -> None:
        """Stop the engine and give back what it holds."""
        await self.engine.close()


def checked(completion: Completion) -> Completion:
    """Return the completion itself. Raises EngineError when one of its log-probabilities is not a finite number.

    An engine that gives such a number is broken. A tree with its tokens could neither be trained on nor written down.
    """
    for position, logprob in enumerate(completion.logprobs):
        if not isinstance(logprob, int | float) or not math.isfinite(logprob):
            raise EngineError(
                f"the engine gives token {position} of {len(completion.token_ids)} that it sampled the log-probability "
                f"{logprob}: its weights or its kernels are broken"
            )
    return completion


def _own_copy(update: WeightUpdate) -> WeightUpdate:
    """Return the update with arrays that may be written to; those from the object store are read-only."""
    assert update.tensors is not None
    return replace(update, tensors={name: array.copy() for name, array in update.tensors.items()})


def remote_generator(config: Config, policy_path: Path, index: int, log_dir: Path) -> ActorHandle:
    """Start a GeneratorActor in a process of its own. Its `start` must be awaited before it is used."""
    actor = ray.remote(GeneratorActor).options(
        num_cpus=config.actors.generator_cpus,
        num_gpus=config.actors.generator_gpus,
        max_concurrency=4096,  # requests wait in the engine, which batches them, and not in Ray
        enable_task_events=False,  # Ray's GCS would keep some 4 KiB about every turn that is written
        runtime_env={"env_vars": {"OMP_NUM_THREADS": str(config.engine.num_threads)}},
    )
    return actor.remote(config, str(policy_path), index, str(log_dir))
