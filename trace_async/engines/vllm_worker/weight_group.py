"""Form a process group for weight broadcasts alone: rank 0 sends, and the server's workers are the other ranks.

With vLLM both ends use this file, which lies where vLLM's workers can import it. SGLang brings a receiver of its own,
so there only the sending end uses it.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


class WeightGroup:
    """A group beside torch's default one, which belongs to the learner's or the server's own ranks.

    The constructor joins and returns when all `world_size` members have joined. It blocks, so call it in a thread. With
    NCCL the sender needs a GPU of its own, because NCCL takes one rank per GPU; gloo carries tensors of GPUs too,
    through host memory. `device` is where this member's tensors lie. `listener` is the sender's: the file descriptor of
    a socket that listens on `port` of the loopback interface, which the group takes. Everything raises RuntimeError
    when it takes longer than `timeout_s`.
    """

    def __init__(
        self,
        *,
        port: int,
        name: str,
        rank: int,
        world_size: int,
        backend: str,
        device: torch.device,
        timeout_s: float,
        listener: int | None = None,
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        store = dist.TCPStore(
            "127.0.0.1",
            port,
            world_size,
            is_master=rank == 0,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listener,
        )
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
        """Send the tensors one after the other, in the order that the receivers expect."""
        works = []  # (transfer, tensor): the tensor must live until its transfer has ended
        for tensor in tensors:
            sent = tensor.detach().to(self._device).contiguous()
            works.append((dist.broadcast(sent, src=0, group=self._group, async_op=True), sent))
        for work, _ in works:
            work.wait()

    def receive(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return the next tensor that rank 0 sends."""
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        dist.broadcast(tensor, src=0, group=self._group)
        return tensor

    def close(self) -> None:
        dist.destroy_process_group(self._group)
