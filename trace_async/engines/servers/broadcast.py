"""Broadcast weights from a generator's process to the workers of its server: the sending side."""

import asyncio
import functools
import socket
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

import torch

from trace_async.engine import EngineError
from trace_async.engines.servers.http_client import Reply
from trace_async.engines.servers.weight_record import Tensors
from trace_async.engines.vllm_worker.weight_group import WeightGroup

T = TypeVar("T")
# Asks the server for its part of a step. It must run while we do ours, because the two sides wait for each other.
Tell = Callable[[dict[str, Reply]], Awaitable[Reply]]


class WeightBroadcast:
    """Sends weights through a process group, which it makes at the first update and anew after one that failed.

    It uses NCCL when this process sees a GPU beyond the first `num_workers`, which the server uses; otherwise gloo.
    """

    def __init__(self, *, num_workers: int, on_gpu: bool, timeout_s: float) -> None:
        self._num_workers = num_workers
        self._on_gpu = on_gpu
        self._timeout_s = timeout_s
        self._group: WeightGroup | None = None
        self._name = ""

    async def send(self, tensors: Tensors, *, join: Tell, receive: Tell) -> Reply:
        """Send the tensors and return the reply of `receive`. Raises EngineError when either side failed.

        Each of the two steps ends within `timeout_s`. `join` is given port, name, world_size, backend and timeout_s of
        the group that the workers join as ranks 1, 2, … `receive` is given group_name and the names, dtypes and shapes
        of the tensors, in the order in which they come.
        """
        try:
            if self._group is None:
                await self._join(join)
            assert self._group is not None
            names = sorted(tensors)
            description: dict[str, Reply] = {
                "group_name": self._name,
                "names": names,
                "dtypes": [str(tensors[name].dtype).removeprefix("torch.") for name in names],
                "shapes": [list(tensors[name].shape) for name in names],
            }
            send = functools.partial(self._group.send, [tensors[name] for name in names])
            _, reply = await _both(send, receive(description))
            return reply
        except EngineError:
            await self.close()
            raise

    async def _join(self, join: Tell) -> None:
        spare = self._on_gpu and torch.cuda.is_available() and torch.cuda.device_count() > self._num_workers
        backend = "nccl" if spare else "gloo"
        # It listens from now on: a port that was only found free could be taken before the group listens.
        listener = socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN)
        port, world_size = listener.getsockname()[1], 1 + self._num_workers
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
            listener=listener.detach(),
        )
        description: dict[str, Reply] = {
            "port": port,
            "name": self._name,
            "world_size": world_size,
            "backend": backend,
            "timeout_s": self._timeout_s,
        }
        self._group, _ = await _both(make, join(description))

    async def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            await asyncio.to_thread(group.close)


async def _both(ours: Callable[[], T], theirs: Awaitable[Reply]) -> tuple[T, Reply]:
    """Do our part in a thread, together with the server's. Raises the server's error first if both failed."""
    done, reply = await asyncio.gather(asyncio.to_thread(ours), theirs, return_exceptions=True)
    if isinstance(reply, BaseException):
        raise reply
    if isinstance(done, RuntimeError):
        raise EngineError(f"weight broadcast: {done}") from done
    if isinstance(done, BaseException):
        raise done
    return done, reply
