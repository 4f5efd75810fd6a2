"""The sampler: prompts in, sampled responses out.

A prompt is computed once for all its samples, and what all prompts begin with once for all of them.
Rows whose response has ended leave the batch, and responses that wait in a queue take their places.
On a GPU the steps are taken in blocks, and model.compile_step may compile them (run/compiled.py).

Shapes: N responses, B rows of the batch, Q prompts, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import LM, KVCache

SHARE_FROM = 32  # fewer shared tokens are computed sooner with each prompt than in their own pass
BLOCK = {"cuda": 16}  # steps between two checks of which rows have ended: a check waits for the GPU
PREFILL = 1 << 14  # tokens of prompts, with padding, computed in one pass: bounds its memory
WINDOW = 512  # in a block, steps read a multiple of this many positions: few shapes to compile

Prompts = list[list[int]]
OnStep = Callable[[Tensor, Tensor], None]


@torch.no_grad()
def generate(
    model: LM,
    prompts: Prompts,
    *,
    max_tokens: int,
    stop: Iterable[int],
    samples: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    logprobs: bool = False,
    rows: int | None = None,
    prefix: KVCache | None = None,
    on_step: OnStep | None = None,
) -> Any:
    """Sample `samples` responses to each prompt: lists of ids, question-major.

    A finished response ends with its stop token; one without was cut at max_tokens. temperature 0
    is greedy. With logprobs=True also returns the log-probabilities of the sampled tokens at this
    temperature, before top_p; greedy ones get those of temperature 1. At most `rows` responses
    (default: all) are sampled side by side. `prefix` is a one-row cache of tokens that stand before
    every prompt. `on_step(responses, tokens)` sees every step. Raises ValueError on an empty prompt
    or one that does not fit the context with max_tokens.
    """
    if not prompts:
        return ([], []) if logprobs else []
    if temperature < 0 or not 0 < top_p <= 1:
        given = f"not {temperature} and {top_p}"
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], {given}")
    check_fit(model, prompts, max_tokens, prefix)
    N = len(prompts) * samples
    device = generator.device if generator else None
    uniform = 1 - torch.rand(N, max_tokens, generator=generator, device=device)  # in (0, 1]
    if prefix is None and (shared := shared_prefix(prompts)) >= SHARE_FROM:
        prefix, _ = prefill(model, [prompts[0][:shared]])
        prompts = [prompt[shared:] for prompt in prompts]
    block = 0 if on_step else BLOCK.get(model.device.type, 0)
    room = max(len(prompt) for prompt in prompts) + max_tokens + block
    cache = KVCache(model, min(rows or N, N), room, prefix)
    batch = Batch(model, cache, uniform, stop, temperature, top_p, on_step)
    batch.run(Queue(model, prompts, samples, prefix), block)
    responses, logs = batch.results()
    return (responses, logs) if logprobs else responses


def check_fit(model: LM, prompts: Prompts, max_tokens: int, prefix: KVCache | None) -> None:
    context = model.config.max_seq_len
    room = context - max_tokens - (prefix.longest if prefix else 0)
    if not all(0 < len(prompt) <= room for prompt in prompts):
        given = f"the context is {context}, of which {max_tokens} are for the response"
        raise ValueError(f"prompts must have 1 to {room} tokens: {given}")


@dataclass(eq=False)
class Batch:
    """The rows at work, of which the first `active` have a response: row b writes response[b].

    A step has a fixed shape, so a row that has nothing to write must write somewhere. It writes to
    a spare last line of the output, which belongs to no response.
    """

    model: LM
    cache: KVCache
    # (N, max_tokens). Token t of response i is drawn with the number at (i, t), whenever and in
    # whichever row: so a response depends neither on its neighbours nor on when they end.
    uniform: Tensor
    stop: Iterable[int]
    temperature: float
    top_p: float
    on_step: OnStep | None

    def __post_init__(self) -> None:
        self.spare = len(self.uniform)  # N, the line's number
        self.uniform = F.pad(self.uniform, (0, 0, 0, 1), value=1.0).to(self.model.device)
        # What was sampled for every response, (N + 1, max_tokens): tokens and their log-probs.
        self.tokens_out = torch.zeros_like(self.uniform, dtype=torch.int64)
        self.logprobs_out = torch.zeros_like(self.uniform)
        # The state of every row, (B,). The first `active` rows have a response.
        self.active = 0
        self.response = torch.full_like(self.cache.lengths, self.spare)  # which response it writes
        self.tokens = torch.zeros_like(self.response)  # the newest token of that response
        self.t = torch.zeros_like(self.response)  # the index of that token in the response
        self.done = torch.ones_like(self.response, dtype=torch.bool)  # whether it was the last one
        vocab = self.model.config.vocab_size
        # Whether a token ends a response, (V,).
        self.is_stop = torch.zeros(vocab, dtype=torch.bool, device=self.model.device)
        # A model directory may name ids that the model cannot emit: they came from a larger one.
        self.is_stop[[i for i in self.stop if 0 <= i < vocab]] = True
        self.recordings: dict[Any, Any] = {}  # filled in and read by model.compile_step

    def run(self, queue: Queue, block: int) -> None:
        """Write all responses, looking which have ended after each step or `block` of them."""
        rows = len(self.response)
        while queue.left or self.active:
            # Even a pass over one prompt costs a whole step: wait until an eighth of rows is free.
            if queue.left and (8 * (rows - self.active) >= rows or not self.active):
                self.fill_from(queue)
            elif block:
                self.run_block(block)
            else:
                self.step(self.active)
            self.remove_done()
        self.recordings.clear()  # frees their memory

    def fill_from(self, queue: Queue) -> None:
        """Give every free row a response, while any wait, and draw its first token."""
        rows, first_row, first = len(self.response), self.active, queue.next
        logits: list[Tensor] = []
        while queue.left and self.active < rows:
            logits.append(queue.enter(self.cache, self.active, rows - self.active))
            self.active += len(logits[-1])
        new = slice(first_row, self.active)
        self.response[new] = torch.arange(first, queue.next, device=self.t.device)
        self.t[new], self.done[new] = 0, False
        self.draw(new, torch.cat(logits))

    def step(self, B: int) -> None:
        """One token more in each of the first B rows."""
        logits = self.model(self.tokens[:B, None], self.cache)[:, -1]  # (B, V)
        # Rows that ended within a block keep their t, and write to the spare line.
        self.t[:B] += ~self.done[:B]
        self.draw(slice(0, B), logits)

    def draw(self, here: slice, logits: Tensor) -> None:
        """Sample a token in each of these rows and write it down."""
        response, t = self.response[here], self.t[here]
        tokens, logp = sample(logits, self.uniform[response, t], self.temperature, self.top_p)
        self.tokens_out[response, t], self.logprobs_out[response, t] = tokens, logp
        if self.on_step:
            self.on_step(response, tokens)
        self.tokens[here] = tokens
        self.done[here] |= self.is_stop[tokens] | (t + 1 == self.uniform.shape[1])
        self.response[here] = torch.where(self.done[here], self.spare, response)

    def run_block(self, count: int) -> None:
        """`count` steps of one shape: of all rows, or half of them, a quarter, ... if they suffice.

        Within a block nothing changes but what is in the tensors. So where steps are compiled, the
        first one looks up or makes a recording, and the others replay it.
        """
        B = len(self.response)
        while B // 2 >= max(self.active, 8):  # not below 8, so that shapes stay few
            B //= 2
        self.cache.lengths[self.active :] = 0  # rows in no use write from 0 on, never past the end
        with self.cache.reserve(count, WINDOW):
            if self.model.compile_step:
                again = self.model.compile_step(Batch.step, (self, B), self.recordings)
            else:
                self.step(B)
                again = partial(self.step, B)
            for _ in range(count - 1):
                again()

    def remove_done(self) -> None:
        """Free the rows whose response has ended; the others move together."""
        done = self.done[: self.active]
        if not done.any():
            return
        kept = self.cache.drop(done)
        self.active = len(kept)
        for state in (self.response, self.t, self.tokens):
            state[: self.active] = state[kept]
        self.done[: self.active], self.done[self.active :] = False, True
        self.response[self.active :] = self.spare

    def results(self) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens and log-probs of every response, up to and with its first stop token."""
        tokens, logprobs = self.tokens_out[: self.spare], self.logprobs_out[: self.spare]
        ended = self.is_stop[tokens]  # (N, max_tokens)
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, ended.shape[1]).tolist()
        responses = [row[:n] for row, n in zip(tokens.tolist(), lengths)]
        return responses, [row[:n] for row, n in zip(logprobs.tolist(), lengths)]


