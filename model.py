"""The decoder language model, its KV cache, and its weights in and out.

One `LM` covers Llama 3, Qwen2, Qwen2.5, Qwen3 and SmolLM2: RMSNorm, rotary positions, grouped-query
attention, SwiGLU, and three switches (tied head, q/k/v bias, q/k norm). Nothing here knows of RL.

Shapes: B rows, T tokens, D model width, H query heads, K key/value heads, G = H / K query heads
that share one, E head width, S positions of a row that are read, P positions of a shared prefix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data import weights

# From this many feed-forward units on (tokens x layers x ffn_dim) a backward pass computes them
# again: keeping them costs five tensors of that size. Below it memory is cheap and time is not.
RECOMPUTE_FROM = 1 << 25

Rope = tuple[Tensor, Tensor]  # cos and sin of every position's angles, (1 or B, 1, T, E/2) each
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> y, also over what a cache holds


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
    rope_scaling: dict[str, Any] | None = None  # as in config.json: Llama 3's scaling, or none
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3


class LM(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            nn.init.normal_(self.embed.weight, std=config.dim**-0.5)  # 1 is too large for a head
            self.head.weight = self.embed.weight
        # No buffer: model.to(bfloat16) must not round the frequencies.
        self.inv_freq = rope_frequencies(config)
        # Activation checkpointing: a backward pass computes each block again instead of keeping it.
        self.recompute = False
        # How the sampler's steps are compiled (run.compiled.compile_step); None: they are not.
        self.compile_step: Callable[..., Callable[[], Any]] | None = None
        # The config.json it was loaded from, and the files beside it: save writes them back.
        self.source: dict[str, Any] | None = None
        self.companions: dict[str, bytes] = {}

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, vocab_size); with a cache, tokens go behind its own."""
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def hidden(self, tokens: Tensor, cache: KVCache | Any = None) -> Tensor:
        """The states before the head: (B, T) -> (B, T, D). `cache`: a KVCache or SharedPrompts."""
        B, T = tokens.shape
        x = self.embed(tokens)
        if cache is None:
            positions, attend = torch.arange(T, device=tokens.device)[None], None  # (1, T)
        else:
            span = cache.extend(B, T)
            positions, attend = span.positions, partial(cache.attend, span)  # (B, T)
        rope = self.rope(positions, x.dtype)
        training = torch.is_grad_enabled()
        units = B * T * self.config.n_layers * self.config.ffn_dim
        recompute_ffn = training and units >= RECOMPUTE_FROM
        for i, layer in enumerate(self.layers):
            attend_here = None if attend is None else partial(attend, i)
            if self.recompute and training:
                x = again_in_backward(layer, x, rope, attend_here)
            else:
                x = layer(x, rope, attend_here, recompute_ffn)
        states: Tensor = self.norm(x)
        return states

    def rope(self, positions: Tensor, dtype: torch.dtype) -> Rope:
        """Positions (1 or B, T) -> cos and sin of their angles."""
        self.inv_freq = self.inv_freq.to(positions.device)
        angles = positions[..., None] * self.inv_freq  # (1 or B, T, E/2)
        return angles.cos()[:, None].to(dtype), angles.sin()[:, None].to(dtype)

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LM:
        """Read a Hugging Face-style directory: config.json + safetensors, in one file or in shards.

        Raises FileNotFoundError or ValueError, naming the file and what is wrong with it.
        """
        fields, source = weights.read_config(path)
        config = ModelConfig(**fields)
        with torch.device("meta"), weights.NoInit():  # no random numbers, no second copy
            model = cls(config).to(dtype)
        model.to_empty(device=device)
        if config.tie_embeddings:
            model.head.weight = model.embed.weight  # to_empty gave each its own storage
        weights.read_tensors(path, dict(model.disk_tensors()), tied=config.tie_embeddings)
        model.source, model.companions = source, weights.read_companions(path)
        return model

    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the directory `load` reads, with the files that came with the model untouched.

        Weights are split into shards of 5 GB. A model made here came with no files: give it its
        `tokenizer`. If writing fails, an older directory at `path` stays as it was.
        """
        config = self.source or weights.config_to_json(self.config)
        weights.write_directory(path, config, self.disk_tensors(), self.companions, tokenizer)

    def disk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name in a Hugging Face-style file, a view of the parameter)."""
        yield "model.embed_tokens.weight", self.embed.weight
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            for name, tensor in layer.disk_tensors():
                yield f"model.layers.{i}.{name}", tensor
        yield "model.norm.weight", self.norm.weight
        if not self.config.tie_embeddings:
            yield "lm_head.weight", self.head.weight


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)  # one product for both
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(
        self, x: Tensor, rope: Rope, attend: Attend | None = None, recompute_ffn: bool = False
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, attend)  # (B, T, D)
        # Three quarters of what a backward pass keeps is made in the feed-forward layer, by a
        # seventh of a pass's arithmetic: computing it again is the cheapest way to save memory.
        if recompute_ffn:
            return x + again_in_backward(self.ffn, x)
        return x + self.ffn(x)

    def ffn(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)  # (B, T, F) each
        y: Tensor = self.down(F.silu(gate) * up)
        return y

    def disk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As LM.disk_tensors: what is one matrix here (qkv, gate_up) is several in a file."""
        attention, c = self.attention, self.attention.config
        heads = (c.n_heads, c.n_kv_heads, c.n_kv_heads)
        for kind, qkv in attention.qkv.named_parameters():  # weight, and bias if there is one
            for name, part in zip("qkv", qkv.split([n * c.head_dim for n in heads])):
                yield f"self_attn.{name}_proj.{kind}", part
        yield "self_attn.o_proj.weight", attention.out.weight
        if c.qk_norm:
            yield "self_attn.q_norm.weight", attention.q_norm.weight
            yield "self_attn.k_norm.weight", attention.k_norm.weight
        gate, up = self.gate_up.weight.split(c.ffn_dim)
        yield "mlp.gate_proj.weight", gate
        yield "mlp.up_proj.weight", up
        yield "mlp.down_proj.weight", self.down.weight
        yield "input_layernorm.weight", self.attention_norm.weight
        yield "post_attention_layernorm.weight", self.ffn_norm.weight


class Attention(nn.Module):
    """Causal attention with rotary positions; G query heads share a key/value head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        self.qkv = nn.Linear(c.dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend | None = None) -> Tensor:
        B, T, _ = x.shape
        H, K, E = self.config.n_heads, self.config.n_kv_heads, self.config.head_dim
        heads = self.qkv(x).view(B, T, -1, E).transpose(1, 2)  # (B, H + 2K, T, E)
        if self.config.qk_norm:
            q, k, v = heads.split([H, K, K], dim=1)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        turned = rotate(heads[:, : H + K], rope)
        q, k, v = turned[:, :H], turned[:, H:], heads[:, H + K :]
        if attend is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = attend(q, k, v)  # (B, H, T, E)
        out: Tensor = self.out(y.transpose(1, 2).reshape(B, T, -1))
        return out


