"""Choose a generator for every request of a prompt.

A prompt stays with the generator that holds its prefix in the cache. Requests spill to another generator when that one
is overloaded, and move when it is gone. This is the only place where a request that failed in an engine is tried again.

Example with `spill_requests` = 64: the requests of prompt 7 go to generator-2. When that has 64 requests in flight and
generator-0 has 20, the next one goes to generator-0 and pays a cold prefill there. If generator-0 had 40, it would stay
with generator-2.
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
class Generators:
    """The generators as the pool announces them."""

    ready: Mapping[str, ActorHandle]
    """Name → handle of those that serve the current weights."""
    lent: Mapping[str, ActorHandle] = field(default_factory=dict)
    """Those that keep older weights until an evaluation of them is done. No training request goes there."""

    @property
    def for_evaluation(self) -> Mapping[str, ActorHandle]:
        return self.lent or self.ready


@dataclass(frozen=True, slots=True)
class RouterStats:
    """Totals of one router since its start."""

    num_spilled: int = 0
    """Requests that left their prompt's generator because it was overloaded. Each costs a cold prefill."""
    num_retried: int = 0
    """Requests that broke down on a generator and were sent to another."""


@dataclass(slots=True)
class GeneratorRouter:
    """Routes the requests of one PromptActor and retries those that broke down.

    A generator on which a request broke down is not used until the pool announces it again. One that died is never used
    again. When none is left, requests wait up to `wait_s` for one.
    """

    spill_requests: int
    """A generator with so many requests of this router in flight counts as overloaded."""
    wait_s: float
    """How long a request waits for a generator when there is none."""
    max_retries: int
    """How often a request is tried again on another generator."""
    generators: dict[str, ActorHandle] = field(default_factory=dict)
    """Name → handle, as the pool last announced them."""
    in_flight: Counter[str] = field(default_factory=Counter)
    """Name → requests of this router that it has not answered."""
    num_spilled: int = 0
    """See `RouterStats`."""
    num_retried: int = 0
    """See `RouterStats`."""
    _dead: set[str] = field(default_factory=set)
    """Names of generators that died."""
    _announced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is a generator again, for requests that wait for one."""

    def announce(self, generators: Mapping[str, ActorHandle]) -> None:
        """Take over the pool's ready generators, all of which serve the current weights."""
        # The pool may not have noticed yet that one of them died. A name is never used twice, so this is safe.
        self.generators = {name: handle for name, handle in generators.items() if name not in self._dead}
        if self.generators:
            self._announced.set()

    def stats(self) -> RouterStats:
        """Return the totals since the start."""
        return RouterStats(self.num_spilled, self.num_retried)

    def choose(self, key: str) -> str:
        """Return the name of the generator for the prompt `key`.

        Rendezvous hashing (the generator with the highest hash together with the key) keeps a prompt where it is while
        other generators come and go.
        """
        home = max(self.generators, key=lambda name: hashlib.blake2b(f"{key}|{name}".encode()).digest())
        if self.in_flight[home] < self.spill_requests:
            return home
        least = min(self.generators, key=lambda name: self.in_flight[name])
        # A move costs a cold prefill, so the other one must be clearly less loaded.
        if self.in_flight[least] * 2 >= self.in_flight[home]:
            return home
        self.num_spilled += 1
        return least

    async def generate(self, key: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        """Return one sample for the prompt `key`.

        Raises EngineRequestError for a request that no engine can serve, and EngineDeadError when all tries broke down.
        There is no time limit here. The limit of a request runs in the generator, from when its engine works on it. A
        generator that hangs is found and killed by the pool's watch, which ends the call here.
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
                # It may have been announced again meanwhile, or another request may have removed it.
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
