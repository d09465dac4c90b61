"""The workers that train together, seen from one of them: sums over all, DDP or FSDP2.

Only torch.distributed; who starts the processes (Ray Train, torchrun, nobody) does not matter. Without a process group
all of it works for one worker alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

Parallel = Literal["ddp", "fsdp"]
CPU = torch.device("cpu")
_SHARD_FROM = 1_000_000  # parameters of a layer from which FSDP gathers it by itself


@dataclass(frozen=True)
class Group:
    """This worker's place. `local_rank` 0 does what is needed once for each machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = CPU

    @classmethod
    def current(cls, local_rank: int = 0, device: torch.device | str = "cpu") -> Group:
        """From the process group that runs, or one worker alone."""
        if not dist.is_available() or not dist.is_initialized():
            return cls(device=torch.device(device))
        return cls(dist.get_rank(), dist.get_world_size(), local_rank, torch.device(device))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, the same on all of them, where `tensor` lies."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def gather(self, part: NDArray[Any]) -> list[NDArray[Any]]:
        """Each worker's array of equal shape, in the order of ranks, on all workers."""
        if self.world_size == 1:
            return [part]
        mine = torch.from_numpy(part).to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine)
        return [tensor.cpu().numpy() for tensor in parts]

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def agree(self, error: Exception | None) -> None:
        """If one worker has an error, all raise ValueError, so that none waits for one that is gone."""
        failed = self.sum(torch.tensor([float(error is not None)]))
        if error is not None:
            raise error
        if failed.item():
            raise ValueError("another worker of this run could not go on; its message tells why")

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:
        """The module, on this worker's device, whose gradients are averages over the workers.

        `ddp`: every worker holds everything; `fsdp`: parameters, gradients and optimiser are split over the workers
        (FSDP2), for vectors so long that one GPU cannot hold them all.
        """
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        if parallel == "fsdp":
            return _shard(module, self)
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be split over the workers. Then all workers must call it."""
    return tensor.full_tensor().detach() if _is_split(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def copy_whole(target: Tensor, source: Tensor) -> None:
    """Write a full tensor into one that may be split over the workers; all workers have the same `source`."""
    if _is_split(target):
        from torch.distributed.tensor import distribute_tensor

        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(source)


def like_parameter(source: Tensor, parameter: Tensor) -> Tensor:
    """`source`, a full tensor, split as `parameter` is and where it lies, as a fused optimiser wants its step count, too."""
    if source.shape != parameter.shape:
        return source.to(parameter.device)
    copy = torch.empty_like(parameter)
    copy_whole(copy, source)
    return copy


def _is_split(tensor: Tensor) -> bool:
    """Whether it is a DTensor. What defines these takes seconds to import, and only FSDP makes them."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def _shard(module: nn.Module, group: Group) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.world_size,))
    for layer in module.modules():
        if isinstance(layer, nn.Linear) and layer.weight.numel() >= _SHARD_FROM:
            fully_shard(layer, mesh=mesh)
    # the root as well: validation runs without backward, and what it put together must not be used after it
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module
