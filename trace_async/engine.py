"""The seam to inference engines. Implementations are in `trace_async/engines/`, imported by one factory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from trace_async.types import Completion, LossKind, SamplingParams
from trace_async.weights import WeightUpdate


class EngineError(Exception):
    """An engine could not do what was asked; never the model's fault, never a reward.

    `loss`: how the ledger counts a rollout that it ends.
    """

    loss: ClassVar[LossKind] = LossKind.ENGINE


class EngineRequestError(EngineError):
    """The request itself is wrong (too long for the context, ids outside the vocabulary): a retry cannot help."""

    loss = LossKind.ENGINE_REFUSED


class EngineDeadError(EngineError):
    """The engine's process is gone or its connection broke: retry on another generator."""

    loss = LossKind.ENGINE_DIED


class EngineTimeoutError(EngineError):
    """The engine made no progress within its limit: retry on another generator."""

    loss = LossKind.ENGINE_TIMEOUT


class WeightSyncError(EngineError):
    """Weights arrived corrupt, incomplete, unchanged, or not at all; the engine must not serve until re-synced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """A snapshot of an engine. `cached_tokens`/`prompt_tokens` and `generated_tokens` are totals since its start."""

    policy_version: int
    num_running: int
    num_waiting: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


class Engine(Protocol):
    """Inference only. All methods are coroutines of one event loop."""

    async def start(self) -> None:
        """Load the model and be ready to generate; raises EngineError with the cause and where the log is."""
        ...

    async def generate(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, n: int = 1
    ) -> tuple[Completion, ...]:
        """`n` independent samples that share the prompt's KV. Cancelling the awaiting task aborts the request."""
        ...

    async def update_weights(self, update: WeightUpdate) -> None:
        """Serve `update.manifest.version` from now on. Requests in flight go on under the new weights.

        Their tokens so far keep their log-probabilities and version span; cached KV of the old weights is dropped.
        Raises WeightSyncError when the checksum differs or nothing changed.
        """
        ...

    async def pause(self) -> None:
        """Stop decoding; requests in flight stay and continue after `resume`."""
        ...

    async def resume(self) -> None: ...

    async def health(self) -> EngineHealth:
        """Raises EngineDeadError or EngineTimeoutError when the engine does not answer."""
        ...

    async def close(self) -> None:
        """Stop and give back processes, ports and memory; requests in flight end with EngineDeadError."""
        ...
