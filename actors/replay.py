"""Make updates of a run again from what its schedule holds, with the same processes that made them.

    checkpoint before them ─► learner, predictor ─► trees as recorded, update by update ─► checksums, compared

Nothing is generated, and nothing of the run is changed.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from actors.learner import LearnerGroup
from actors.predictors.handle import Predictor
from trace_async.config import Config
from trace_async.run.schedule import Plan, Schedule, UpdateRecord
from trace_async.trees.tree import RolloutTree


class Trained(Protocol):
    """What the learner and the predictor have in common here."""

    async def load(self, folder: Path) -> None: ...


class ReplayedLearner(Trained, Protocol):
    """See `LearnerGroup`."""

    async def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]: ...

    async def weights(self, policy_version: int) -> list[Any]: ...

    async def checksum(self, weights: Sequence[Any]) -> str: ...


class ReplayedPredictor(Trained, Protocol):
    """See `Predictor`."""

    async def train(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Mapping[str, np.ndarray] | None
    ) -> dict[str, float]: ...

    async def checksum(self) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """An update that was made again."""

    record: UpdateRecord
    """As the run made it."""
    trees: Sequence[RolloutTree]
    weights: str
    """Checksum of the policy's weights now; empty where no weight changed."""
    predictor: str
    """Checksum of the predictor's weights now."""
    figures: Mapping[str, float]
    """`learner/…` and `predictor/…`, as in the run."""

    @property
    def otherwise(self) -> list[str]:
        """Return what came out otherwise than in the run: `policy`, `predictor`. Nothing if the run's did not end."""
        if not self.record.ended:
            return []
        same = {"policy": self.weights == self.record.weights, "predictor": self.predictor == self.record.predictor}
        return [name for name, is_same in same.items() if not is_same]


async def replay(
    plan: Plan, schedule: Schedule, learner: ReplayedLearner, predictor: ReplayedPredictor
) -> AsyncGenerator[Replayed]:
    """Make the updates of `plan`, one after another; both models are fresh, as at the beginning of the run."""
    if plan.checkpoint is not None:
        await learner.load(plan.checkpoint / "learner")
        await predictor.load(plan.checkpoint / "predictor")
    for number in plan.updates:
        record = schedule.read(number)
        trees = await asyncio.to_thread(schedule.read_trees, number)
        taught = await asyncio.to_thread(schedule.read_taught, number)
        version = record.policy_version
        # At the same time, as in the run.
        learning = asyncio.create_task(learner.update(trees, version))
        figures = await predictor.train(trees, version, taught)
        figures = {**await learning, **figures}
        changed = bool(figures["learner/updated"])
        yield Replayed(
            record=record,
            trees=trees,
            weights=await learner.checksum(await learner.weights(version + 1)) if changed else "",
            predictor=await predictor.checksum(),
            figures=figures,
        )


async def replay_run(config: Config, run_dir: Path, policy_path: Path, plan: Plan) -> AsyncGenerator[Replayed]:
    """Run `replay` with the run's own kind of processes. Ray must be started.

    A predictor that reads the policy's states (`predictor.trunk=policy`) needs no weights of the policy here: what it
    learns from are states that engines and its own trunk have read in the run, and the schedule holds them.
    """
    learner = LearnerGroup(config, policy_path)
    predictor = Predictor.start(config, policy_path, run_dir / "checkpoints")
    try:
        await asyncio.gather(learner.start(), predictor.ready())
        async for made in replay(plan, Schedule(run_dir), learner, predictor):
            yield made
    finally:
        await learner.close()
        predictor.close()
