"""Run the learner's DeepSpeed ranks as Ray actors (`LearnerRank`) and use them as one learner (`LearnerGroup`)."""

import asyncio
import socket
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.calls import ActorLostError, CallError, ask
from trace_async.config import Config
from trace_async.trees.tree import RolloutTree
from trace_async.weight_delta import DeltaEncoder, WeightDelta
from trace_async.weights import WeightBucket, WeightCount, WeightManifest


@dataclass(frozen=True, slots=True)
class DeltaRef:
    """A WeightDelta in the object store."""

    base_version: int
    """The weights that it changes."""
    delta: ray.ObjectRef


class LearnerRankError(CallError):
    """A learner rank died or did not answer in time; the message names it. The group must be closed."""


class LearnerRank:
    """One process of the group. Every method but `meeting_point` must be called on all ranks together."""

    def __init__(self, config: Config, policy_path: str, rank: int) -> None:
        self._config = config
        self._policy_path = Path(policy_path)
        self._rank = rank
        self._learner: Any = None
        self._listener: socket.socket | None = None
        self._encoder = DeltaEncoder() if config.engine.weight_delta and rank == 0 else None
        self._delta: WeightDelta | None = None

    def __repr__(self) -> str:
        """Return the name under which Ray's dashboard and logs show the actor."""
        return f"{self._config.name} learner rank {self._rank}"

    def meeting_point(self) -> tuple[str, int]:
        """Listen for the other ranks, and return the address and the port. The socket is kept until `build`.

        It listens on this node's own address only, so that no other network of the machine reaches it.
        """
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=socket.SOMAXCONN)
        return host, self._listener.getsockname()[1]

    def build(self, host: str = "", port: int = 0) -> None:
        """Load the policy and join the other ranks at their meeting point; a lone rank needs none."""
        # Imported here, because its imports take seconds and only the rank's own process needs them.
        from trace_async.learner.deepspeed import RankAddress
        from trace_async.learner.learner import Learner

        listener, self._listener = self._listener, None
        address = RankAddress(
            rank=self._rank,
            world_size=self._config.learner.num_ranks,
            host=host,
            port=port,
            listener=None if listener is None else listener.detach(),
        )
        self._learner = Learner(self._config, self._policy_path, address)

    def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Train on `trees` (see Learner.update)."""
        return self._learner.update(trees, policy_version)

    @ray.method(num_returns="streaming")
    def weights(self, policy_version: int) -> Iterator[WeightBucket | WeightManifest]:
        """Yield the buckets of the weights and, last, their manifest.

        A bucket is in the object store before the next one is gathered, so that one bucket at a time takes memory.
        Only rank 0 has buckets.
        """
        count = WeightCount()
        for bucket in self._learner.weights():
            count.add(bucket)
            if self._encoder is not None:
                self._encoder.add(bucket)
            yield bucket
            del bucket  # it lives on in the object store only
        self._delta = self._encoder.finish(policy_version) if self._encoder is not None else None
        yield count.manifest(policy_version)

    @ray.method(num_returns=2)
    def delta(self) -> tuple[int | None, WeightDelta | None]:
        """Return what changed with the weights that were sent last, once: the version before them, and the delta.

        Both are None when the whole has to be sent.
        """
        delta, self._delta = self._delta, None
        return (None, None) if delta is None else (delta.base_version, delta)

    def save(self, folder: str) -> None:
        """Write this rank's share of a checkpoint into `folder`."""
        from trace_async.learner.state import save_learner

        save_learner(self._learner, Path(folder))

    def load(self, folder: str) -> None:
        """Go on from what `save` wrote. Raises CheckpointError when it does not fit."""
        from trace_async.learner.state import load_learner

        load_learner(self._learner, Path(folder))

    def export(self, target: str) -> None:
        """Write the current policy as a Hugging Face folder with LoRA merged."""
        from trace_async.learner.state import export_learner

        export_learner(self._learner, Path(target))

    def close(self) -> None:
        """Leave the group of ranks."""
        from trace_async.learner.deepspeed import leave_ranks

        leave_ranks()


