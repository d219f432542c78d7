"""Keep the generators of a run alive: start them, replace those that break, and scale their number.

        start ─► ready ─(died, hung, failed a weight update)─► gone ─► restarted ─► weights synced ─► ready
                   └────(one too many, its node is drained)─► draining ─(its last request answered)─► closed

A generator can be lent to an evaluation. It then keeps the weights that it has, gets no request of training, and takes
the current weights when it is given back.

A generator is announced to the prompts only while it is ready, which means that it is alive and serves the current
weights. The watch runs from `start` to `close`. So generators are replaced for everybody who uses the pool, for
training as well as for an evaluation.

Example with two generators: generator-0 dies. The watch hears of it within seconds, announces generator-1 alone, and
starts generator-2. Once that has loaded the current weights, generator-1 and generator-2 are announced.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError

from actors.calls import CallError, CallTimeoutError, ask, ask_all
from actors.generators.generator import GeneratorStats, remote_generator
from actors.generators.router import Generators
from actors.learner import DeltaRef
from actors.ray_cluster import on_draining_nodes
from trace_async.config import Config
from trace_async.engine import EngineError, EngineTimeoutError

log = logging.getLogger(__name__)

Announce = Callable[[Generators], Awaitable[None]]
BROKEN = (CallError, RayTaskError, EngineError)
WATCH_EVERY_S = 2.0
CLOSE_LIMIT_S = 30.0


class GeneratorPool:
    """Holds the generators. It lives in the trainer's process, and all its methods run in one event loop."""

    def __init__(self, config: Config, policy_path: Path, log_dir: Path, announce: Announce) -> None:
        """`announce` tells every PromptActor which generators are ready; it is called at every change."""
        self.config = config
        self.policy_path = policy_path
        self.log_dir = log_dir
        self.announce = announce
        self.ready: dict[str, ActorHandle] = {}
        self.lent: dict[str, ActorHandle] = {}
        self.doomed: set[str] = set()  # on nodes that are being drained: they leave once others have taken over
        self.target = config.actors.num_generators
        self.num_made = 0
        self.num_lost = 0
        self.weights: Sequence[ObjectRef] = ()  # buckets and, last, their manifest
        self.received: dict[str, int] = {}  # name → the version that it received last, whole or as a delta
        self.starting: set[asyncio.Task[None]] = set()
        self.draining: set[asyncio.Task[None]] = set()
        self.watching: asyncio.Task[None] | None = None
        self.last_error: BaseException | None = None
        self.one_ready = asyncio.Event()
        self.loan_lost = asyncio.Event()  # the last generator that was lent is gone
        self.weights_of_loan: Sequence[ObjectRef] = ()
        self.changing = asyncio.Lock()  # weights never change while a generator is being admitted

    async def start(self) -> None:
        """Start the first generators and the watch, and return when all are ready.

        Raises the error of the first generator that failed.
        """
        results = await asyncio.gather(*(self._add() for _ in range(self.target)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        self.watching = asyncio.create_task(self.watch())

    async def resize(self, num_generators: int) -> None:
        """Scale to `num_generators` while the run goes on. Returns before new ones have started.

        A generator that leaves gets no new request, and is closed once it has answered those that it has.
        """
        if num_generators < 1:
            raise ValueError(f"num_generators={num_generators}: keep at least one")
        self.target = num_generators
        await self._shrink()
        self._refill()

    async def _shrink(self) -> None:
        """Let the generators beyond `target` leave, those on nodes that are being drained first."""
        stay = max(1, self.target - len(self.lent))
        # Those on nodes that are drained come last, and what comes after `stay` leaves.
        names = sorted(self.ready, key=lambda name: name in self.doomed)
        leaving = [(name, self.ready.pop(name)) for name in names[stay:]]
        if leaving:
            await self._announce()
        for name, handle in leaving:
            task = asyncio.create_task(self._drain(name, handle))
            self.draining.add(task)
            task.add_done_callback(self.draining.discard)

    async def _drain(self, name: str, handle: ActorHandle) -> None:
        """Close a generator that is leaving, after its last request."""
        limit_s = self.config.engine.request_timeout_s
        try:
            await ask(handle.drained.remote(), who=name, limit_s=limit_s)
            await ask(handle.close.remote(), who=name, limit_s=CLOSE_LIMIT_S)
        except BROKEN as error:
            log.warning("%s was to leave and is killed: %r", name, error)
        finally:
            ray.kill(handle)

    async def lend(self, num_generators: int) -> int:
        """Lend up to so many ready generators to an evaluation, which has them for itself until `take_back`.

        Returns how many. One at least stays with training, so of a single generator none is lent.
        """
        async with self.changing:
            for name in list(self.ready)[max(1, len(self.ready) - num_generators) :]:
                self.lent[name] = self.ready.pop(name)
            self.loan_lost.clear()
            self.weights_of_loan = self.weights
            await self._announce()
            return len(self.lent)

    async def take_back(self) -> None:
        """Give all that was lent the current weights and put it back to training."""
        async with self.changing:
            for name, handle in list(self.lent.items()):
                try:
                    if self.weights is not self.weights_of_loan:
                        await self._update_one(name, handle)
                except BROKEN as error:
                    log.error("%s was lent and failed to take the current weights: %r", name, error)
                    self.last_error = error
                    await self._lose(name)
                else:
                    if self.lent.pop(name, None) is not None:  # the watch may have lost it meanwhile
                        self.ready[name] = handle
                        self.one_ready.set()
            self._refill()
            await self._announce()

    async def _announce(self) -> None:
        await self.announce(Generators(dict(self.ready), dict(self.lent)))

    async def update_weights(
        self, weights: Sequence[ObjectRef], policy_version: int, delta: DeltaRef | None = None
    ) -> float:
        """Give every ready generator the weights `policy_version`. One that fails is lost and replaced.

        Those that have the weights which `delta` changes take the delta, the others the whole.

        When this returns, every ready generator serves the version. Returns the share of the generators that took it.
        Raises EngineError when none is left and no new one can be started.
        """
        async with self.changing:
            self.weights = weights
            handles = dict(self.ready)
            results = await asyncio.gather(
                *(self._update_one(name, handle, delta) for name, handle in handles.items()), return_exceptions=True
            )
            for name, result in zip(handles, results, strict=True):
                if isinstance(result, BROKEN):
                    log.error("%s failed to take weights version %d: %r", name, policy_version, result)
                    self.last_error = result
                    await self._lose(name)
                elif isinstance(result, BaseException):
                    raise result
                else:
                    assert result == policy_version, f"{name} serves version {result}, not {policy_version}"
            updated = len(self.ready)
        self._refill()
        if not updated and handles:
            await self._wait_for_one()
        return updated / max(1, len(handles))

    async def watch(self, every_s: float = WATCH_EVERY_S) -> None:
        """Find generators that died, hang or are on a node that is being drained, and replace them, without end."""
        limit_s = self.config.engine.request_timeout_s
        while True:
            await asyncio.sleep(every_s)
            handles = self.ready | self.lent
            answers = await ask_all([h.stats.remote() for h in handles.values()], who=list(handles), limit_s=limit_s)
            for name, answer in zip(handles, answers, strict=True):
                if isinstance(answer, BROKEN):
                    log.error("%s is lost: %r", name, answer)
                    self.last_error = answer
                    await self._lose(name)
                elif isinstance(answer, BaseException):
                    raise answer
            self.doomed = await on_draining_nodes(self.ready | self.lent)
            await self._shrink()
            self._refill()
            # A router stops using a generator on which a request failed, until it is announced again. This one answers.
            await self._announce()

    async def stats(self) -> dict[str, GeneratorStats]:
        """Return the snapshots, by name, of the generators that answer."""
        handles = dict(self.ready)
        answers = await ask_all([h.stats.remote() for h in handles.values()], who=list(handles), limit_s=CLOSE_LIMIT_S)
        found = zip(handles, answers, strict=True)
        return {name: answer for name, answer in found if isinstance(answer, GeneratorStats)}

    async def close(self) -> None:
        """Stop the watch and all generators. One that does not close in time is killed."""
        tasks = [*self.starting, *self.draining, *([self.watching] if self.watching else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        handles = [*self.ready.values(), *self.lent.values()]
        self.ready, self.lent = {}, {}
        replies = [handle.close.remote() for handle in handles]
        await ask_all(replies, who=["a generator that closes"] * len(replies), limit_s=CLOSE_LIMIT_S)
        for handle in handles:
            ray.kill(handle)

    async def _add(self) -> None:
        """Start one generator, give it the current weights, and announce it."""
        name, index = f"generator-{self.num_made}", self.num_made
        self.num_made += 1
        handle = remote_generator(self.config, self.policy_path, index, self.log_dir)
        try:
            await self._start(name, handle)
            # Without the lock, an update between the sync and the entry into `ready` would miss this generator.
            async with self.changing:
                if self.weights:
                    await self._update_one(name, handle)
                self.ready[name] = handle
                self.one_ready.set()
                await self._announce()
        except BaseException:
            ray.kill(handle)
            raise
        log.info("%s is ready", name)

    async def _start(self, name: str, handle: ActorHandle) -> None:
        limit_s = self.config.engine.start_timeout_s
        try:
            await ask(handle.start.remote(), who=name, limit_s=limit_s)
        except CallTimeoutError:
            raise EngineTimeoutError(
                f"{name} did not start within engine.start_timeout_s={limit_s:g}; raise it, or see {self.log_dir}"
            ) from None

    async def _update_one(self, name: str, handle: ActorHandle, delta: DeltaRef | None = None) -> int:
        """Give one generator the current weights, as a delta where it has what that changes."""
        if delta is not None and self.received.get(name) == delta.base_version:
            reply = handle.receive_delta.remote(delta.delta, self.weights[-1])
        else:
            reply = handle.receive_weights.remote(*self.weights)
        limit_s = self.config.engine.start_timeout_s
        version: int = await ask(reply, who=f"{name}, new weights:", limit_s=limit_s)
        self.received[name] = version
        return version

    async def _lose(self, name: str) -> None:
        """Drop a broken generator, tell the prompts, and kill it. Does nothing if it is gone already."""
        was_lent = name in self.lent
        handle = (self.lent if was_lent else self.ready).pop(name, None)
        if handle is None:
            return
        self.received.pop(name, None)
        if was_lent and not self.lent:
            self.loan_lost.set()
        self.num_lost += 1
        if not self.ready:
            self.one_ready.clear()
        await self._announce()
        ray.kill(handle)

    def _refill(self) -> None:
        """Begin to start as many generators as are missing, counting those that are starting already."""
        there = (self.ready.keys() | self.lent.keys()) - self.doomed
        for _ in range(self.target - len(there) - len(self.starting)):
            task = asyncio.create_task(self._replace())
            self.starting.add(task)
            task.add_done_callback(self.starting.discard)

    async def _replace(self) -> None:
        try:
            await self._add()
        except BROKEN as error:
            # The watch tries again. Whoever waits for a generator has a limit of its own and names this error.
            log.error("a generator could not be started: %r", error)
            self.last_error = error

    async def _wait_for_one(self) -> None:
        try:
            async with asyncio.timeout(self.config.engine.start_timeout_s):
                await self.one_ready.wait()
        except TimeoutError:
            raise EngineError(f"no generator is left, and none could be started: {self.last_error!r}") from None
