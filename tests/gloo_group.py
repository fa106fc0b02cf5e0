"""In the place of vLLM's NCCL communicator, where there is no GPU: the same calls over gloo's sockets."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td


class GlooGroup:
    """Rank `rank` of the trainer (0) and a server's workers (1 and up). Made by all of them at once. Workers
    wait longer, as the trainer's broadcasts to other servers, unlike NCCL's, keep it until they fail."""

    def __init__(self, address: str, port: int, rank: int, size: int):
        limit = timedelta(seconds=30 if rank else 5)
        self.store = td.TCPStore(address, port, size, is_master=rank == 0, timeout=limit)
        self.group = td.ProcessGroupGloo(td.PrefixStore("weights", self.store), rank, size, limit)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: Any = None) -> None:
        options = td.BroadcastOptions()
        options.rootRank = src
        self.group.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        self.group = None


def join(address: str, port: int, world_size: int, device: torch.device) -> GlooGroup:
    """As nccl_transfer.join."""
    return GlooGroup(address, port, 0, world_size)
