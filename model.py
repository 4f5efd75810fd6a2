"""The decoder language model, and its weights in and out; its KV cache and the sampler are in sampler.py.

One `LM` covers Llama 3.x, Qwen2.5 and Qwen3: RMSNorm, rotary positions, grouped-query attention,
SwiGLU, and three switches (tied head, q/k/v bias, q/k norm). Nothing here knows of RL.

On a GPU a decoding step is compiled without Triton, which need not be there. A step reads every weight once and computes
little, so what fusion could save is small beside that; what costs is launching hundreds of kernels a token. torch.compile
therefore only traces the step, as one graph, and hands it to a backend that records the kernels PyTorch has for it (cuBLAS
products, fused attention, RMSNorm) as a CUDA graph: sampler.Recorder. An update's kernels are large and few, and run as they
are: it compiles as well (in the tests and in bench.py), but gradients that are added in place here are copied there.

Shapes: B rows, T tokens, D model width, H query heads, K key/value heads, E head width, S cached positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from data.weights import config_to_json, read_companions, read_config, read_tensors, write_directory

# Hidden units of a whole pass from which on the backward pass computes the feed-forward layers again instead of keeping them:
# five tensors of that size would be kept. Below it memory is cheap and time is not.
RECOMPUTE_FROM = 1 << 25

Rope = tuple[Tensor, Tensor]  # cos and sin of every position's angles, (1 or B, 1, T, E/2) each
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # a layer's q, k, v and mask, with what the cache holds


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
    rope_scaling: dict[str, Any] | None = None  # as in config.json; only Llama 3's frequency scaling exists here
    max_seq_len: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # Qwen3


class LM(nn.Module):
    compiled = True  # decoding steps on a GPU are compiled; off: they run as they are

    def __init__(self, config: ModelConfig) -> None:
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
        # The config.json it was loaded from, and the files beside it: save writes them back.
        self.source: dict[str, Any] | None = None
        self.companions: dict[str, bytes] = {}

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) int64 -> logits (B, T, vocab_size). With a cache, row b's tokens stand at cache.lengths[b] onwards."""
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
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
        training = torch.is_grad_enabled()
        large = training and B * T * self.config.n_layers * self.config.ffn_dim >= RECOMPUTE_FROM
        for i, layer in enumerate(self.layers):
            if self.recompute and training:
                x = checkpoint(layer, x, rope, mask, None, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, mask, cache and partial(cache.attend, i), large)
        states: Tensor = self.norm(x)
        return states

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> LM:
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

    def save(self, path: str | Path, tokenizer: Any = None) -> None:
        """Write the directory `load` reads: weights in shards of 5 GB, and the files that came with them untouched.

        A model made here has none: give it its `tokenizer`. A crash or a full disk leaves an older directory whole.
        """
        write_directory(path, self.source or config_to_json(self.config), self.disk_tensors(), self.companions, tokenizer)

    def disk_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (the ecosystem's name, a view of the parameter): fused projections are split by row."""
        c = self.config
        qkv_sizes = [c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim, c.n_kv_heads * c.head_dim]
        yield "model.embed_tokens.weight", self.embed.weight
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Block)
            prefix = f"model.layers.{i}."
            for kind, fused in layer.attention.qkv.named_parameters():  # weight, and bias if there is one
                for name, view in zip("qkv", torch.split(fused, qkv_sizes)):
                    yield f"{prefix}self_attn.{name}_proj.{kind}", view
            yield prefix + "self_attn.o_proj.weight", layer.attention.out.weight
            if c.qk_norm:
                yield prefix + "self_attn.q_norm.weight", layer.attention.q_norm.weight
                yield prefix + "self_attn.k_norm.weight", layer.attention.k_norm.weight
            for name, view in zip(("gate", "up"), torch.split(layer.gate_up.weight, c.ffn_dim)):
                yield f"{prefix}mlp.{name}_proj.weight", view
            yield prefix + "mlp.down_proj.weight", layer.down.weight
            yield prefix + "input_layernorm.weight", layer.attention_norm.weight
            yield prefix + "post_attention_layernorm.weight", layer.ffn_norm.weight
        yield "model.norm.weight", self.norm.weight
        if not c.tie_embeddings:
            yield "lm_head.weight", self.head.weight


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, attend: Attend | None, recompute_ffn: bool = False) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, attend)
        # Three quarters of what a backward pass keeps is made here, by a seventh of the pass's arithmetic.
        return x + (checkpoint(self.ffn, x, use_reentrant=False, preserve_rng_state=False) if recompute_ffn else self.ffn(x))

    def ffn(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        y: Tensor = self.down(F.silu(gate) * up)
        return y


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = c = config
        self.qkv = nn.Linear(c.dim, (c.n_heads + 2 * c.n_kv_heads) * c.head_dim, bias=c.qkv_bias)
        self.out = nn.Linear(c.n_heads * c.head_dim, c.dim, bias=False)
        if c.qk_norm:
            self.q_norm = nn.RMSNorm(c.head_dim, c.norm_eps)
            self.k_norm = nn.RMSNorm(c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, rope: Rope, mask: Tensor | None, attend: Attend | None) -> Tensor:
        c = self.config
        B, T, _ = x.shape
        heads = self.qkv(x).view(B, T, -1, c.head_dim).transpose(1, 2)  # (B, H + 2K, T, E)
        if c.qk_norm:
            q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], dim=1)
            heads = torch.cat((self.q_norm(q), self.k_norm(k), v), dim=1)
        turned = rotate(heads[:, : c.n_heads + c.n_kv_heads], rope)
        q, k, v = turned[:, : c.n_heads], turned[:, c.n_heads :], heads[:, c.n_heads + c.n_kv_heads :]
        if attend is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = attend(q, k, v, mask)  # also over what the cache holds
        x = self.out(y.transpose(1, 2).reshape(B, T, -1))
        return x


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each pair (x[e], x[e + E/2]) by its position's angle: the half-split layout of the published weights."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Rotary angles per position: (E/2,) float32, with Llama 3's scaling of the slow ones where asked."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    freq: Tensor = 1.0 / config.rope_theta**exponent
    if config.rope_scaling is None:
        return freq
    s = config.rope_scaling
    turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # full turns in the original context
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: fast, left alone; 0: slow, divided by the factor
    scaled: Tensor = freq * (keep + (1 - keep) / s["factor"])
    return scaled


