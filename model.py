"""The decoder language model, its KV cache, the sampler, and weights in and out.

One `LM` covers Llama 3.x, Qwen2.5 and Qwen3: RMSNorm, rotary positions, grouped-query attention,
SwiGLU, and three switches (tied head, q/k/v bias, q/k norm). Nothing here knows of RL.

Shapes: B rows, T tokens, D model width, H query heads, K key/value heads, E head width, S cached positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from weights import config_to_json, read_companions, read_config, read_tensors, write_directory


@dataclass
class ModelConfig:
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # as in config.json; only Llama 3's frequency scaling exists here
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3


class LM(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            nn.init.normal_(self.embed.weight, std=config.dim**-0.5)
            self.head.weight = self.embed.weight
        # No buffer: model.to(bfloat16) must not round the frequencies.
        self.inv_freq = rope_frequencies(config)
        self.recompute = False  # activation checkpointing: the backward pass computes each block again instead of keeping it
        self.source: dict | None = None  # the config.json it was loaded from, and the files beside it: save writes them back
        self.companions: dict[str, bytes] = {}

    def forward(self, tokens, cache=None):
        """(B, T) int64 -> logits (B, T, vocab_size). With a cache, row b's tokens stand at cache.lengths[b] onwards."""
        return self.head(self.hidden(tokens, cache))

    def hidden(self, tokens, cache=None):
        """The states before the output head: (B, T) -> (B, T, D)."""
        B, T = tokens.shape
        x = self.embed(tokens)
        if cache is None:
            positions, mask = torch.arange(T, device=tokens.device)[None], None  # (1, T)
        else:
            positions, mask = cache.reserve(B, T)
        self.inv_freq = self.inv_freq.to(x.device)
        angles = positions[..., None] * self.inv_freq  # (B, T, E/2)
        rope = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, None, use_reentrant=False)
            else:
                x = layer(x, rope, mask, cache and partial(cache.write, i, positions))
        return self.norm(x)

    @property
    def device(self):
        return self.embed.weight.device

    @classmethod
    def load(cls, path, device="cpu", dtype=torch.float32) -> "LM":
        """Read a Hugging Face-style directory: config.json + safetensors, in one file or in shards.

        Raises FileNotFoundError or ValueError, naming the file and what is wrong with it.
        """
        fields, source = read_config(path)
        config = ModelConfig(**fields)
        with torch.device("meta"):  # no random initialisation, no second copy
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        if config.tie_embeddings:
            model.head.weight = model.embed.weight  # to_empty gave each its own storage
        read_tensors(path, dict(model.disk_tensors()), tied=config.tie_embeddings)
        model.source, model.companions = source, read_companions(path)
        return model

    def save(self, path, tokenizer=None) -> None:
        """Write the directory `load` reads: weights in shards of 5 GB, and the files that came with them untouched.

        A model made here has none: give it its `tokenizer`. A crash or a full disk leaves an older directory whole.
        """
        write_directory(path, self.source or config_to_json(self.config), self.disk_tensors(), self.companions, tokenizer)

    def disk_tensors(self):
        """Yield (the ecosystem's name, a view of the parameter): fused projections are split by row."""
        c = self.config
        qkv_sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        yield "model.embed_tokens.weight", self.embed.weight
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            for kind, fused in layer.attention.qkv.named_parameters():  # weight, and bias if there is one
                for name, view in zip("qkv", fused.split(qkv_sizes)):
                    yield f"{prefix}self_attn.{name}_proj.{kind}", view
            yield prefix + "self_attn.o_proj.weight", layer.attention.out.weight
            if c.qk_norm:
                yield prefix + "self_attn.q_norm.weight", layer.attention.q_norm.weight
                yield prefix + "self_attn.k_norm.weight", layer.attention.k_norm.weight
            for name, view in zip(("gate", "up"), layer.gate_up.weight.split(c.ffn_dim)):
                yield f"{prefix}mlp.{name}_proj.weight", view
            yield prefix + "mlp.down_proj.weight", layer.down.weight
            yield prefix + "input_layernorm.weight", layer.attention_norm.weight
            yield prefix + "post_attention_layernorm.weight", layer.ffn_norm.weight
        yield "model.norm.weight", self.norm.weight
        if not c.tie_embeddings:
            yield "lm_head.weight", self.head.weight


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x, rope, mask, write):
        x = x + self.attention(self.attention_norm(x), rope, mask, write)
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = c = config
        self.qkv = nn.Linear(c.dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x, rope, mask, write):
        c = self.config
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H + 2K, T, E)
        q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        if write is not None:
            k, v = write(k, v)  # (B, K, S, E): everything the row has seen
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x, rope):
    """Turn each pair (x[e], x[e + E/2]) by its position's angle: the half-split layout of the published weights."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(config: ModelConfig):
    """Rotary angles per position: (E/2,) float32, with Llama 3's scaling of the slow ones where asked."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freq = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return freq
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns in the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, left alone; 0: slow, divided by the factor
    return freq * (keep + (1 - keep) / s["factor"])


