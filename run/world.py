"""Several processes on one run: `torchrun --nproc-per-node N thinktuning.py train ...`.

Every process has its own share of a step's questions: it samples, asks the teacher, rewards and
normalises for these alone, and computes their part of the gradient. PyTorch's FSDP2 keeps the
weights, gradients and the optimizer's state in N parts and adds up the gradients. For sampling each
process has a whole copy of the weights, because its rows end at their own times and it must not
wait for the others at every token.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from model import LM

T = TypeVar("T")


class World:
    """The processes of a run. With a single process every method returns what it was given."""

    def __init__(self, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype

    @classmethod
    def start(cls, device: str, dtype: torch.dtype, minutes: int = 30) -> World:
        """Join the other processes that torchrun started. The model computes in `dtype`.

        A process that waits longer than `minutes` for the others ends with an error.
        """
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if device.startswith("cuda"):
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            devices = torch.cuda.device_count()
            if local_rank >= devices:
                raise ValueError(
                    f"this machine has {devices} GPUs and more processes: "
                    f"lower --nproc-per-node to {devices}"
                )
            torch.cuda.set_device(local_rank)
        if not dist.is_initialized():
            backend = "nccl" if device.startswith("cuda") else "gloo"
            dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        return cls(dist.get_rank(), size, dtype)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: consecutive items; the parts differ by one at most."""
        start = len(items) * self.rank // self.size
        end = len(items) * (self.rank + 1) // self.size
        return list(items[start:end])

    def gather(self, items: list[T]) -> list[T]:
        """The lists of all processes as one, in the order of the processes."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def shard(self, model: LM) -> None:
        """Divide the model's float32 weights among the processes, in place.

        When a block is needed, its weights are put together in the dtype to compute in.
        """
        if self.size == 1:
            return
        from torch.distributed.fsdp import (
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        self.copy = copy.deepcopy(model).to(self.dtype).requires_grad_(False)
        mesh = dist.init_device_mesh(model.device.type, (self.size,))
        policy = MixedPrecisionPolicy(
            param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(model, "hidden")

    @torch.no_grad()
    def whole(self, model: LM) -> LM:
        """The model in one piece, which a process can run without the others.

        With several processes this is a copy, into which the current weights are written.
        """
        if self.size == 1:
            return model
        for ours, divided in zip(self.copy.parameters(), model.parameters(), strict=True):
            ours.copy_(full(divided))
        return self.copy


def full(tensor: Tensor) -> Tensor:
    """A tensor in one piece. Every process must call this, because each holds a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(stored, tensor):
    """`stored`, which is in one piece, divided among the processes as `tensor` is."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        stored = stored.to(tensor.device, tensor.dtype)
        # Every process has read the whole tensor, so none has to send it to the others.
        return distribute_tensor(stored, tensor.device_mesh, tensor.placements, src_data_rank=None)
    return stored
