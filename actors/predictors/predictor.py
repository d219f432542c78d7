"""PredictorActor: the value model behind Ray. Questions that wait together are answered by one forward."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from safetensors import SafetensorError

from trace_async.config import Config
from trace_async.method.posterior import Estimates
from trace_async.policy.device import resolve_device
from trace_async.predictor.policy_trunk import PolicyTrunkPredictor, Rows
from trace_async.predictor.predictor import ValuePredictor
from trace_async.run.checkpoint import CheckpointStore
from trace_async.trees.tree import RolloutTree
from trace_async.types import PrefixQuery
from trace_async.weights import WeightBucket, WeightManifest, WeightUpdate

TASK_RETRIES = 5
"""How often one call is made again on a process that was started anew. A process may be lost any number of times in a
run, but a call that kills it each time (for lack of memory, say) fails after these."""


class PredictorActor:
    """The value model as a Ray actor.

    All methods run in the actor's one event loop. Training lets waiting questions in between its steps. With `learns`
    False it is a replica, which answers with what the learning one has learnt. An actor that was started anew, or has
    loaded a checkpoint, answers nothing until it is `current`: PredictorGroup brings what it lacks.
    """

    def __init__(self, config: Config, policy_path: str, checkpoints: str = "", *, learns: bool = True) -> None:
        self.name = f"{config.name} predictor{'' if learns else ' replica'}"
        torch.set_num_threads(config.predictor.num_threads)
        device = str(resolve_device(config.predictor.device, name="predictor.device"))
        self.predictor: ValuePredictor | PolicyTrunkPredictor
        if config.predictor_trunk == "policy":
            self.predictor = PolicyTrunkPredictor(config.predictor, policy_path, device=device)
        else:
            self.predictor = ValuePredictor(config.predictor, policy_path, seed=config.seed, device=device)
        self.learns = learns
        self.waiting: list[PrefixQuery] = []
        self.forward: asyncio.Task[list[np.ndarray]] | None = None
        self.training = asyncio.Lock()
        self.current = asyncio.Event()
        restarted = ray.is_initialized() and ray.get_runtime_context().was_current_actor_reconstructed
        newest = CheckpointStore(Path(checkpoints), keep=1).newest() if restarted and learns else None
        if newest is not None:
            self.predictor.load(str(newest / "predictor"))
        if not restarted or (learns and config.predictor_trunk == "own"):
            self.current.set()

    def __repr__(self) -> str:
        """Return the name under which Ray's dashboard and logs show the actor."""
        return self.name

    async def ready(self) -> None:
        """Return once the model is loaded: Ray calls no method before the constructor has ended."""

    async def is_current(self) -> bool:
        """Return whether it answers: not after a restart, until it has what it lacks (`catch_up`)."""
        return self.current.is_set()

    async def catch_up(self, learnt: WeightUpdate | None, *weights: WeightBucket | WeightManifest) -> None:
        """Take what was learnt and the policy's weights, as far as there are any yet, and answer from now on."""
        if learnt is not None:
            self.predictor.take_learnt(learnt)
        if weights:
            await self.receive_weights(*weights)
        self.current.set()

    async def values(self, queries: Sequence[PrefixQuery]) -> list[np.ndarray]:
        """Return V at each position of each query; see `ValuePredictor.predict`."""
        await self.current.wait()
        if self.forward is None:
            self.forward = asyncio.create_task(self._answer_waiting())
        start = len(self.waiting)
        self.waiting.extend(queries)
        return (await asyncio.shield(self.forward))[start : start + len(queries)]

    async def _answer_waiting(self) -> list[np.ndarray]:
        # One turn of the loop, so that calls that have already arrived join this forward.
        await asyncio.sleep(0)
        queries, self.waiting, self.forward = self.waiting, [], None
        return self.predictor.predict(queries)

    async def estimate(self, task_ids: Sequence[str], queries: Sequence[PrefixQuery]) -> Estimates:
        """Return Beta posteriors of candidate prompts; see `ValuePredictor.estimate`."""
        await self.current.wait()
        return self.predictor.estimate(task_ids, queries)

    async def posteriors(self, task_ids: Sequence[str], values: np.ndarray) -> Estimates:
        """Return the same from values that replicas gave; the learning one knows the counts."""
        await self.current.wait()
        return self.predictor.posteriors(task_ids, values)

    async def learnt(self) -> WeightUpdate:
        """Return what it has learnt, for replicas."""
        return self.predictor.learnt()

    async def checksum(self) -> str:
        """Return the checksum of what it has learnt."""
        return self.predictor.learnt().manifest.checksum

    async def take_learnt(self, update: WeightUpdate) -> None:
        """Answer from now on with what the learning one has learnt."""
        self.predictor.take_learnt(update)

    async def train(
        self, trees: Sequence[RolloutTree], policy_version: int, taught: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, float]:
        """Learn from the trees of one update.

        Returns `predictor/…`: how good the values were before, the loss, and `busy_s`, seconds of all its work since
        the last call. `taught`: what the method of that name gave of the same trees, which are now learnt again.
        """
        if taught is None:  # otherwise the states come along, and no weights are needed to read them
            await self.current.wait()
        async with self.training:
            if isinstance(self.predictor, PolicyTrunkPredictor):
                rows = None if taught is None else Rows(**taught)
                metrics = self.predictor.observe(trees, policy_version, rows)
            else:
                metrics = self.predictor.observe(trees, policy_version)
            for step in self.predictor.steps(trees):
                await asyncio.sleep(0)
                metrics["loss"] = step()
            metrics["busy_s"], self.predictor.busy_s = self.predictor.busy_s, 0.0
            return {f"predictor/{name}": value for name, value in metrics.items()}

    async def taught(self) -> dict[str, np.ndarray] | None:
        """Return, with trunk=policy, what the last trees taught, states and all (`Rows`). None: the trees say it."""
        return self.predictor.taught.arrays() if isinstance(self.predictor, PolicyTrunkPredictor) else None

    async def receive_weights(self, *parts: WeightBucket | WeightManifest) -> int:
        """Read with the policy's new weights from now on (trunk=policy). Returns the version that values are now of.

        `parts`: as the learner sends them to the generators, buckets and, last, their manifest.
        """
        *buckets, manifest = parts
        assert isinstance(self.predictor, PolicyTrunkPredictor), "a trunk of its own takes no weights"
        assert isinstance(manifest, WeightManifest)
        version = self.predictor.receive_weights([part for part in buckets if isinstance(part, WeightBucket)], manifest)
        if self.learns:
            self.current.set()  # what it has learnt came with the checkpoint
        return version

    async def save(self, directory: str) -> None:
        """Write what it has learnt. Raises OSError when the disk does not take it."""
        async with self.training:
            try:
                self.predictor.save(directory)
            except (SafetensorError, RuntimeError) as error:  # what safetensors and torch make of a full disk
                raise OSError(f"{directory}: {error}") from error

    async def load(self, directory: str) -> None:
        """Go on from what `save` wrote; values wait for the policy's weights where these are lacking."""
        self.predictor.load(directory)
        if isinstance(self.predictor, PolicyTrunkPredictor) and self.predictor.lacks_weights:
            self.current.clear()


def remote_predictor(config: Config, policy_path: str, checkpoints: str, *, learns: bool = True) -> ActorHandle:
    """Start the actor. `policy_path`: what its model starts from unless `predictor.path` says otherwise.

    Ray starts it anew when its process dies, and makes the calls under way again. The one that learns then goes on from
    the newest of the run's `checkpoints`.
    """
    actor = ray.remote(
        num_cpus=config.predictor.num_threads,
        num_gpus=config.actors.predictor_gpus,
        max_restarts=-1,
        max_task_retries=TASK_RETRIES,
    )(PredictorActor)
    return actor.remote(config, policy_path, checkpoints, learns=learns)