class KVCache:
    """Keys and values of up to `rows` rows and `max_len` positions, allocated once.

    Row b holds `lengths[b]` valid positions; what lies behind them is masked and overwritten, so a right-padded
    prompt is written whole and `lengths` then set back to its true length.
    """

    def __init__(self, model: LM, rows: int, max_len: int):
        c = model.config
        weight = model.embed.weight
        shape = (c.n_layers, rows, c.n_kv_heads, max_len, c.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no row is longer: known here without asking the device

    def reserve(self, B, T):
        """Claim T positions in each of the first B rows: their positions (B, T) and the mask (B, 1, T, S)."""
        if self.longest + T > self.k.shape[3]:
            raise ValueError(f"the KV cache holds {self.k.shape[3]} positions, {self.longest + T} are needed")
        positions = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)
        empty = self.longest == 0
        self.lengths[:B] += T
        self.longest += T
        if empty:
            return positions, None  # plain causal attention
        visible = torch.arange(self.longest, device=positions.device) <= positions[..., None]  # (B, T, S)
        return positions, visible[:, None]

    def write(self, layer, positions, k, v):
        """Store a layer's new k, v (B, K, T, E) at `positions` (B, T); returns everything its rows hold, (B, K, S, E) each."""
        B = len(positions)
        rows = torch.arange(B, device=positions.device)[:, None]
        self.k[layer][rows, :, positions] = k.transpose(1, 2)
        self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer, :B, :, : self.longest], self.v[layer, :B, :, : self.longest]

    def set_lengths(self, lengths):
        """Cut rows back to their true lengths (a list of int, one a row)."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        self.longest = max(lengths)

    def copy_from(self, other: "KVCache", samples: int = 1):
        """Fill the rows with `samples` copies of each of the other's."""
        n = other.longest
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            mine[..., :n, :] = theirs[..., :n, :].repeat_interleave(samples, dim=1)
        self.lengths = other.lengths.repeat_interleave(samples)
        self.longest = n

    def drop(self, done):
        """Forget the rows marked in `done` (B,) bool; returns the old index of each row kept.

        The last rows move into the gaps, so a finished row costs one row's copy and the others stay in place.
        """
        order = torch.arange(len(done), device=done.device)
        kept = int((~done).sum())
        gaps = order[:kept][done[:kept]]
        movers = order[kept:][~done[kept:]]
        for store in (self.k, self.v):
            store[:, gaps] = store[:, movers]
        order[gaps] = movers
        order = order[:kept]
        self.lengths = self.lengths[order]
        return order


@torch.no_grad()
def prefill(model: LM, prompts, prefix: KVCache | None = None):
    """Run right-padded prompts through the model once: (their cache, logits after each prompt (Q, vocab))."""
    lengths = [len(p) for p in prompts]
    start = prefix.longest if prefix else 0
    cache = KVCache(model, len(prompts), start + max(lengths))
    if prefix:
        cache.copy_from(prefix, len(prompts))
    padded = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(padded, prompts):
        row[: len(prompt)] = torch.tensor(prompt)
    states = model.hidden(padded.to(model.device), cache)
    cache.set_lengths([start + n for n in lengths])
    last = torch.tensor(lengths, device=model.device) - 1
    return cache, model.head(states[torch.arange(len(prompts), device=model.device), last])