def again_in_backward(part: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """part(*inputs), of which only the inputs are kept: a backward pass computes the rest again."""
    y: Tensor = checkpoint(part, *inputs, use_reentrant=False, preserve_rng_state=False)
    return y


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[e], x[e + E/2]) by its position's angle.

    The published weights pair the two halves of a head, not neighbours.
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """The angle that each pair turns a position: (E/2,) float32."""
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
    freq: Tensor = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    s = config.rope_scaling
    if s is None:
        return freq
    # Llama 3: a pair that turns often in the original context is kept, a slow one slowed down by
    # the factor, and between the two thresholds goes the mean of both, weighed by `keep`.
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    scaled: Tensor = freq * (keep + (1 - keep) / s["factor"])
    return scaled


class Span(NamedTuple):
    """What one pass of the model writes and reads in each of a cache's first B rows."""

    at: Tensor  # (B, T) positions that it writes, counted from the row's first
    positions: Tensor  # (B, T) the same in the text, which begins with the shared prefix
    reads: int  # S: it reads a row's first S positions
    mask: Tensor | None  # (B, 1, T, S or P + S), 0 or -inf; None: plain causal attention


class KVCache:
    """Keys and values of up to `rows` rows of up to `max_len` positions.

    They are allocated once: a step writes its own and moves nothing. Row b holds `lengths[b]`
    positions; what lies behind them is masked and overwritten, so a right-padded prompt is written
    whole and `lengths` then set back to its true length. `prefix`, a cache of one row, holds the
    positions before every row's first. A decoding step reads them once for all rows.
    """

    def __init__(self, model: LM, rows: int, max_len: int, prefix: KVCache | None = None) -> None:
        c, weight = model.config, model.embed.weight
        self.max_len = max_len
        shape = (c.n_layers, rows, c.n_kv_heads, max_len, c.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no row is longer; to ask the device would mean to wait for it
        self.fixed_reads: int | None = None  # set within a block of steps (see reserve)
        self.prefix = prefix
        self.prefix_length = prefix.longest if prefix else 0  # P

    def extend(self, B: int, T: int) -> Span:
        """Add T positions to each of the first B rows; `attend` fills them, layer by layer."""
        if self.fixed_reads is None:
            self.claim(T)
        reads = self.fixed_reads or self.longest
        at = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)  # (B, T)
        self.lengths[:B] += T
        if reads == T and not self.prefix_length:  # it was empty: rows see just these T tokens,
            return Span(at, at, reads, None)  # so plain causal attention does
        visible = torch.arange(reads, device=at.device) <= at[..., None]  # (B, T, S)
        if T > 1:  # a single token attends to the prefix apart: attend_to_both
            visible = F.pad(visible, (self.prefix_length, 0), value=True)  # (B, T, P + S)
        # Attention would make this of `visible` in every layer.
        mask = torch.zeros_like(visible, dtype=self.k.dtype).masked_fill_(~visible, -torch.inf)
        return Span(at, at + self.prefix_length, reads, mask[:, None])

    def claim(self, count: int) -> None:
        """Count `count` positions more as used; the longest row must have room for them."""
        needed = self.longest + count
        if needed > self.max_len:
            raise ValueError(f"the KV cache holds {self.max_len} positions, {needed} are needed")
        self.longest = needed

    @contextmanager
    def reserve(self, count: int, multiple: int) -> Iterator[None]:
        """Within it, `count` steps of one token claim no position, and all read the same ones.

        So they have one shape and change nothing outside tensors, and a recording can be replayed.
        What they read is rounded up to a `multiple`, so that blocks need few shapes.
        """
        self.claim(count)
        rounded = -(-self.longest // multiple) * multiple
        self.fixed_reads = min(rounded, self.max_len)
        try:
            yield
        finally:
            self.fixed_reads = None

    def attend(self, span: Span, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's new k, v (B, K, T, E); attend from q to all that its rows hold.

        q and what is returned: (B, H, T, E).
        """
        B, H, T, E = q.shape
        rows = torch.arange(B, device=q.device)[:, None]
        self.k[layer][rows, :, span.at] = k.transpose(1, 2)
        self.v[layer][rows, :, span.at] = v.transpose(1, 2)
        k, v = self.k[layer, :B, :, : span.reads], self.v[layer, :B, :, : span.reads]
        if span.mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        q = q.view(B, k.shape[1], -1, T, E)  # (B, K, G, T, E)
        if T > 1:
            y = self.attend_many(layer, q, k, v, span.mask)
        elif self.prefix:
            prefix_k, prefix_v = self.prefix.first_row(layer, self.prefix_length)
            y = attend_to_both(q.squeeze(3), prefix_k, prefix_v, k, v, span.mask)
        else:
            # A group's G query heads are laid along the time axis, so k and v are not repeated.
            y = F.scaled_dot_product_attention(q.squeeze(3), k, v, span.mask)
        return y.reshape(B, H, T, E)

    def attend_many(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention from the q (B, K, G, T, E) of several tokens a row: the same shape."""
        if self.prefix:
            rows = (len(q), -1, -1, -1)
            prefix_k, prefix_v = self.prefix.first_row(layer, self.prefix_length)
            k = torch.cat((prefix_k.expand(rows), k), 2)  # (B, K, P + S, E)
            v = torch.cat((prefix_v.expand(rows), v), 2)
        # A group's heads in turn: not every fused attention takes groups when there is a mask.
        heads = [F.scaled_dot_product_attention(head, k, v, mask) for head in q.unbind(2)]
        return torch.stack(heads, 2)

    def first_row(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first row, (K, length, E) each."""
        return self.k[layer, 0, :, :length], self.v[layer, 0, :, :length]

    def set_lengths(self, lengths: list[int]) -> None:
        """Cut every row back to its true length."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        self.longest = max(lengths)

    def fill(self, first: int, other: KVCache, rows: Sequence[int]) -> None:
        """Copy these rows of another cache into the rows from `first` on."""
        n = other.longest
        here = slice(first, first + len(rows))
        there = torch.tensor(rows, device=self.k.device)
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            for layer in range(len(mine)):  # one by one: indexing with a tensor makes a copy first
                mine[layer, here, :, :n] = theirs[layer][there, :, :n]
        self.lengths[here] = other.lengths[there]
        self.longest = max(self.longest, n)

    def drop(self, done: Tensor) -> Tensor:
        """Forget the rows marked in `done` (B,); returns for each row kept its old number.

        The last rows move into the gaps: a finished row costs one copy, and the others stay.
        """
        order = torch.arange(len(done), device=done.device)
        kept = int((~done).sum())
        gaps = order[:kept][done[:kept]]
        movers = order[kept:][~done[kept:]]
        for store in (self.k, self.v):
            store[:, gaps, :, : self.longest] = store[:, movers, :, : self.longest]
        order[gaps] = movers
        self.lengths[:kept] = self.lengths[order[:kept]]
        self.longest = int(self.lengths[:kept].max()) if kept else 0
        return order[:kept]


def attend_to_both(
    q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """Attention from one token a row to a prefix that rows share and to each row's own positions.

    q (B, K, G, E); prefix_k, prefix_v (K, P, E); k, v (B, K, S, E) -> (B, K, G, E). One softmax
    over the scores of both. The prefix is one matrix product for all rows, not one for each.
    """
    B, K, G, E = q.shape
    q = q * E**-0.5
    together = q.transpose(0, 1).reshape(K, B * G, E)
    to_prefix = (together @ prefix_k.transpose(1, 2)).float()  # (K, B * G, P)
    to_own = (q @ k.transpose(2, 3)).float() + mask  # (B, K, G, S)
    # The largest score of both is subtracted before exp, which would overflow otherwise.
    top_of_prefix = to_prefix.amax(-1).view(K, B, G).transpose(0, 1)
    top = torch.maximum(top_of_prefix, to_own.amax(-1))  # (B, K, G)
    to_prefix = to_prefix.sub_(top.transpose(0, 1).reshape(K, B * G, 1)).exp_()
    to_own = to_own.sub_(top[..., None]).exp_()
    total = to_prefix.sum(-1).view(K, B, G).transpose(0, 1) + to_own.sum(-1)  # (B, K, G)
    from_prefix = (to_prefix.to(q.dtype) @ prefix_v).view(K, B, G, E).transpose(0, 1)
    y: Tensor = (from_prefix + to_own.to(q.dtype) @ v) / total[..., None]
    return y.to(q.dtype)
