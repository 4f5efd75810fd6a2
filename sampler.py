"""The sampler and its KV cache: prompts in, sampled responses out.

A prompt is computed once for all its samples, and what all prompts begin with once for all of them. Rows whose response
has ended leave the batch, and waiting responses take their places. A step changes nothing but tensors that are there
already, so that on a GPU it can be compiled: recorded once as a CUDA graph and then replayed (Recorder).

Shapes: B rows, T tokens, H query heads, K key/value heads, G = H / K, E head width, S positions of a row, P of a shared prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model import KVCache

if TYPE_CHECKING:
    from model import LM

SHARE_FROM = 32  # tokens that all prompts begin with; fewer are computed sooner with each prompt than in a pass of their own
# Looking which rows are done makes the host wait for a GPU, so there it is done once in so many steps.
BLOCK = {"cuda": 16}
PREFILL = 1 << 14  # tokens of prompts, padding counted, that are computed at once: a bound to the memory of a pass
WINDOW = 512  # steps of a block read a multiple of so many positions, for few shapes to record
RECORDS = ("cuda",)  # devices whose steps are compiled


@torch.no_grad()
def generate(model: LM, prompts: list[list[int]], *, max_tokens: int, stop: Iterable[int], samples: int = 1,
             temperature: float = 1.0, top_p: float = 1.0, generator: torch.Generator | None = None,
             prefix: KVCache | None = None, rows: int | None = None, logprobs: bool = False,
             on_step: Callable[[Tensor, Tensor], None] | None = None) -> Any:
    """Sample `samples` responses to each prompt: len(prompts) * samples lists of ids, question-major.

    A finished response ends with its stop token; one without was cut at max_tokens. temperature 0 is greedy.
    At most `rows` responses (default: all) are sampled side by side; where one ends, a waiting one takes its place.
    `prefix` is a one-row cache of tokens that stand before every prompt. With logprobs=True also returns the
    log-probabilities of the sampled tokens at this temperature, before top_p; greedy ones get those of temperature 1.
    `on_step(responses, tokens)` sees every step. Raises ValueError on an empty prompt or one that does not fit the
    context with max_tokens.
    """
    if not prompts:
        return ([], []) if logprobs else []
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")
    room = model.config.max_seq_len - max_tokens - (prefix.longest if prefix else 0)
    if not all(0 < len(p) <= room for p in prompts):
        raise ValueError(f"prompts must have 1 to {room} tokens: the context is {model.config.max_seq_len}, "
                         f"of which {max_tokens} are for the response")
    n, device = len(prompts) * samples, model.device
    # Token t of response i is drawn with the number at (i, t), in whichever row and whenever that happens: so a response
    # depends neither on its neighbours nor on when they end. Line n is for rows that write no response.
    uniform = 1 - torch.rand(n, max_tokens, generator=generator, device=generator.device if generator else None)  # (0, 1]
    uniform = F.pad(uniform, (0, 0, 0, 1), value=1.0).to(device)
    if prefix is None and (shared := shared_prefix(prompts)) >= SHARE_FROM:
        prefix, _ = prefill(model, [prompts[0][:shared]])
        prompts = [p[shared:] for p in prompts]
    block = 0 if on_step else BLOCK.get(device.type, 0)
    cache = KVCache(model, min(rows or n, n), max(map(len, prompts)) + max_tokens + block, prefix)
    is_stop = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
    is_stop[[i for i in stop if 0 <= i < len(is_stop)]] = True  # others come from a file for a larger model
    writing = Writing(model, cache, uniform, is_stop, temperature, top_p, on_step)
    writing.run(Waiting(model, prompts, samples, prefix), block)
    RECORDER.forget()

    ended = is_stop[writing.tokens_out]
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, max_tokens).tolist()[:n]
    responses = [row[:length] for row, length in zip(writing.tokens_out.tolist(), lengths)]
    if logprobs:
        return responses, [row[:length] for row, length in zip(writing.logprobs_out.tolist(), lengths)]
    return responses


class Writing:
    """Rows at work: row b writes response response[b], whose newest token tokens[b] stands at t[b]; done[b] once it has ended."""

    def __init__(self, model: LM, cache: KVCache, uniform: Tensor, is_stop: Tensor, temperature: float, top_p: float,
                 on_step: Callable[[Tensor, Tensor], None] | None) -> None:
        self.model, self.cache, self.uniform, self.is_stop = model, cache, uniform, is_stop
        self.temperature, self.top_p, self.on_step = temperature, top_p, on_step
        self.none = len(uniform) - 1
        self.tokens_out = torch.zeros(uniform.shape, dtype=torch.int64, device=uniform.device)
        self.logprobs_out = torch.zeros_like(uniform)
        rows = len(cache.lengths)
        self.response = torch.full((rows,), self.none, device=uniform.device)
        self.t, self.tokens = torch.zeros_like(self.response), torch.zeros_like(self.response)
        self.done = torch.ones_like(self.response, dtype=torch.bool)

    def run(self, waiting: Waiting, block: int = 0) -> None:
        """Write until no response is left, looking which are done after every step or `block` of them."""
        rows, active = len(self.response), 0
        while waiting.count or active:
            free = rows - active
            if waiting.count and (8 * free >= rows or not active):  # a pass over a single prompt costs a whole step
                new, logits = waiting.enter(self.cache, active, free)
                here = slice(active, active + len(new))
                self.response[here], self.t[here], self.done[here] = new, 0, False
                self.draw(here, logits)
                active += len(new)
            elif block:
                self.steps(active, block)
            else:
                self.step(active)
            if (done := self.done[:active]).any():
                order = self.cache.drop(done)
                active = len(order)
                for state in (self.response, self.t, self.tokens):
                    state[:active] = state[order]
                self.done[:active], self.done[active:], self.response[active:] = False, True, self.none

    def step(self, B: int) -> None:
        """One token more in each of the first B rows."""
        logits = self.model(self.tokens[:B, None], self.cache)[:, -1]
        self.t[:B] += ~self.done[:B]
        self.draw(slice(0, B), logits)

    def draw(self, here: slice, logits: Tensor) -> None:
        response, t = self.response[here], self.t[here]
        tokens, logp = sample(logits, self.uniform[response, t], self.temperature, self.top_p)
        self.tokens_out[response, t], self.logprobs_out[response, t] = tokens, logp
        if self.on_step:
            self.on_step(response, tokens)
        self.tokens[here] = tokens
        self.done[here] |= self.is_stop[tokens] | (t + 1 == self.uniform.shape[1])
        self.response[here] = torch.where(self.done[here], self.none, response)  # until it leaves it writes nothing more

    def steps(self, active: int, count: int) -> None:
        """`count` steps in one of few shapes, the rows halved until they just hold the active ones.

        Where the device records, the first step looks up or makes its recording, and the others replay it:
        within a block nothing changes but what is in the tensors.
        """
        B = len(self.response)
        while B // 2 >= max(active, 8):
            B //= 2
        self.cache.lengths[active:] = 0
        self.cache.longest += count
        self.cache.window = min(-(-self.cache.longest // WINDOW) * WINDOW, self.cache.k.shape[3])
        again: Callable[[], Any] = partial(self.step, B)
        if self.model.compiled and self.model.device.type in RECORDS:
            compiled_step(self, B)
            again = RECORDER.again
        else:
            self.step(B)
        for _ in range(count - 1):
            again()
        self.cache.window = None


class Waiting:
    """The responses that have no row yet, in order.

    A prompt is computed once, in a pass with others that enter with it. A pass is kept until the last sample of its last
    prompt has entered.
    """

    def __init__(self, model: LM, prompts: list[list[int]], samples: int, prefix: KVCache | None) -> None:
        self.model, self.prompts, self.samples, self.prefix = model, prompts, samples, prefix
        self.count = len(prompts) * samples
        self.part = range(0)  # the prompts that are computed and have not all entered yet
        self.computed: Any = None  # their cache, and the logits after each

    def enter(self, cache: KVCache, first: int, most: int) -> tuple[Tensor, Tensor]:
        """Put up to `most` responses into the rows from `first` on: their numbers (B,) and the logits after their prompts."""
        start = len(self.prompts) * self.samples - self.count
        new = range(start, start + min(most, self.count))
        logits: list[Tensor] = []
        i = start
        while i < new.stop:
            if not self.part:
                self.compute(i // self.samples, -(-new.stop // self.samples))
            end = min(new.stop, self.part.stop * self.samples)
            rows = [j // self.samples - self.part.start for j in range(i, end)]
            cache.fill(first + i - start, self.computed[0], rows)
            logits.append(self.computed[1][rows])
            i = end
            if end == self.part.stop * self.samples:
                self.part, self.computed = range(0), None
        self.count -= len(new)
        return torch.tensor(new, device=cache.k.device), torch.cat(logits)

    def compute(self, first: int, stop: int) -> None:
        """The prompts from `first` on, before `stop`: as many as a pass may hold."""
        end, longest = first, 0
        while end < stop:
            longest = max(longest, len(self.prompts[end]))
            if end > first and (end + 1 - first) * longest > PREFILL:
                break
            end += 1
        self.part = range(first, end)
        self.computed = prefill(self.model, self.prompts[first:end], self.prefix)


@torch.no_grad()
def prefill(model: LM, prompts: list[list[int]], prefix: KVCache | None = None) -> tuple[KVCache, Tensor]:
    """Run right-padded prompts through the model once: (their cache, logits after each prompt (Q, vocab))."""
    lengths = [len(p) for p in prompts]
    cache = KVCache(model, len(prompts), max(lengths), prefix)
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    states = model.hidden(padded.to(model.device), cache)
    cache.set_lengths(lengths)
    last = torch.tensor(lengths, device=model.device) - 1
    return cache, model.head(states[torch.arange(len(prompts), device=model.device), last])


def shared_prefix(prompts: list[list[int]]) -> int:
    """How many tokens all prompts begin with, leaving each at least one of its own; 0 for a single prompt."""
    alike = common_prefix(min(prompts), max(prompts))  # whatever these two share, all that sort between them share
    return min(alike, *(len(p) - 1 for p in prompts)) if len(prompts) > 1 else 0


def common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution: (B, V), (B,) in (0, 1] -> ids, log-probs (B,).

    The log-probs are log softmax(z / temperature), before top_p. At temperature 0, where the likeliest token is taken,
    they are those of temperature 1, because log 1 = 0 for every token would tell nothing.
    """
    logits = logits.float().contiguous()
    if temperature not in (0, 1):
        # The largest becomes 0 first, so that however small the temperature is, nothing overflows to +inf.
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
    top = logits.amax(-1, keepdim=True)
    weights = (logits - top).exp_()  # the softmax, but for its denominator
    log_z = top + weights.sum(-1, keepdim=True).log()
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        if top_p < 1:
            ranked, order = weights.sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p * weights.sum(-1, keepdim=True)  # the token that crosses top_p stays
            weights = weights.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        cdf = weights.cumsum(-1)
        # uniform > 0 and "first entry >= target" can only land on a token of positive probability.
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:])
        tokens = tokens.clamp(max=weights.shape[-1] - 1)  # NaN logits would point past the end
    return tokens.squeeze(-1), (logits.gather(-1, tokens) - log_z).squeeze(-1)


