"""Weights by broadcast from a generator's process to its server's workers: the sending side."""

import asyncio
import functools
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from trace_async.engine import EngineError
from trace_async.engines.servers.http_client import Reply
from trace_async.engines.servers.server import free_port
from trace_async.engines.servers.weight_record import Tensors
from trace_async.engines.vllm_worker.weight_group import WeightGroup

T = TypeVar("T")
# Asks the server for its part, which it does while we do ours.
Tell = Callable[[dict[str, Reply]], Awaitable[Reply]]


class WeightBroadcast:
    """Makes its process group at the first update, and anew after one that failed.

    NCCL when this process sees a GPU that the server, on the first `num_workers`, does not use; else gloo.
    """

    def __init__(self, *, num_workers: int, on_gpu: bool, timeout_s: float) -> None:
        self._num_workers = num_workers
        self._on_gpu = on_gpu
        self._timeout_s = timeout_s
        self._group: WeightGroup | None = None
        self._name = ""

    async def send(self, tensors: Tensors, *, join: Tell, receive: Tell) -> Reply:
        """`receive`'s reply. EngineError when either side failed; it ends within `timeout_s` for each of the two steps.

        `join` is told port, name, world_size, backend and timeout_s of the group to join as ranks 1, 2, ...; `receive`
        is told group_name and names, dtypes and shapes of the tensors that come, in this order.
        """
        try:
            if self._group is None:
                await self._join(join)
            assert self._group is not None
            names = sorted(tensors)
            told: dict[str, Reply] = {
                "group_name": self._name,
                "names": names,
                "dtypes": [str(tensors[name].dtype).removeprefix("torch.") for name in names],
                "shapes": [list(tensors[name].shape) for name in names],
            }
            send = functools.partial(self._group.send, [tensors[name] for name in names])
            _, reply = await _both(send, receive(told))
            return reply
        except EngineError:
            await self.close()
            raise

    async def _join(self, join: Tell) -> None:
        spare = self._on_gpu and torch.cuda.is_available() and torch.cuda.device_count() > self._num_workers
        backend = "nccl" if spare else "gloo"
        port, world_size = free_port(), 1 + self._num_workers
        self._name = f"weights_{uuid.uuid4().hex}"
        make = functools.partial(
            WeightGroup,
            port=port,
            name=self._name,
            rank=0,
            world_size=world_size,
            backend=backend,
            device=torch.device("cuda", self._num_workers) if spare else torch.device("cpu"),
            timeout_s=self._timeout_s,
        )
        told: dict[str, Reply] = {
            "port": port,
            "name": self._name,
            "world_size": world_size,
            "backend": backend,
            "timeout_s": self._timeout_s,
        }
        self._group, _ = await _both(make, join(told))

    async def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(group.close)


async def _both(ours: Callable[[], T], theirs: Awaitable[Reply]) -> tuple[T, Reply]:
    """Our part, in a thread, and the server's; what the server said first when both failed."""
    done, reply = await asyncio.gather(asyncio.to_thread(ours), theirs, return_exceptions=True)
    if isinstance(reply, BaseException):
        raise reply
    if isinstance(done, RuntimeError):
        raise EngineError(f"weight broadcast: {done}") from done
    if isinstance(done, BaseException):
        raise done
    return done, reply