class KVCache:
    """Keys and values of up to `rows` rows and `max_len` positions, allocated once: a step writes its own and moves nothing.

    Row b holds `lengths[b]` valid positions; what lies behind them is masked and overwritten, so a right-padded prompt
    is written whole and `lengths` then set back to its true length. `prefix`, a cache of one row, holds the positions
    before every row's first: they are there once, and in a decoding step they are read once for all rows.
    """

    def __init__(self, model: LM, rows: int, max_len: int, prefix: KVCache | None = None) -> None:
        c = model.config
        weight = model.embed.weight
        shape = (c.n_layers, rows, c.n_kv_heads, max_len, c.head_dim)
        self.k, self.v = weight.new_zeros(shape), weight.new_zeros(shape)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self.longest = 0  # no row is longer: known here without asking the device
        self.window: int | None = None  # positions that a recorded step reads; who sets it keeps `longest` too
        self.prefix, self.offset = prefix, prefix.longest if prefix else 0

    def reserve(self, B: int, T: int) -> tuple[Tensor, Tensor | None]:
        """Claim T positions in each of the first B rows: their positions (B, T) in the text and the mask `attend` wants."""
        if self.window is None:
            if self.longest + T > self.k.shape[3]:
                raise ValueError(f"the KV cache holds {self.k.shape[3]} positions, {self.longest + T} are needed")
            self.longest += T
        self.read = self.window or self.longest  # S
        self.at = self.lengths[:B, None] + torch.arange(T, device=self.lengths.device)  # (B, T), within the row
        self.lengths[:B] += T
        if self.read == T and not self.offset:
            return self.at, None  # plain causal attention
        visible = torch.arange(self.read, device=self.at.device) <= self.at[..., None]  # (B, T, S)
        if T > 1:
            visible = F.pad(visible, (self.offset, 0), value=True)  # (B, T, P + S)
        # What SDPA would make of `visible` in every layer.
        mask = torch.zeros_like(visible, dtype=self.k.dtype).masked_fill_(~visible, -torch.inf)
        return self.at + self.offset, mask[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Store a layer's new k, v (B, K, T, E) and attend from q (B, H, T, E) to all that its rows hold: (B, H, T, E)."""
        B, H, T, E = q.shape
        rows = torch.arange(B, device=q.device)[:, None]
        self.k[layer][rows, :, self.at] = k.transpose(1, 2)
        self.v[layer][rows, :, self.at] = v.transpose(1, 2)
        k, v = self.k[layer, :B, :, : self.read], self.v[layer, :B, :, : self.read]
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        q = q.view(B, k.shape[1], -1, T, E)  # (B, K, G, T, E)
        if self.prefix:
            prefix_k, prefix_v = (x[layer, 0, :, : self.offset] for x in (self.prefix.k, self.prefix.v))  # (K, P, E)
        if T > 1:
            if self.prefix:
                k, v = (torch.cat((x.expand(B, -1, -1, -1), own), 2) for x, own in ((prefix_k, k), (prefix_v, v)))
            # A group's heads one after the other: not every fused attention knows groups when there is a mask.
            y = torch.stack([F.scaled_dot_product_attention(head, k, v, mask) for head in q.unbind(2)], 2)
        elif self.prefix:
            y = attend_to_both(q.squeeze(3), prefix_k, prefix_v, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q.squeeze(3), k, v, mask)  # heads as if they were times: k and v stay single
        return y.reshape(B, H, T, E)

    def set_lengths(self, lengths: list[int]) -> None:
        """Cut rows back to their true lengths (a list of int, one a row)."""
        self.lengths = torch.tensor(lengths, dtype=torch.int64, device=self.lengths.device)
        self.longest = max(lengths)

    def fill(self, first: int, other: KVCache, rows: Sequence[int]) -> None:
        """Copy `rows` (a list) of another cache into the rows from `first` on."""
        n, here, there = other.longest, slice(first, first + len(rows)), torch.tensor(rows, device=self.k.device)
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            for layer, source in zip(mine, theirs):  # one by one, for `source[there]` is a copy before it is copied
                layer[here, :, :n] = source[there, :, :n]
        self.lengths[here] = other.lengths[there]
        self.longest = max(self.longest, n)

    def drop(self, done: Tensor) -> Tensor:
        """Of the first B rows forget those marked in `done` (B,) bool; returns the old index of each row kept.

        The last rows move into the gaps, so a finished row costs one row's copy and the others stay in place.
        """
        order = torch.arange(len(done), device=done.device)
        kept = int((~done).sum())
        gaps = order[:kept][done[:kept]]
        movers = order[kept:][~done[kept:]]
        for store in (self.k, self.v):
            store[:, gaps, :, : self.longest] = store[:, movers, :, : self.longest]
        order[gaps] = movers
        order = order[:kept]
        self.lengths[:kept] = self.lengths[order]
        self.longest = int(self.lengths[:kept].max()) if kept else 0
        return order


def attend_to_both(q: Tensor, prefix_k: Tensor, prefix_v: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention from q (B, K, G, E) to a prefix that all rows share (K, P, E) and to each row's own k, v (B, K, S, E).

    One softmax over the scores of both; the prefix is one matrix product for all rows, not one for each.
    """
    B, K, G, E = q.shape
    q = q * E**-0.5
    together = q.transpose(0, 1).reshape(K, B * G, E)
    to_prefix = (together @ prefix_k.transpose(1, 2)).float()  # (K, B * G, P)
    to_own = (q @ k.transpose(2, 3)).float() + mask  # (B, K, G, S)
    top = torch.maximum(to_prefix.amax(-1).view(K, B, G).transpose(0, 1), to_own.amax(-1))  # (B, K, G)
    to_prefix = to_prefix.sub_(top.transpose(0, 1).reshape(K, B * G, 1)).exp_()
    to_own = to_own.sub_(top[..., None]).exp_()
    total = to_prefix.sum(-1).view(K, B, G).transpose(0, 1) + to_own.sum(-1)
    from_prefix = (to_prefix.to(q.dtype) @ prefix_v).view(K, B, G, E).transpose(0, 1)
    y: Tensor = (from_prefix + to_own.to(q.dtype) @ v) / total[..., None]
    return y.to(q.dtype)