@dataclass
class Queue:
    """The responses that have no row yet, in order.

    A prompt is computed once, in a pass with others that enter with it. A pass is kept until the
    last sample of its last prompt has entered.
    """

    model: LM
    prompts: Prompts
    samples: int
    prefix: KVCache | None
    next: int = 0  # the first response that waits
    computed: tuple[range, KVCache, Tensor] | None = None  # a pass: prompts, cache, logits after

    @property
    def left(self) -> int:
        return len(self.prompts) * self.samples - self.next

    def enter(self, cache: KVCache, row: int, most: int) -> Tensor:
        """Return the logits (n, V) after the prompts of the next n responses, which now have rows.

        Their prompts stand in the cache's rows from `row` on. n is at most `most`, and no more than
        one pass holds.
        """
        end = self.next + min(most, self.left)
        if self.computed is None:
            self.compute(self.next // self.samples, -(-end // self.samples))  # rounded up
        assert self.computed
        prompts, theirs, logits = self.computed
        end = min(end, prompts.stop * self.samples)
        rows = [i // self.samples - prompts.start for i in range(self.next, end)]
        cache.fill(row, theirs, rows)
        self.next = end
        if end == prompts.stop * self.samples:
            self.computed = None
        return logits[rows]

    def compute(self, first: int, stop: int) -> None:
        """One pass over the prompts from `first` on, before `stop`: as many as it may hold."""
        end, longest = first, 0
        while end < stop:
            longest = max(longest, len(self.prompts[end]))
            if end > first and (end + 1 - first) * longest > PREFILL:
                break
            end += 1
        cache, logits = prefill(self.model, self.prompts[first:end], self.prefix)
        self.computed = range(first, end), cache, logits


@torch.no_grad()
def prefill(model: LM, prompts: Prompts, prefix: KVCache | None = None) -> tuple[KVCache, Tensor]:
    """Run prompts through the model once: (their cache, logits after each prompt (Q, V))."""
    lengths = [len(prompt) for prompt in prompts]
    cache = KVCache(model, len(prompts), max(lengths), prefix)
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)  # (Q, T), on the right
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    states = model.hidden(padded.to(model.device), cache)  # (Q, T, D)
    cache.set_lengths(lengths)
    last = torch.tensor(lengths, device=model.device) - 1
    return cache, model.head(states[torch.arange(len(prompts), device=model.device), last])


def shared_prefix(prompts: Prompts) -> int:
    """How many tokens all prompts begin with, leaving each at least one; 0 for a single prompt."""
    if len(prompts) == 1:
        return 0
    # What the first and the last in sorted order begin with, all between them begin with too.
    alike = common_prefix(min(prompts), max(prompts))
    return min(alike, min(len(prompt) for prompt in prompts) - 1)


def common_prefix(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw a token a row by inverting the cumulative distribution: (B, V), (B,) -> ids, log-probs.

    `uniform` lies in (0, 1]. The log-probs (B,) are log softmax(z / temperature), before top_p. At
    temperature 0, where the likeliest token is taken, they are those of temperature 1, because
    log 1 = 0 for every token would tell nothing.
    """
    logits = logits.float().contiguous()
    if temperature not in (0, 1):
        # The largest becomes 0 first, so that nothing overflows to +inf at a tiny temperature.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()  # (B, V) the softmax, but for its denominator
    log_z = top + weights.sum(-1, keepdim=True).log()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        if top_p < 1:
            weights = keep_top_p(weights, top_p)
        cdf = weights.cumsum(-1)  # (B, V)
        # uniform > 0 and "first entry >= target" can only land on a token of positive probability.
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])  # (B, 1)
        tokens = tokens.clamp(max=weights.shape[-1] - 1)  # NaN logits would point past the end
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - log_z).squeeze(-1)


def keep_top_p(weights: Tensor, top_p: float) -> Tensor:
    """Set all weights (B, V) to 0 but the fewest largest whose sum reaches top_p of the whole."""
    ranked, order = weights.sort(-1, descending=True)
    before = ranked.cumsum(-1) - ranked
    beyond = before >= top_p * weights.sum(-1, keepdim=True)  # the one that crosses top_p stays
    return weights.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
