"""The output head, a slice at a time: log-probabilities whose (N, V) logits never exist whole.

With Llama 3's vocabulary the float32 logits of 16,384 tokens take 8.4 GB, and a backward pass would
hold them several times.

Shapes: N positions, D model width, V vocabulary, R rows of the head in a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from model import LM
from run.world import World


class HeadLogprobs(torch.autograd.Function):
    """states (N, D), head (V, D), targets (N,) -> log p(target) and entropy, (N,) each.

    Goes through the head `size` rows at a time, so that the (N, V) logits never exist, and again
    in the backward pass. Slices of positions would read and write all of the weight each time.
    `head_grad`, if given, is what the optimizer reads as the head's gradient, and it is added to in
    place: without it, a tied embedding would need a second tensor of that size until the end of the
    backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        targets: Tensor,
        size: int,
        head_grad: Tensor | None,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.options = size, head_grad, temperature
        # Of the slices so far: log Σ e^z; the mean of log p, which is minus the entropy; z_target.
        log_z = torch.full(targets.shape, -1e30, device=states.device)
        mean, chosen = torch.zeros_like(log_z), torch.zeros_like(log_z)
        for _, logits, at, inside in logit_slices(states, weight, targets, size, temperature):
            chosen = torch.where(inside, logits.gather(-1, at).squeeze(-1), chosen)
            before, log_z = log_z, torch.logaddexp(log_z, logits.logsumexp(-1))
            # Every earlier log p falls by log_z − before, so its p is multiplied by e^shrunk.
            shrunk, log_p = before - log_z, logits.sub_(log_z[:, None])
            mean = shrunk.exp() * (mean + shrunk) + (log_p.exp() * log_p).sum(-1)
        entropy = -mean
        ctx.save_for_backward(states, weight, targets, log_z)
        ctx.mark_non_differentiable(entropy)
        return chosen - log_z, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        states, weight, targets, log_z = ctx.saved_tensors
        size, head_grad, temperature = ctx.options
        states_grad = torch.zeros_like(states, dtype=torch.float32)
        weight_grad = torch.zeros_like(weight) if head_grad is None else head_grad
        grad = grad / temperature
        for part, logits, at, inside in logit_slices(states, weight, targets, size, temperature):
            p = logits.sub_(log_z[:, None]).exp_()
            # d log p(target) / dz = (one-hot − p) / temperature
            z_grad = p.mul_(-grad[:, None]).scatter_add_(-1, at, (grad * inside)[:, None])
            z_grad = z_grad.to(weight.dtype)
            states_grad += z_grad @ weight[part]
            if weight_grad.dtype == states.dtype:
                weight_grad[part].addmm_(z_grad.T, states)
            else:  # a float32 master's
                weight_grad[part] += z_grad.T @ states
        own = weight_grad if head_grad is None else None
        return states_grad.to(states.dtype), own, None, None, None, None


def logit_slices(
    states: Tensor, weight: Tensor, targets: Tensor, size: int, temperature: float
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield for each slice of R rows of the head: which rows, z / temperature (N, R) float32,
    the places of the targets in it (N, 1), and whether they are in it at all (N,)."""
    for start in range(0, len(weight), size):
        part = slice(start, min(start + size, len(weight)))
        logits = (states @ weight[part].T).float()
        if temperature != 1:
            logits = logits.div_(temperature)
        at = targets - start
        inside = (at >= 0) & (at < logits.shape[1])
        yield part, logits, at.clamp(0, logits.shape[1] - 1)[:, None], inside


def slice_size(positions: int, device: torch.device | str) -> int:
    """Rows of the head in a slice: 16 MB of logits on a CPU, as fit its caches; 256 MB on a GPU.

    A power of two, so that there are few sizes to compile for.
    """
    logits: int = 1 << (22 if torch.device(device).type == "cpu" else 26)
    return max(512, 1 << (logits // max(1, positions)).bit_length() - 1)


@contextmanager
def gradient_buffer(
    model: LM, optimizer: torch.optim.Optimizer, world: World
) -> Iterator[Tensor | None]:
    """Within it, the tensor to which the gradient of the head's weight is added in place.

    It begins as zeros. `optimizer` reads it as the gradient: it is the .grad of the weight, or of
    the weight's master copy. With several processes, each of which has a part, there is none.
    """
    if world.size > 1:
        yield None
        return
    weight = model.head.weight
    owner: Tensor = dict(getattr(optimizer, "copies", ())).get(weight, weight)
    owner.grad = torch.zeros_like(owner)
    # A tied embedding has the same buffer: a sparse gradient is added to it row by row.
    model.embed.sparse = model.embed.weight.grad is not None
    try:
        yield owner.grad
    finally:
        model.embed.sparse = False