def compiled_step(writing: Writing, B: int) -> None:
    """writing.step(B) through torch.compile, which traces it once for all sizes, and RECORDER, which records it."""
    from torch._dynamo.exc import (
        FailOnRecompileLimitHit,  # not above: it takes longer to load than torch itself
    )
    from torch.fx.experimental import _config

    step = torch.compile(Writing.step, backend=RECORDER, fullgraph=True, dynamic=True)
    sizes: Any = _config
    with sizes.patch(use_duck_shape=False):  # two sizes that are equal once need not be so the next time
        try:
            step(writing, B)
        except FailOnRecompileLimitHit:  # many more models and ways to sample than a training run has: begin anew
            torch.compiler.reset()
            step(writing, B)


class Recorder:
    """A backend of torch.compile: it is given the step as a graph of PyTorch's own operations and records what they launch.

    It generates no code, so Triton has nothing to do. The first call runs the operations and then records them over the
    very tensors it was given, weights and caches too, without copying any. A call with the same addresses replays the
    recording, one with others makes a new one. All share one pool of memory, because only one runs at a time.
    """

    def __init__(self) -> None:
        self.traces = self.count = 0  # steps traced and recordings made since the program began
        self.forget()

    def forget(self) -> None:
        """Let the recordings go, and with them their memory."""
        self.recordings: dict[tuple[Any, ...], Callable[[], Any]] = {}
        self.pool: Any = None

    def __call__(self, traced: Callable[..., Any], _: Any) -> Callable[..., Any]:
        self.traces += 1
        return partial(self.run, traced)

    def run(self, traced: Callable[..., Any], *inputs: Any) -> Any:
        key = (traced, *map(identity, inputs))
        if key in self.recordings:
            self.again = self.recordings[key]  # for the steps that follow in the same block
            return self.again()
        outputs = traced(*inputs)  # the libraries set themselves up here, which cannot be recorded
        self.again, self.pool = record(partial(traced, *inputs), self.pool)
        self.recordings[key] = self.again
        self.count += 1
        return outputs


RECORDER = Recorder()


def identity(value: Any) -> Any:
    """What a recording depends on: a number's value, a tensor's address."""
    if not isinstance(value, Tensor):
        return value
    return value.data_ptr() if value.dim() else value.item()  # torch.compile passes a float as a tensor of no dimension


def record(step: Callable[[], Any], pool: Any) -> tuple[Callable[[], Any], Any]:
    """Record what `step` launches on the GPU, without running it: what runs it, and the pool of its tensors' memory."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        outputs = step()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay, graph.pool()
