"""Predictor: the PredictorActor as the trainer and the prompts see it.

When its process dies, Ray starts it anew, it loads the newest checkpoint of the run, and the calls that were under way
are made again: whoever asked waits a little longer. Values only steer where budget goes, so the few updates that the
new one has not seen cost precision, not correctness.
"""

from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from actors.calls import CallTimeoutError, ask
from actors.predictors.predictor import remote_predictor
from trace_async.config import Config
from trace_async.method.posterior import Estimates
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery


@dataclass(frozen=True, slots=True)
class Predictor:
    """A handle of the PredictorActor, which can be sent to other actors.

    Every method raises ActorLostError or CallTimeoutError when no answer can be had.
    """

    actor: ActorHandle
    start_limit_s: float
    """Until the model is loaded, the first time."""
    limit_s: float
    """For every other call, a restart of the process included."""

    @classmethod
    def start(cls, config: Config, policy_path: Path, checkpoints: Path) -> "Predictor":
        """Begin to start the actor; `ready` waits for it. `checkpoints`: of the run, where a restarted one looks."""
        actor = remote_predictor(config, str(policy_path), str(checkpoints))
        start_s = config.engine.start_timeout_s
        return cls(actor, start_s, start_s + config.learner.step_timeout_s)

    async def ready(self) -> None:
        """Wait until the model is loaded. Raises CallTimeoutError."""
        try:
            await ask(self.actor.ready.remote(), who="the predictor", limit_s=self.start_limit_s)
        except CallTimeoutError:
            raise CallTimeoutError(
                f"the predictor did not start within engine.start_timeout_s={self.start_limit_s:g}: `ray status` shows "
                "whether there is room for it"
            ) from None

    async def values(self, queries: Sequence[PrefixQuery]) -> Sequence[np.ndarray]:
        """Return V at each position of each query; see `ValuePredictor.predict`."""
        return await self._ask(self.actor.values.remote(list(queries)))

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Return Beta posteriors of candidate prompts; see `ValuePredictor.estimate`."""
        return await self._ask(self.actor.estimate.remote(list(task_ids), list(queries)))

    async def train(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        """Learn from the trees of one update, and return `predictor/…` metrics; see `PredictorActor.train`."""
        return await self._ask(self.actor.train.remote(list(trees), policy_version, taught))

    async def taught(self) -> Mapping[str, np.ndarray] | None:
        """Return what the last trees taught it; see `PredictorActor.taught`."""
        return await self._ask(self.actor.taught.remote())

    async def receive_weights(self, weights: Sequence[ray.ObjectRef]) -> int:
        """Let it read with these weights, and return their version; see `PredictorActor.receive_weights`."""
        return await self._ask(self.actor.receive_weights.remote(*weights))

    async def checksum(self) -> str:
        """Return the checksum of what it has learnt."""
        return await self._ask(self.actor.checksum.remote())

    async def save(self, folder: Path) -> None:
        """Write what it has learnt into `folder`."""
        await self._ask(self.actor.save.remote(str(folder)))

    async def load(self, folder: Path) -> None:
        """Go on from a checkpoint in `folder`."""
        await self._ask(self.actor.load.remote(str(folder)))

    def close(self) -> None:
        ray.kill(self.actor)

    async def _ask(self, reply: Awaitable[Any]) -> Any:
        return await ask(reply, who="the predictor", limit_s=self.limit_s)
