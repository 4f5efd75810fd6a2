"""The optimizer of half-precision weights."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 master copies of half-precision weights; on float32 weights it is AdamW.

    A step of 1e-6 is lost in bfloat16's 8 bits. Each gradient is added to its master's as soon
    as the backward pass has it, so that micro-batches add up in float32 as well.
    """

    def __init__(self, parameters: Iterable[Tensor], **options: Any) -> None:
        self.copies: list[tuple[Tensor, Tensor]] = []  # (half-precision weight, its master)
        super().__init__([self.master_of(p) for p in parameters], **options)

    def master_of(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return weight
        master = weight.detach().float().requires_grad_(True)
        self.copies.append((weight, master))

        def collect(_: Tensor) -> None:
            if weight.grad is not None:  # None: it went into a gradient_buffer
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad += weight.grad
                weight.grad = None

        hook = weight.register_post_accumulate_grad_hook(collect)
        weakref.finalize(self, hook.remove)  # it goes when this optimizer goes
        return master

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for weight, master in self.copies:
            weight.copy_(master)  # the weights are the masters, rounded
