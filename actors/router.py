"""GeneratorRouter: by which a prompt's requests reach a generator.

A prompt sticks to the generator that holds its prefix. It spills to another when that one is overloaded, and moves when
it is gone. This is the one place where a request that an engine failed is tried again.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray.actor import ActorHandle

from actors.calls import ActorLostError, ask
from trace_async.engine import EngineDeadError, EngineError, EngineRequestError
from trace_async.types import Completion, SamplingParams


@dataclass(frozen=True, slots=True)
class RouterStats:
    """Totals of one router since its start."""

    num_spilled: int = 0
    """Requests that left their prompt's generator because it was overloaded: each costs a cold prefill."""
    num_retried: int = 0
    """Requests that broke down on a generator and were sent to another."""


@dataclass(slots=True)
class GeneratorRouter:
    """Chooses a generator for each request of a prompt, retries elsewhere what broke down. One per PromptActor.

    A generator on which a request broke down is left out until the pool announces it anew, one that died for ever.
    With none left, requests wait up to `wait_s` for one.
    """

    spill_requests: int
    """Requests of this router beyond which a generator counts as overloaded."""
    wait_s: float
    """How long a request waits for a generator when there is none."""
    max_retries: int
    """How often a request is tried again on another generator."""
    generators: dict[str, ActorHandle] = field(default_factory=dict)
    """Name → handle, as the pool last announced them."""
    in_flight: Counter[str] = field(default_factory=Counter)
    num_spilled: int = 0
    num_retried: int = 0
    _dead: set[str] = field(default_factory=set)
    _announced: asyncio.Event = field(default_factory=asyncio.Event)

    def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        """The pool's healthy generators, all synced to the current weights."""
        # The pool may not have noticed yet that one of them died; names are never used again.
        self.generators = {name: handle for name, handle in generators.items() if name not in self._dead}
        if self.generators:
            self._announced.set()

    def stats(self) -> RouterStats:
        return RouterStats(self.num_spilled, self.num_retried)

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
        """One sample. EngineRequestError for a request that no engine can serve, EngineDeadError when all tries broke.

        The limit of a request runs in the generator, from when its engine works on it; a generator that hangs is found
        and killed by the pool's watch, which ends the call here.
        """
        last: BaseException | None = None
        for attempt in range(self.max_retries + 1):
            self.num_retried += attempt > 0
            name = await self._pick(key)
            handle = self.generators[name]
            self.in_flight[name] += 1
            try:
                return await ask(handle.generate.remote(prompt_ids, params), who=name)
            except EngineRequestError:
                raise
            except (ActorLostError, EngineError) as error:
                if isinstance(error, ActorLostError):
                    self._dead.add(name)
                if self.generators.get(name) is handle:
                    del self.generators[name]
                last = error
            finally:
                self.in_flight[name] -= 1
        raise EngineDeadError(f"a request broke down {self.max_retries + 1} times; the last said: {last!r}")

    async def _pick(self, key: str) -> str:
        try:
            async with asyncio.timeout(self.wait_s):
                while not self.generators:
                    self._announced.clear()
                    await self._announced.wait()
        except TimeoutError:
            raise EngineDeadError(f"no generator came back within {self.wait_s} s") from None
        return self.choose(key)
