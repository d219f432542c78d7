"""The sending end of a weight broadcast: rank 0 of a process group of its own, the server's workers are the others."""

from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class WeightGroup:
    """Joins in its constructor, which returns when all `world_size` members have; blocking, so call it in a thread.

    A group beside torch's default one, which belongs to the learner's ranks where there is one. With NCCL the sender
    needs a GPU of its own (NCCL takes one rank a GPU); gloo also carries tensors of GPUs, through host memory.
    """

    def __init__(self, *, port: int, name: str, world_size: int, device: torch.device, timeout_s: float) -> None:
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", 0, world_size, timeout=timeout))
        store.set_timeout(timeout)
        self._device = device
        self._group, _ = c10d._new_process_group_helper(
            world_size,
            0,
            [],
            c10d.Backend(self.backend(device)),
            c10d.PrefixStore(name, store),
            group_name=c10d.GroupName(name),
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}

    @staticmethod
    def backend(device: torch.device) -> str:
        return "nccl" if device.type == "cuda" else "gloo"

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """One after the other, in the order that the receivers were told."""
        works = []
        for tensor in tensors:
            sent = tensor.detach().to(self._device).contiguous()
            works.append((dist.broadcast(sent, src=0, group=self._group, async_op=True), sent))
        for work, _ in works:
            work.wait()

    def close(self) -> None:
        dist.destroy_process_group(self._group)
