"""Choose a generator for every request of a prompt.

A prompt's first request chooses its generator, by consistent hashing with bounded loads (Mirrokni, Thorup and
Zadimoghaddam, arXiv 1608.01350): in the order of the prompt's own hash, the first generator that would not have more
than LOAD_BOUND times the mean load. Later requests go where the prompt's prefix is cached. A prompt moves only when its
generator is gone. Load is counted in rollouts under way, over all PromptActors: each answers the pool's announcements,
every two seconds, with what it has where, and hears what the others have. A prompt whose last rollout waits for a slow
tool is then little load, though its generator began with many of it.

Why not simply the least loaded: all routers would choose the same one until they heard of each other. The hash spreads
those that choose at the same time.

Example: 3 generators with 16, 8 and 0 rollouts, a prompt of 8. The mean is then (24 + 8) / 3 = 10.7 and the bound
1.1 · 10.7 = 11.7, so the prompt goes to the third one whatever its hash.

This is the only place where a request that failed in an engine is tried again.
"""

import asyncio
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ray.actor import ActorHandle

from actors.calls import ActorLostError, ask
from trace_async.engine import EngineDeadError, EngineError, EngineRequestError
from trace_async.types import Completion, SamplingParams

LOAD_BOUND = 1.1
"""A generator takes a new prompt up to so many times the mean load (docs/SCALING.md has what other bounds give)."""


@dataclass(frozen=True, slots=True)
class Generators:
    """The generators as the pool announces them."""

    ready: Mapping[str, ActorHandle]
    """Name → handle of those that serve the current weights."""
    lent: Mapping[str, ActorHandle] = field(default_factory=dict)
    """Those that keep older weights until an evaluation of them is done. No training request goes there."""

    @property
    def for_evaluation(self) -> Mapping[str, ActorHandle]:
        """Return those that are lent; all that are ready where none is."""
        return self.lent or self.ready


@dataclass(frozen=True, slots=True)
class RouterStats:
    """Totals of one router since its start."""

    num_moved: int = 0
    """Prompts whose generator was gone, so that they went on at another one. Each costs a cold prefill."""
    num_retried: int = 0
    """Requests that broke down on a generator and were sent to another."""


@dataclass(slots=True)
class _Hosted:
    """A prompt that is under way."""

    num_hosts: int = 0
    """How often it is under way: one task may be so twice."""
    rollouts: int = 0
    """Its rollouts that are under way."""
    home: str | None = None
    """Its generator (None: it has made no request)."""


@dataclass(slots=True)
class GeneratorRouter:
    """Routes the requests of one PromptActor and retries those that broke down.

    A generator on which a request broke down is not used until the pool announces it again. One that died is never used
    again. When none is left, requests wait up to `wait_s` for one.
    """

    wait_s: float
    """How long a request waits for a generator when there is none."""
    max_retries: int
    """How often a request is tried again on another generator."""
    generators: dict[str, ActorHandle] = field(default_factory=dict)
    """Name → handle, as the pool last announced them."""
    loads: Counter[str] = field(default_factory=Counter)
    """Name → rollouts under way of this router's prompts that have it as their generator."""
    loads_of_others: Mapping[str, int] = field(default_factory=dict)
    """The same of all other routers together, as the pool last announced it."""
    num_moved: int = 0
    """See `RouterStats`."""
    num_retried: int = 0
    """See `RouterStats`."""
    _hosted: dict[str, _Hosted] = field(default_factory=dict)
    """Key → prompt, of those that are under way."""
    _dead: set[str] = field(default_factory=set)
    """Names of generators that died."""
    _announced: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when there is a generator again, for requests that wait for one."""

    def announce(self, generators: Mapping[str, ActorHandle], loads_of_others: Mapping[str, int] | None = None) -> None:
        """Take over the pool's ready generators, all of which serve the current weights, and the others' loads."""
        # The pool may not have noticed yet that one of them died. A name is never used twice, so this is safe.
        self.generators = {name: handle for name, handle in generators.items() if name not in self._dead}
        self.loads_of_others = loads_of_others or {}
        if self.generators:
            self._announced.set()

    def stats(self) -> RouterStats:
        """Return the totals since the start."""
        return RouterStats(self.num_moved, self.num_retried)

    @contextmanager
    def hosting(self, key: str) -> Iterator[None]:
        """Keep the prompt's generator for it as long as it is under way; around all its rollouts."""
        prompt = self._hosted.setdefault(key, _Hosted())
        prompt.num_hosts += 1
        try:
            yield
        finally:
            prompt.num_hosts -= 1
            if not prompt.num_hosts:
                del self._hosted[key]

    @contextmanager
    def playing(self, key: str) -> Iterator[None]:
        """Count a rollout of a prompt that is hosted as load of its generator; around all its requests."""
        prompt = self._hosted[key]
        self._weigh(prompt, 1)
        try:
            yield
        finally:
            self._weigh(prompt, -1)

    def _weigh(self, prompt: _Hosted, rollouts: int) -> None:
        prompt.rollouts += rollouts
        if prompt.home is not None:
            self.loads[prompt.home] += rollouts
            if not self.loads[prompt.home]:
                del self.loads[prompt.home]

    def choose(self, key: str) -> str:
        """Return the name of the generator for the prompt `key`, which must be hosted."""
        prompt = self._hosted[key]
        if prompt.home in self.generators:
            return prompt.home
        rollouts, was_moved = prompt.rollouts, prompt.home is not None
        self.num_moved += was_moved
        self._weigh(prompt, -rollouts)  # it is no load of the generator that is gone
        prompt.home = self.first_choice(key, rollouts)
        self._weigh(prompt, rollouts)
        return prompt.home

    def first_choice(self, key: str, rollouts: int) -> str:
        """Return the name of the generator for a prompt that has none yet."""
        load = {name: self.loads[name] + self.loads_of_others.get(name, 0) for name in self.generators}
        bound = LOAD_BOUND * (sum(load.values()) + rollouts) / len(load)
        # Rendezvous hashing gives every prompt an order of its own, which does not change as generators come and go.
        order = sorted(load, key=lambda name: hashlib.blake2b(f"{key}|{name}".encode()).digest(), reverse=True)
        # A prompt may be larger than the bound by itself; then it goes where least is.
        return next((name for name in order if load[name] + rollouts <= bound), min(order, key=load.__getitem__))

    async def generate(self, key: str, prompt_ids: tuple[int, ...], params: SamplingParams) -> Completion:
        """Return one sample for the prompt `key`, which must be hosted.

        Raises EngineRequestError for a request that no engine can serve, and EngineDeadError when all tries broke down.
        There is no time limit here. The limit of a request runs in the generator, from when its engine works on it. A
        generator that hangs is found and killed by the pool's watch, which ends the call here.
        """
        last: BaseException | None = None
        for attempt in range(self.max_retries + 1):
            self.num_retried += attempt > 0
            name = await self._pick(key)
            handle = self.generators[name]
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


def loads_of_others(loads: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """Return, for every router, what all the others have together: name of a generator → rollouts."""
    total: Counter[str] = Counter()
    for own in loads:
        total.update(own)
    return [{name: load - own.get(name, 0) for name, load in total.items()} for own in loads]
