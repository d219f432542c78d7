"""One way to call an actor: a limit, and a result or a typed error.

    answer = await ask(handle.values.remote(queries), who="the predictor", limit_s=60)

Whatever Ray says of an actor that is gone becomes ActorLostError; no answer in time becomes CallTimeoutError, and the
call is cancelled for real. What the actor's own method raised is raised as it is. The managers of generators, prompts,
predictor and learner decide what to do about a loss: none of them retries what another one retries already.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError, TaskCancelledError

from trace_async.types import LossKind


class CallError(Exception):
    """A call to an actor brought no answer; the message names the actor."""


class ActorLostError(CallError):
    """The actor's process or its node is gone, or cannot be reached."""


class CallTimeoutError(CallError, TimeoutError):
    """No answer within the limit; the actor may be alive."""


class NeededActorLostError(CallError):
    """The actor is alive, but another one that it needs is lost to it."""


class PromptLostError(CallError):
    """A prompt brought no tree, through no fault of the policy; `kind` is how the ledger counts it."""

    def __init__(self, kind: LossKind) -> None:
        super().__init__(str(kind))
        self.kind = LossKind(kind)


async def ask(reply: Awaitable[Any], *, who: str, limit_s: float | None = None) -> Any:
    """Return what the actor answers.

    `limit_s`: seconds; None for calls whose limit runs in the actor, from when they are served. Raises ActorLostError,
    CallTimeoutError, or what the method raised.
    """
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await reply
    except TimeoutError:
        if not limit.expired():
            raise  # the method's own
        cancel(reply)
        raise CallTimeoutError(f"{who} did not answer within {limit_s:g} s") from None
    except asyncio.CancelledError:
        cancel(reply)
        raise
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, ActorLostError | CallTimeoutError):
            raise NeededActorLostError(f"{who}: {cause}") from None
        raise
    except RayActorError as error:
        raise ActorLostError(f"{who} is lost: {first_line(error)}") from error
    except RayError as error:  # an object that was lost with its node, a broken channel
        raise ActorLostError(f"{who} could not be reached: {first_line(error)}") from error


async def ask_all(replies: Sequence[Awaitable[Any]], *, who: Sequence[str], limit_s: float) -> list[Any]:
    """Return all answers in order, each a result or the error that `ask` or the method raised."""
    asked = (ask(reply, who=name, limit_s=limit_s) for reply, name in zip(replies, who, strict=True))
    return await asyncio.gather(*asked, return_exceptions=True)


def cancel(reply: Awaitable[Any]) -> None:
    """Stop the call in its actor too, so that what nobody waits for takes no slot there."""
    if isinstance(reply, ray.ObjectRef):
        with contextlib.suppress(RayError, TaskCancelledError):
            ray.cancel(reply)


def first_line(error: BaseException) -> str:
    """Return the first line of an error. Ray explains a death in a dozen lines; the first says what it was."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
