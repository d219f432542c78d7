"""What a run says of itself at every update: seconds per phase, generators, tokens, books.

The figures of the learner and the predictor come with their answers; these come from everything else.
"""

import asyncio
import time
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from actors.admission import Admission
from actors.generators.generator import GeneratorStats
from actors.parts import Parts
from trace_async.run.session import Phases
from trace_async.tracking.faults import FaultBook

T = TypeVar("T")


@dataclass(slots=True)
class Clock:
    """Seconds spent per phase since the last `read`; what goes on now is in RUN/phases.json."""

    doing: Phases
    phases: dict[str, float] = field(default_factory=dict)

    async def time(self, phase: str, work: Awaitable[T]) -> T:
        """Await `work`, and count its seconds under `phase`."""
        start = time.monotonic()
        try:
            with self.doing.during(phase):
                return await work
        finally:
            self.phases[phase] = self.phases.get(phase, 0.0) + time.monotonic() - start

    def read(self) -> dict[str, float]:
        """Return the seconds as figures `time/PHASE_s`, and start to count anew."""
        phases, self.phases = self.phases, {}
        return {f"time/{phase}_s": seconds for phase, seconds in phases.items()}


@dataclass(slots=True)
class RunFigures:
    """Figures of one session of a run; each call of `of_update` gives those since the call before."""

    parts: Parts
    admission: Admission
    clock: Clock
    faults: FaultBook
    _stats_before: dict[str, GeneratorStats] = field(default_factory=dict)

    async def begin(self) -> None:
        """Count how idle generators are from now on: after the start, and after an evaluation that held training."""
        self._stats_before = await self.parts.pool.stats()

    async def of_update(self, step_s: float) -> dict[str, float]:
        """Return the figures of an update that took `step_s` seconds, waiting for its trees included."""
        pool, state = self.parts.pool, self.admission.state
        stats, router = await asyncio.gather(pool.stats(), self.parts.prompts.router_stats())
        phases = self.clock.read()
        ledger = state.ledger
        estimate_s, self.admission.estimate_s = self.admission.estimate_s, 0.0
        return (
            phases
            | self.admission.market.metrics()
            | self.faults.read()
            | {
                "time/step_s": step_s,
                "time/estimate_s": estimate_s,
                "time/elapsed_s": state.elapsed_s,
                "idle/learner_share": phases.get("time/wait_for_trees_s", 0.0) / step_s,
                "idle/generator_share": self._generator_idle_share(stats),
                "generators/ready": float(len(pool.ready)),
                "generators/target": float(pool.target),
                "generators/lent": float(len(pool.lent)),
                "generators/lost": float(pool.num_lost),
                "generators/requests_running": float(sum(s.health.num_running for s in stats.values())),
                "generators/requests_waiting": float(sum(s.health.num_waiting for s in stats.values())),
                "generators/prompts_moved": float(router.num_moved),
                "generators/requests_retried": float(router.num_retried),
                "tokens/generated_total": float(state.generated_tokens),
                "budget/failed_rollouts": float(sum(ledger.failed.values())),
                "budget/lost_candidates": float(sum(state.lost_candidates.values())),
                "budget/filtered_rollouts": float(sum(ledger.filtered.values())),
                "budget/trained_rollouts": float(sum(ledger.trained.values())),
            }
        )

    def _generator_idle_share(self, stats: Mapping[str, GeneratorStats]) -> float:
        """Return the share of the time since the last update or evaluation in which generators had no request."""
        before, self._stats_before = self._stats_before, dict(stats)
        known = [(s, before[name]) for name, s in stats.items() if name in before]
        busy = sum(now.busy_s - then.busy_s for now, then in known)
        alive = sum(now.alive_s - then.alive_s for now, then in known)
        return 1 - busy / alive if alive > 0 else 0.0
