"""A process group for weight broadcasts alone: rank 0 sends, the server's workers are the others.

Both ends of vLLM's use this file (it stands where vLLM's workers can import it); of SGLang's, which brings a receiver
of its own, the sending end.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class WeightGroup:
    """Joins in its constructor, which returns when all `world_size` members have; blocking, so call it in a thread.

    A group beside torch's default one, which belongs to the learner's ranks, or to those of the server. With NCCL the
    sender needs a GPU of its own (NCCL takes one rank a GPU); gloo also carries tensors of GPUs, through host memory.
    `device`: where this member's tensors lie. Everything raises RuntimeError when it takes longer than `timeout_s`.
    """

    def __init__(
        self, *, port: int, name: str, rank: int, world_size: int, backend: str, device: torch.device, timeout_s: float
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        store, _, _ = next(c10d.rendezvous(f"tcp://127.0.0.1:{port}", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        self.name = name
        self._device = device
        self._group, _ = c10d._new_process_group_helper(
            world_size,
            rank,
            [],
            c10d.Backend(backend),
            c10d.PrefixStore(name, store),
            group_name=c10d.GroupName(name),
            timeout=timeout,
        )
        c10d._world.pg_group_ranks[self._group] = {member: member for member in range(world_size)}

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """One after the other, in the order that the receivers were told."""
        works = []
        for tensor in tensors:
            sent = tensor.detach().to(self._device).contiguous()
            works.append((dist.broadcast(sent, src=0, group=self._group, async_op=True), sent))
        for work, _ in works:
            work.wait()

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next tensor."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group(self._group)
