"""Define what an inference engine must offer.

The implementations are in `trace_async/engines/`. Only the factory there imports them, so that nobody needs the
libraries of an engine that is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from trace_async.types import Completion, LossKind, SamplingParams
from trace_async.weights import WeightUpdate


class EngineError(Exception):
    """Report that an engine could not do what was asked.

    This is never the model's fault, so it never becomes a reward: the rollout is lost, and counted as lost.
    """

    loss: ClassVar[LossKind] = LossKind.ENGINE
    """How the ledger counts a rollout that ends with this error."""


class EngineRequestError(EngineError):
    """Report that the request itself is wrong, such as one too long for the context. A retry cannot help."""

    loss = LossKind.ENGINE_REFUSED


class EngineDeadError(EngineError):
    """Report that the engine's process or its connection is gone. Retry on another generator."""

    loss = LossKind.ENGINE_DIED


class EngineTimeoutError(EngineError):
    """Report that the engine made no progress within its limit. Retry on another generator."""

    loss = LossKind.ENGINE_TIMEOUT


class WeightSyncError(EngineError):
    """Report that new weights arrived corrupt, incomplete, unchanged or not at all.

    The engine must not serve until a later update has succeeded.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """A snapshot of an engine. The counts of tokens are totals since its start."""

    policy_version: int
    """The version that it serves now."""
    num_running: int
    """Requests that it is generating for."""
    num_waiting: int
    """Requests that it has accepted and not begun."""
    prompt_tokens: int
    cached_tokens: int
    """How many of the `prompt_tokens` came from the KV cache."""
    generated_tokens: int


class Engine(Protocol):
    """An inference engine. All methods are coroutines of one event loop."""

    async def start(self) -> None:
        """Load the model and get ready to generate.

        Raises EngineError, which names the cause and the place of the log.
        """
        ...

    async def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Completion:
        """Draw one sample. Requests with a common prefix share its KV, also when they come at the same time.

        Cancelling the awaiting task aborts the request.
        """
        ...

    async def update_weights(self, update: WeightUpdate) -> None:
        """Serve `update.manifest.policy_version` from now on.

        Requests in flight go on under the new weights. The tokens that they have so far keep their log-probabilities
        and their version span. Cached KV of the old weights is dropped. Raises WeightSyncError when the checksum
        differs or nothing changed.
        """
        ...

    async def health(self) -> EngineHealth:
        """Return a snapshot. Raises EngineDeadError or EngineTimeoutError when the engine does not answer."""
        ...

    async def close(self) -> None:
        """Stop, and give back processes, ports and memory. Requests in flight end with EngineDeadError."""
        ...
