"""Several processes on one run: `torchrun --nproc-per-node N thinktuning.py train ...`.

Each process has its own share of the questions of every mini-batch: it samples, asks the teacher,
rewards and compares by itself, because groups never cross questions. The processes meet in the update
(the tokens of the mean, the gradient), for the metrics, and to agree when to stop.
PyTorch's FSDP2 keeps the weights, their gradients and the optimiser's state in N parts and does the adding up;
for sampling each process has a copy in one piece, since rows end at different times and nobody should wait at every token.
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
    """The processes of a run; by itself a process is a world of one, and everything here does nothing."""

    def __init__(self, rank: int = 0, size: int = 1, dtype: torch.dtype = torch.float32) -> None:
        self.rank, self.size, self.dtype = rank, size, dtype

    @classmethod
    def start(cls, device: str, dtype: torch.dtype, minutes: int = 30) -> World:
        """Join the others that torchrun started; the model computes in `dtype`. Who waits longer than `minutes` gives up."""
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        if device.startswith("cuda"):
            place, devices = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if place >= devices:
                raise ValueError(
                    f"this machine has {devices} GPUs and more processes: "
                    f"lower --nproc-per-node to {devices}"
                )
            torch.cuda.set_device(place)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(minutes=minutes)
            )
        return cls(dist.get_rank(), size, dtype)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's part of a list: neighbours stay together, parts differ by one at most."""
        n = len(items)
        return list(items[n * self.rank // self.size : n * (self.rank + 1) // self.size])

    def gather(self, items: list[T]) -> list[T]:
        """Everybody's lists as one, in the order that `share` took them apart."""
        if self.size == 1:
            return items
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def shard(self, model: LM) -> None:
        """Keep the weights in N parts of float32, each block put together in the dtype to compute in when it is needed."""
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
        """The model in one piece, to run without the others: itself, or this process's copy with the weights of now."""
        if self.size == 1:
            return model
        for ours, spread in zip(self.copy.parameters(), model.parameters(), strict=True):
            ours.copy_(full(spread))
        return self.copy


def full(tensor: Tensor) -> Tensor:
    """A tensor in one piece; every process must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(stored, tensor):
    """`stored`, which is in one piece, spread as `tensor` is."""
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        stored = stored.to(tensor.device, tensor.dtype)
        return distribute_tensor(
            stored, tensor.device_mesh, tensor.placements, src_data_rank=None
        )  # everybody has read it
    return stored
