"""Models whose parameters or batches are spread over processes: what their modules read and give."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def unwrapped(model: nn.Module) -> nn.Module:
    """The module whose names are those of the model that was wrapped or compiled. What is called is the wrapper."""
    while True:
        # Wrappers stand around each other in any order: a compiled model in DataParallel, or the reverse.
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif is_compiled(model):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def is_compiled(module: nn.Module) -> bool:
    """Whether it is what `torch.compile` makes of a module; what `Module.compile` compiles is the module itself."""
    found = sys.modules.get("torch._dynamo.eval_frame")  # nobody has compiled anything before it is imported
    return found is not None and isinstance(module, found.OptimizedModule)


def runs_together(model: nn.Module) -> bool:
    """Whether a forward pass waits for other processes, so that all must make as many."""
    return any(isinstance(module, DistributedDataParallel) for module in model.modules()) or any(
        has_shards(module) for module in model.modules()
    )


def has_shards(module: nn.Module) -> bool:
    """Whether parameters of its own are distributed tensors: FSDP2, tensor parallelism."""
    return any(is_distributed(parameter) for parameter in module.parameters(recurse=False))


def is_distributed(tensor: Any) -> bool:
    found = sys.modules.get("torch.distributed.tensor")  # nobody has made one before it is imported
    return found is not None and isinstance(tensor, found.DTensor)


def identity(tensor: Any) -> Any:
    """The object that stays the same when a distributed tensor becomes a local one, or the reverse."""
    return tensor._local_tensor if is_distributed(tensor) else tensor


class Channels:
    """Where the channels of a map are, if they are on several processes."""

    def __init__(self) -> None:
        self._mesh: Any = None

    def of(self, x: Tensor, axis: int) -> Tensor:
        """What this process has of the map: all samples and positions, perhaps of a part of the channels."""
        self._mesh = None
        if not is_distributed(x):
            return x
        from torch.distributed.tensor import Replicate, Shard

        map_: Any = x
        axis %= x.ndim
        # Spread along another axis, or as sums that are still to be added, a map is gathered: pooling wants whole
        # planes, but each channel by itself.
        parts = [placement if placement.is_shard(axis) else Replicate() for placement in map_.placements]
        local: Tensor = map_.redistribute(placements=parts).to_local()
        if any(part.is_shard() for part in parts):
            self._mesh, self._channels = map_.device_mesh, x.shape[axis]
            self._placements = [Shard(2) if part.is_shard() else Replicate() for part in parts]
        return local

    def together(self, planes: Tensor) -> Tensor:
        """All channels of (statistics, samples, channels)."""
        if self._mesh is None:
            return planes
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*planes.shape[:2], self._channels))
        stride = (shape[1] * shape[2], shape[2], 1)
        # Without `run_check`, in which the processes would talk to each other once more for every layer.
        whole = DTensor.from_local(
            planes.contiguous(), self._mesh, self._placements, run_check=False, shape=shape, stride=stride
        )
        found: Tensor = whole.full_tensor()
        return found
