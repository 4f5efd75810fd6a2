"""Batches of rollouts: how they are cut, and how one becomes tensors.

`collate` pads a batch. `SharedPrompts` makes it one row that holds each prompt once.

All G rollouts of a question begin with the same prompt, and no prompt's token sees a response. So
it need not go through the model G times. The linear layers, which are nearly all of the work, see
the tokens of the prompts and then those of the responses; only attention takes them apart again.
Elsewhere this is called a shared-prefix forward pass (Prefix Grouper, arXiv 2506.05433).

Shapes: B rollouts; Q different prompts of at most P tokens; N tokens in all; H query heads, K
key/value heads, E head width. T tokens of the longest row: prompt and response in `collate`, the
response in `micro_batches`, the response without its last token in `SharedPrompts`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from model import LM

R = TypeVar("R", bound="Tokens")


class Tokens(Protocol):
    """What a pass reads of a rollout."""

    prompt: list[int]
    response: list[int]


class Row(Tokens, Protocol):
    """What a row of tensors holds of a rollout."""

    guided_from: int | None
    old_logprobs: list[float] | None
    advantage: float


def micro_batches(rollouts: Sequence[R], size: int) -> list[list[R]]:
    """Sort, and cut into batches of at most `size` tokens; each different prompt counts once.

    Padding is counted, too. A batch has one rollout at least. Of all cuts of the sorted rollouts
    this is the cheapest, where a batch costs its tokens, and size / 16 for being one more pass.
    """
    longest: dict[tuple[int, ...], int] = defaultdict(int)  # response of each prompt
    for r in rollouts:
        longest[tuple(r.prompt)] = max(longest[tuple(r.prompt)], len(r.response))
    # A prompt's rollouts stay together: the short texts first, and of a prompt the short responses.
    in_order = sorted(longest, key=lambda prompt: (len(prompt) + longest[prompt], prompt))
    number = {prompt: i for i, prompt in enumerate(in_order)}
    numbered = [(number[tuple(r.prompt)], r) for r in rollouts]
    numbered.sort(key=lambda pair: (pair[0], len(pair[1].response)))
    # Of the first 0, 1, ... n rollouts: the least cost, and the batches that have it.
    best: list[tuple[float, list[list[R]]]] = [(0.0, [])]
    for n in range(1, len(numbered) + 1):
        choices: list[tuple[float, int]] = []
        prompts, P, T = set(), 0, 0
        for i in reversed(range(n)):  # where the last batch may begin
            prompt, r = numbered[i]
            prompts.add(prompt)
            P, T = max(P, len(r.prompt)), max(T, len(r.response))
            tokens = len(prompts) * P + (n - i) * T
            if choices and tokens > size:
                break
            choices.append((best[i][0] + tokens + size / 16, i))
        cost, start = min(choices)
        best.append((cost, [*best[start][1], [r for _, r in numbered[start:n]]]))
    return best[-1][1]


def collate(
    rollouts: Sequence[Row], guided_tokens: str = "guidance", device: str | torch.device = "cpu"
) -> list[Tensor]:
    """Pad to tokens (B, T), mask, guided and old_logprobs (B, T-1), advantages (B, 1)."""
    width = max(len(r.prompt) + len(r.response) for r in rollouts)
    tokens = torch.zeros(len(rollouts), width, dtype=torch.int64)
    mask = torch.zeros_like(tokens[:, 1:], dtype=torch.bool)
    guided, old_logprobs = torch.zeros_like(mask), torch.zeros(mask.shape)
    for i, r in enumerate(rollouts):
        start = len(r.prompt) - 1  # position t predicts token t+1
        end = start + len(r.response)
        tokens[i, : end + 1] = torch.tensor(r.prompt + r.response)
        mask[i, start:end] = True
        if r.guided_from is not None:
            first = r.guided_from if guided_tokens == "guidance" else 0
            guided[i, start + first : end] = True
        if r.old_logprobs is not None:
            old_logprobs[i, start:end] = torch.tensor(r.old_logprobs)
    advantages = torch.tensor([[r.advantage] for r in rollouts])
    return [x.to(device) for x in (tokens, mask, guided, old_logprobs, advantages)]


def checked(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *others: Tensor | None,
) -> list[Tensor]:
    """The first four, (B, T-1) each, in float32 at least and 0 outside the mask.

    Raises ValueError if they and `others`, (B, T-1) if given, do not fit together.
    """
    tensors = [logprobs, old_logprobs, advantages]
    given = [x for x in (logprobs, old_logprobs, mask, *others) if x is not None]
    B, n = mask.shape  # n = T-1
    if any(x.shape != (B, n) for x in given) or advantages.shape not in ((B, 1), (B, n)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (*given, advantages))
        raise ValueError(f"log-probabilities, masks and advantages do not fit together: {shapes}")
    mask = mask.bool()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)  # bfloat16 is too coarse to sum in
    # Padding may hold anything, also NaN, which would spread.
    inside = [x.to(dtype).expand(B, n).masked_fill(~mask, 0.0) for x in tensors]
    return [*inside, mask]


def mean_metrics(sums: list[tuple[str, float, int]]) -> dict[str, float]:
    """Means by metric, from (metric, sum, number of tokens) of each pass; none over no tokens."""
    totals: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for name, value, tokens in sums:
        totals[name] += value
        counts[name] += tokens
    return {name: value / counts[name] for name, value in totals.items() if counts[name]}


class SharedPrompts:
    """A batch as one row of N tokens: the different prompts, then the responses.

    It takes the place of a KV cache in `LM.hidden`, and says which tokens see each other.
    """

    def __init__(self, rollouts: Sequence[Tokens], model: LM) -> None:
        numbers: dict[tuple[int, ...], int] = {}
        of = torch.tensor([numbers.setdefault(tuple(r.prompt), len(numbers)) for r in rollouts])
        read = [r.response[:-1] for r in rollouts]  # a last token is predicted, but predicts none
        tokens = [token for part in (*numbers, *read) for token in part]
        # Where the tokens stand in a matrix of the prompts, (Q, P), and in one of the responses,
        # (B, T); and for each place of these the token in the row. Padding has any token.
        inside, own = within([len(p) for p in numbers]), within([len(r) for r in read])
        lengths, (P, T) = inside.sum(1), (inside.shape[1], own.shape[1])
        prompt_at = inside.flatten().cumsum(0).view_as(inside) - 1
        own_at = own.flatten().cumsum(0).view_as(own) - 1 + lengths.sum()
        positions = torch.arange(P).expand_as(inside), lengths[of, None] + torch.arange(T)
        # A response is predicted by the states of its prompt's last token and of its own.
        last = prompt_at[of, lengths[of] - 1, None]  # (B, 1)
        some = torch.tensor([[len(r.response) > 0] for r in rollouts])
        predicting = torch.cat((last, own_at), 1)[torch.cat((some, own), 1)]
        # A response's token sees its prompt, and its own tokens up to itself.
        up_to_itself = torch.ones(T, T, dtype=torch.bool).tril().expand(len(of), T, T)
        sees = torch.cat((inside[of, None].expand(-1, T, P), up_to_itself), 2)  # (B, T, P + T)
        mask = torch.zeros(sees.shape, dtype=model.embed.weight.dtype).masked_fill_(
            ~sees, -torch.inf
        )
        there = model.device
        self.tokens = torch.tensor([tokens], device=there)  # (1, N)
        self.positions = torch.cat((positions[0][inside], positions[1][own]))[None].to(there)
        self.predicting = predicting.to(there)  # for each token of the responses
        self.of, self.prompt_at, self.own_at = of.to(there), prompt_at.to(there), own_at.to(there)
        self.places = torch.cat((inside.flatten(), own.flatten())).nonzero().squeeze(1).to(there)
        self.mask = mask[:, None].to(there)  # (B, 1, T, P + T)

    def extend(self, B: int, T: int) -> SharedPrompts:
        return self

    def attend(self, span: Any, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (1, H, N, E), k, v (1, K, N, E) -> (1, H, N, E). Gradients go back through all."""
        _, H, _, E = q.shape
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (N, H or K, E)
        pq, pk, pv = (x[self.prompt_at].transpose(1, 2) for x in (q, k, v))  # (Q, H or K, P, E)
        of_prompts = F.scaled_dot_product_attention(pq, pk, pv, is_causal=True, enable_gqa=True)
        q, k, v = (x[self.own_at].transpose(1, 2) for x in (q, k, v))  # (B, H or K, T, E)
        k, v = torch.cat((pk[self.of], k), 2), torch.cat((pv[self.of], v), 2)  # (B, K, P + T, E)
        # Several processes hold float32 weights, and may compute in bfloat16.
        self.mask = self.mask.to(q.dtype)
        heads = q.unflatten(1, (k.shape[1], -1)).unbind(2)  # in turn, as in KVCache.attend_many
        y = [F.scaled_dot_product_attention(head, k, v, self.mask) for head in heads]
        of_responses = torch.stack(y, 2).flatten(1, 2)  # (B, H, T, E)
        both = [x.transpose(1, 2).reshape(-1, H, E) for x in (of_prompts, of_responses)]
        return torch.cat(both)[self.places].transpose(0, 1)[None]


def within(lengths: list[int]) -> Tensor:
    """Bool (rows, widest, but at least 1): whether a place lies within its row's length."""
    return torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]