class LearnerGroup:
    """Uses `learner.num_ranks` ranks as one learner.

    A call goes to all ranks and waits at most `learner.step_timeout_s`. The first failure is raised at once, because
    ranks that wait for a dead one would wait for long.
    """

    def __init__(self, config: Config, policy_path: Path) -> None:
        self._config = config
        self._policy_path = policy_path
        self._ranks: list[ActorHandle] = []
        self._placement: PlacementGroup | None = None

    async def start(self) -> None:
        """Start the processes on as few nodes as possible, load the policy and let the ranks join each other."""
        learner, num_gpus = self._config.learner, self._config.actors.learner_gpus
        needs = {"CPU": float(learner.num_threads)} | ({"GPU": num_gpus} if num_gpus else {})
        self._placement = placement_group([needs] * learner.num_ranks, strategy="PACK")
        await self._wait("placement", [self._placement.ready()])
        remote = ray.remote(num_cpus=learner.num_threads, num_gpus=num_gpus)(LearnerRank)
        environment = {"env_vars": {"OMP_NUM_THREADS": str(learner.num_threads)}}
        self._ranks = [
            remote.options(
                runtime_env=environment,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    self._placement, placement_group_bundle_index=rank
                ),
            ).remote(self._config, str(self._policy_path), rank)
            for rank in range(learner.num_ranks)
        ]
        meeting_point = ()
        if learner.num_ranks > 1:
            (meeting_point,) = await self._wait("start", [self._ranks[0].meeting_point.remote()])
        await self._all("build", *meeting_point)

    async def update(self, trees: Sequence[RolloutTree], policy_version: int) -> dict[str, float]:
        """Train the policy, which is at `policy_version`, on `trees`. Returns `learner/…` metrics (see Learner.update).

        `learner/updated` is 0 when no tree carries a signal, so that the weights are what they were.
        """
        # Put into the object store once, and not serialised again for every rank.
        shared = ray.put(list(trees))
        results = await self._all("update", shared, policy_version)
        return {f"learner/{name}": value for name, value in results[0].items()}

    async def weights(self, policy_version: int) -> list[ray.ObjectRef]:
        """Return references to the buckets of the current weights and, last, to their manifest as `policy_version`.

        The weights stay in the object store until `GeneratorActor.receive_weights` takes them from there.
        """
        streams = [rank.weights.remote(policy_version) for rank in self._ranks]
        parts: list[list[ray.ObjectRef]] = await self._wait("weights", [_all_of(stream) for stream in streams])
        return parts[0]

    async def checksum(self, weights: Sequence[ray.ObjectRef]) -> str:
        """Return the checksum of what the method `weights` returned."""
        manifest: WeightManifest = await weights[-1]
        return manifest.checksum

    async def delta(self) -> DeltaRef | None:
        """Return what changed with the weights that `weights` gave last; None when the whole has to be sent."""
        base_version, delta = self._ranks[0].delta.remote()
        (base,) = await self._wait("delta", [base_version])
        return None if base is None else DeltaRef(base, delta)

    async def save(self, folder: Path) -> None:
        """Write the learner's part of a checkpoint into `folder`, which all ranks must see. Each writes its share."""
        await self._all("save", str(folder))

    async def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, with any number of ranks. Raises CheckpointError when it does not fit."""
        await self._all("load", str(folder))

    async def export(self, target: Path) -> None:
        """Write the current policy as a Hugging Face folder with LoRA merged."""
        await self._all("export", str(target))

    async def close(self) -> None:
        """End the processes. A rank that hangs is killed."""
        if self._ranks:
            await asyncio.wait([asyncio.wrap_future(rank.close.remote().future()) for rank in self._ranks], timeout=5)
        for rank in self._ranks:
            ray.kill(rank)
        self._ranks = []
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def _all(self, call: str, *arguments: Any) -> list[Any]:
        return await self._wait(call, [getattr(rank, call).remote(*arguments) for rank in self._ranks])

    async def _wait(self, call: str, replies: Sequence[Awaitable[Any]]) -> list[Any]:
        # No call has a limit of its own: all ranks share one, and the first failure counts.
        futures = [asyncio.ensure_future(ask(reply, who=f"rank {rank}")) for rank, reply in enumerate(replies)]
        limit = self._config.learner.step_timeout_s
        done, waiting = await asyncio.wait(futures, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
        failed = {future for future in done if future.exception() is not None}
        if failed and waiting:
            # The peers of a dead rank fail with broken connections, perhaps before Ray reports its death. Wait a
            # moment, so that the error names the cause and not a consequence.
            done, _ = await asyncio.wait(futures, timeout=2)
            failed = {future for future in done if future.exception() is not None}
        errors = [(rank, future.exception()) for rank, future in enumerate(futures) if future in failed]
        for rank, error in sorted(errors, key=lambda pair: not isinstance(pair[1], ActorLostError)):
            assert error is not None
            if isinstance(error, ActorLostError):
                raise LearnerRankError(f"learner rank {rank} died during {call}: {error}") from error
            raise error
        if waiting:
            late = [rank for rank, future in enumerate(futures) if future in waiting]
            raise LearnerRankError(f"learner ranks {late} did not finish {call} within learner.step_timeout_s={limit}")
        return [future.result() for future in futures]


async def _all_of(stream: ray.ObjectRefGenerator) -> list[ray.ObjectRef]:
    """Return all references of the stream when it has ended. Raises the error that ended it too early."""
    references = [reference async for reference in stream]
    await references[-1]  # an error in the actor is the last thing of the stream
    return references