@torch.no_grad()
def generate(model, prompts, *, max_tokens, stop, samples=1, temperature=1.0, top_p=1.0, generator=None,
             prefix=None, logprobs=False, on_step=None):
    """Sample `samples` responses to each prompt: len(prompts) * samples lists of ids, question-major.

    A finished response ends with its stop token; one without was cut at max_tokens. temperature 0 is greedy.
    `prefix` is a one-row cache of tokens that stand before every prompt. With logprobs=True also returns the
    model's own log-probabilities (temperature 1, no top-p) of the sampled tokens. `on_step(rows, tokens)` sees
    every step. Raises ValueError on an empty prompt or one that does not fit the context with max_tokens.
    """
    if not prompts:
        return ([], []) if logprobs else []
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature must be at least 0 and top_p in (0, 1], not {temperature} and {top_p}")
    room = model.config.max_seq_len - max_tokens - (prefix.longest if prefix else 0)
    if not all(0 < len(p) <= room for p in prompts):
        raise ValueError(f"prompts must have 1 to {room} tokens: the context is {model.config.max_seq_len}, "
                         f"of which {max_tokens} are for the response")
    n = len(prompts) * samples
    # Each response has its own stream of random numbers, so it does not depend on when its neighbours finish.
    uniform = 1 - torch.rand(n, max_tokens, generator=generator, device=generator and generator.device)  # (0, 1]
    uniform = uniform.to(model.device)
    stop_ids = torch.tensor(sorted(stop), device=model.device)
    prompt_cache, logits = prefill(model, prompts, prefix)
    cache = KVCache(model, n, prompt_cache.longest + max_tokens)
    cache.copy_from(prompt_cache, samples)
    logits = logits.repeat_interleave(samples, dim=0)  # (n, V)

    tokens_out = torch.zeros(n, max_tokens, dtype=torch.int64, device=model.device)
    logprobs_out = torch.zeros(n, max_tokens, device=model.device)
    lengths = torch.full((n,), max_tokens, device=model.device)
    rows = torch.arange(n, device=model.device)  # the response each cache row is writing
    for t in range(max_tokens):
        tokens, logp = sample(logits, uniform[rows, t], temperature, top_p)
        tokens_out[rows, t], logprobs_out[rows, t] = tokens, logp
        if on_step:
            on_step(rows, tokens)
        done = torch.isin(tokens, stop_ids)
        lengths[rows[done]] = t + 1
        if done.all() or t + 1 == max_tokens:
            break
        if done.any():
            order = cache.drop(done)
            rows, tokens = rows[order], tokens[order]
        logits = model(tokens[:, None], cache)[:, -1]
    responses = [row[:n] for row, n in zip(tokens_out.tolist(), lengths.tolist())]
    if logprobs:
        return responses, [row[:n] for row, n in zip(logprobs_out.tolist(), lengths.tolist())]
    return responses


def sample(logits, uniform, temperature, top_p):
    """Draw one token a row by inverting the cumulative distribution: (B, V), (B,) in (0, 1] -> ids, log-probs (B,)."""
    logprobs = logits.float().log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        probs = (logprobs / temperature).softmax(-1)
        if top_p < 1:
            ranked, order = probs.sort(-1, descending=True)
            beyond = ranked.cumsum(-1) - ranked >= top_p  # the token that crosses top_p stays
            probs = probs.masked_fill(torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0)
        cdf = probs.cumsum(-1)
        # uniform > 0 and "first entry >= target" can only land on a token of positive probability.
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(-1)
        tokens = tokens.clamp(max=probs.shape[-1] - 1)  # NaN logits would point past the end
    return tokens, logprobs.gather(-1, tokens[:, None]).squeeze(-1)
