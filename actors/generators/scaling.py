"""Scale the generators: their number follows what the updates wait for, or what the run's owner asks for.

The rule is asked after every update (`after_update`); an order is looked for every `POLL_S` seconds (`watch`).
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import ray

from trace_async.config import Config
from trace_async.run.scaling import ScalingRule, Size, keep_sizes, kept_sizes, ordered

log = logging.getLogger(__name__)
POLL_S = 2.0


class Resizable(Protocol):
    """What scaling asks of the pool; see `GeneratorPool`."""

    target: int

    @property
    def ready(self) -> Mapping[str, object]:
        """Return the generators that are ready, by name."""
        ...

    async def resize(self, num_generators: int) -> None:
        """Scale to `num_generators`. Returns before new ones have started."""
        ...


def _needs(config: Config) -> dict[str, float]:
    """Return what Ray reserves for one generator."""
    needs = {"CPU": config.actors.generator_cpus, "GPU": config.actors.generator_gpus}
    return {name: need for name, need in needs.items() if need}


def room_for(config: Config) -> int:
    """Return how many more generators Ray has room for now."""
    there = ray.available_resources()
    # Generators that reserve nothing always have room.
    return min((int(there.get(name, 0.0) / need) for name, need in _needs(config).items()), default=10**6)


def ask_for_nodes(config: Config, num_generators: int) -> None:
    """Tell Ray's autoscaler, where there is one, what so many generators take. 0 takes the wish back."""
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[_needs(config)] * num_generators)


class Scaling:
    """Lives in the trainer's process beside the pool it resizes. An order switches the rule off.

    `on_change` is told of every decision that changes the size, before it is carried out.
    """

    def __init__(
        self,
        config: Config,
        pool: Resizable,
        run_dir: Path,
        *,
        on_change: Callable[[Size], None] = lambda size: None,
        room: Callable[[Config], int] = room_for,
        ask_for_nodes: Callable[[Config, int], None] = ask_for_nodes,
    ) -> None:
        actors = config.actors
        self.config, self.pool, self.run_dir = config, pool, run_dir
        self.rule = ScalingRule(actors.min_generators or actors.num_generators, actors.most_generators)
        self.sizes = kept_sizes(run_dir)
        self._on_change, self._room, self._ask_for_nodes = on_change, room, ask_for_nodes
        self._ordered: int | None = None
        self._asked_for_nodes = False
        self._update = 0

    async def after_update(self, update: int, metrics: Mapping[str, float]) -> None:
        """Let the rule decide, unless there was an order. `metrics`: the figures of the update just made."""
        self._update = update
        if self._ordered is not None:
            return
        size = self.rule.decide(
            len(self.pool.ready),
            update,
            learner_wait=metrics["idle/learner_share"],
            generator_idle=metrics["idle/generator_share"],
        )
        if size is not None:
            await self._change(size)

    async def watch(self) -> None:
        """Carry out orders, without end: at once as far as there is room, the rest when nodes have joined."""
        try:
            while True:
                wanted = await asyncio.to_thread(ordered, self.run_dir)
                if wanted is not None and self._due(wanted):
                    self._ordered = wanted
                    await self._change(Size(num_generators=wanted, reason="asked for", update=self._update))
                await asyncio.sleep(POLL_S)
        finally:
            if self._asked_for_nodes:  # Ray keeps a wish beyond the end of whoever had it
                self._ask_for_nodes(self.config, 0)

    def _due(self, wanted: int) -> bool:
        """Return whether an order is new, or can be carried out further than it was."""
        if wanted == self.pool.target:
            self._ordered = wanted
            return False
        return wanted != self._ordered or wanted < self.pool.target or self._room(self.config) > 0

    async def _change(self, size: Size) -> None:
        more = size.num_generators - self.pool.target
        room = self._room(self.config) if more > 0 else 0
        if more > room:
            if self.config.actors.ray_address:
                self._ask_for_nodes(self.config, size.num_generators)
                self._asked_for_nodes = True
            reason = f"{size.reason}; {size.num_generators} wanted, Ray has room for {room} more"
            size = Size(num_generators=self.pool.target + max(0, room), reason=reason, update=size.update)
        if size.num_generators == self.pool.target:
            log.info("generators stay %d: %s", self.pool.target, size.reason)
            return
        log.info("generators %d → %d: %s", self.pool.target, size.num_generators, size.reason)
        self.sizes.append(size)
        await asyncio.to_thread(keep_sizes, self.run_dir, self.sizes)
        self._on_change(size)
        await self.pool.resize(size.num_generators)
