"""Tests of the decoder, its cache and its files: against the model without a cache, and transformers."""

import errno
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file, save_model

from data import weights
from model import LM, KVCache, ModelConfig, attend_to_both
from sampler import prefill

PROPERTY = settings(max_examples=40, deadline=None)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # with theta 100: of 8 frequencies 2 are kept, 2 blended, 4 divided
SMALL = ModelConfig(
    vocab_size=61,
    dim=32,
    n_layers=3,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    ffn_dim=48,
    norm_eps=0.03,
    rope_theta=100.0,
    max_seq_len=64,
)
CONFIGS = {
    "llama": SMALL,
    "llama tied, scaled rope": replace(SMALL, tie_embeddings=True, rope_scaling=LLAMA3_ROPE),
    "qwen2": replace(SMALL, qkv_bias=True),
    "qwen3 tied": replace(SMALL, qk_norm=True, tie_embeddings=True),
}


def liven(module, seed=0):
    """Weights so large that attention decides: at std 0.02 a tied model repeats its last token, right or wrong."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3 + ("norm" in name))
    return module.eval()


MODEL = liven(LM(CONFIGS["llama tied, scaled rope"]))


def random_tokens(*shape, seed=0):
    return torch.randint(0, SMALL.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def prompts_of(*lengths, seed=0):
    return [random_tokens(n, seed=seed + i).tolist() for i, n in enumerate(lengths)]


@torch.no_grad()
def uncached(ids, model=MODEL):
    """The reference: logits (T, V) of one unpadded sequence."""
    return model(torch.tensor([ids]))[0]


def assert_close(a, b):
    torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


# ------------------------------------------------------------------ the cache


@PROPERTY
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.sampled_from([0, 1, 7]),
    st.sampled_from(list(CONFIGS)),
    st.integers(0, 2**32),
)
def test_cached_logits_are_the_uncached_ones_at_every_position(lengths, chunks, shared, name, seed):
    """Ragged prompts behind a shared prefix (or none), then continued one to four tokens at a time."""
    model = liven(LM(CONFIGS[name]))
    rows = random_tokens(len(lengths), 12 + sum(chunks), seed=seed)
    prompts = [row[:n].tolist() for row, n in zip(rows, lengths)]
    head = random_tokens(shared, seed=seed + 1)
    expected = torch.stack(
        [uncached(head.tolist() + row.tolist(), model)[shared:] for row in rows]
    )  # (B, T, V)
    prefix = prefill(model, [head.tolist()])[0] if shared else None

    filled, logits = prefill(model, prompts, prefix)
    here = torch.tensor(lengths)
    each = torch.arange(len(lengths))
    assert_close(logits, expected[each, here - 1])
    cache = KVCache(model, len(lengths), max(lengths) + sum(chunks), prefix)
    cache.fill(0, filled, range(len(lengths)))
    for n in chunks:
        columns = here[:, None] + torch.arange(n)
        with torch.no_grad():
            logits = model(rows[each[:, None], columns], cache)
        assert_close(logits, expected[each[:, None], columns])
        here = here + n


def no_rotation(model, patch):
    patch.setattr("model.rotate", lambda x, rope: x)


def next_position_off_by_one(model, patch):
    extend = KVCache.extend

    def off_by_one(self, B, T):
        span = extend(self, B, T)
        return span._replace(positions=span.positions + (T == 1))

    patch.setattr(KVCache, "extend", off_by_one)


def no_mask(model, patch):
    attention = torch.nn.functional.scaled_dot_product_attention
    patch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, v, mask=None, is_causal=False, **more: attention(q, k, v, **more),
    )


def no_epsilon(model, patch):
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            patch.setattr(module, "eps", 0.0)


def no_bias(model, patch):
    for layer in model.layers:
        patch.setattr(layer.attention.qkv, "bias", None)


@pytest.mark.parametrize(
    "fault", (None, no_rotation, next_position_off_by_one, no_mask, no_epsilon, no_bias)
)
def test_these_weights_show_every_fault(fault):
    """The other tests compare to 1e-4: here what they compare moves by a hundred times that, so no such fault can hide."""
    model = liven(LM(replace(SMALL, qkv_bias=True)))
    ids = random_tokens(12).tolist()
    expected = uncached(ids, model)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        if fault:
            fault(model, patch)
        cache = KVCache(model, 1, 12)
        found = torch.cat(
            [
                model(torch.tensor([ids[:8]]), cache),
                *(model(torch.tensor([[t]]), cache) for t in ids[8:]),
            ],
            1,
        )[0]
    difference = (found - expected).abs().max()
    assert difference > 1e-2 if fault else difference < 1e-4


def test_padding_inside_a_prefilled_batch_changes_no_position():
    prompts = prompts_of(3, 9, 1)
    cache = KVCache(MODEL, 3, 9)
    with torch.no_grad():
        logits = MODEL(torch.tensor([p + [0] * (9 - len(p)) for p in prompts]), cache)
    for row, prompt in zip(logits, prompts):
        assert_close(row[: len(prompt)], uncached(prompt))


def test_rows_that_stay_keep_their_own_keys_and_lengths():
    prompts = prompts_of(5, 2, 8, 3, 6)
    filled, _ = prefill(MODEL, prompts)
    cache = KVCache(MODEL, 5, 9)
    cache.fill(0, filled, range(5))
    kept = cache.drop(torch.tensor([True, False, True, False, False])).tolist()
    assert sorted(kept) == [1, 3, 4]
    with torch.no_grad():
        logits = MODEL(torch.full((3, 1), 7), cache)[:, 0]
    assert_close(logits, torch.stack([uncached(prompts[i] + [7])[-1] for i in kept]))


def test_a_full_cache_is_refused():
    cache, _ = prefill(MODEL, prompts_of(4))
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        MODEL(torch.tensor([[1]]), cache)


@pytest.mark.parametrize("groups", (1, 3))
def test_attention_to_a_shared_prefix_and_to_a_rows_own_is_attention_to_both(groups):
    B, K, E, P, S = 3, 2, 8, 7, 5
    q, (prefix_k, prefix_v) = torch.randn(B, K, groups, E), torch.randn(2, K, P, E)
    k, v = torch.randn(2, B, K, S, E)
    visible = torch.arange(S) < torch.tensor([[1], [5], [3]])  # (B, S)
    found = attend_to_both(
        q,
        prefix_k,
        prefix_v,
        k,
        v,
        torch.zeros(B, 1, 1, S).masked_fill(~visible[:, None, None], -torch.inf),
    )
    for b in range(B):
        n = visible[b].sum()
        keys, values = torch.cat((prefix_k, k[b, :, :n]), 1), torch.cat((prefix_v, v[b, :, :n]), 1)
        scores = (q[b].double() @ keys.double().transpose(1, 2) / math.sqrt(E)).softmax(-1)
        assert_close(found[b], (scores @ values.double()).float())


# ------------------------------------------------------------------ transformers is the reference

ROPE = {"rope_type": "default", "rope_theta": 100.0}
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=0.03,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=0,
)
PEERS = {
    "llama": transformers.LlamaConfig(**SIZES, rope_parameters=ROPE),
    "llama tied, scaled rope, head_dim": transformers.LlamaConfig(
        **SIZES,
        head_dim=16,
        rope_parameters={**LLAMA3_ROPE, "rope_theta": 100.0},
        tie_word_embeddings=True,
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES,
        rope_parameters=ROPE,
        use_sliding_window=False,
        sliding_window=4,
        max_window_layers=1,
    ),
    "qwen2 tied": transformers.Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16, rope_parameters=ROPE),
    "qwen3 tied": transformers.Qwen3Config(
        **SIZES, head_dim=16, rope_parameters=ROPE, tie_word_embeddings=True
    ),
}


@pytest.fixture(params=PEERS)
def peer(request, tmp_path):
    """A transformers model and the directory it wrote."""
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS[request.param]))
    model.save_pretrained(tmp_path / "peer")
    return model, tmp_path / "peer"


TOKENS = random_tokens(3, 50)


@torch.no_grad()
def peer_logits(model):
    return model(TOKENS).logits


def edit(path, **changes):
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in {**content, **changes}.items() if v is not None}))


def test_a_directory_written_by_transformers_gives_its_logits(peer):
    model, directory = peer
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_the_older_spelling_of_rope_and_dtype_means_the_same(peer):
    model, directory = peer
    rope = dict(model.config.rope_parameters)
    edit(
        directory / "config.json",
        rope_parameters=None,
        rope_theta=rope.pop("rope_theta"),
        torch_dtype="float32",
        dtype=None,
        rope_scaling=rope if rope["rope_type"] == "llama3" else None,
    )
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_rope_theta_counts_beside_rope_parameters_too(peer):
    model, directory = peer
    rope = dict(model.config.rope_parameters)
    edit(directory / "config.json", rope_theta=rope.pop("rope_theta"), rope_parameters=rope)
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), peer_logits(model))


def test_a_loaded_trained_and_saved_directory_gives_transformers_the_new_logits(peer, tmp_path):
    ours = liven(LM.load(peer[1]), seed=1)
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs) is type(peer[0])
    with torch.no_grad():
        assert_close(ours(TOKENS), peer_logits(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_made_here_is_saved_so_that_transformers_gives_its_logits(name, tmp_path):
    ours = liven(LM(CONFIGS[name]))
    ours.save(tmp_path / "ours")
    with torch.no_grad():
        assert_close(
            ours(TOKENS),
            peer_logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")),
        )


def test_a_tied_head_that_is_written_out_as_well_is_read(tmp_path):
    MODEL.save(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    model = LM.load(tmp_path / "model")
    assert model.head.weight is model.embed.weight
    assert_same_bits(model, MODEL)


def test_a_tied_model_whose_file_holds_only_the_head_is_read(tmp_path):
    """safetensors' save_model writes of two names for one tensor the first."""
    theirs = liven(
        transformers.AutoModelForCausalLM.from_config(PEERS["llama tied, scaled rope, head_dim"])
    )
    theirs.save_pretrained(tmp_path)
    save_model(theirs, tmp_path / "model.safetensors")
    assert "model.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ours = LM.load(tmp_path)
    assert ours.head.weight is ours.embed.weight
    with torch.no_grad():
        assert_close(ours(TOKENS), peer_logits(theirs))
        assert_close(ours(TOKENS), peer_logits(again))


def test_an_untied_model_whose_file_holds_only_the_head_is_refused(directory):
    change_tensors(directory, lambda t: t.pop("model.embed_tokens.weight"))
    assert "lacks tensors for its config.json: model.embed_tokens.weight" in refusal(directory)


# Written by other tools than transformers' newest; what each means is what transformers makes of it


def reread(directory):
    """Logits of a directory as transformers reads it."""
    return peer_logits(transformers.AutoModelForCausalLM.from_pretrained(directory))


@pytest.mark.parametrize("sharded", [False, True])
def test_rotary_frequencies_in_the_file_are_left_alone(sharded, tmp_path):
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PEERS["llama"]))
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in (0, 2)}
    tensors = {**theirs.state_dict(), **frequencies, "model.rotary_emb.inv_freq": torch.ones(4)}
    theirs.save_pretrained(
        tmp_path, state_dict=tensors, max_shard_size="20KB" if sharded else "1GB"
    )
    files = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert (len(files) > 1) == sharded
    assert sum("inv_freq" in name for file in files for name in file) == 3
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


@pytest.mark.parametrize("absent", [None, []])
def test_the_model_type_says_what_architectures_does_not(peer, absent):
    model, directory = peer
    edit(directory / "config.json", architectures=absent)
    with torch.no_grad():
        assert_close(LM.load(directory)(TOKENS), reread(directory))


@pytest.mark.parametrize(
    "name, changes",
    [
        ("llama", {"hidden_act": "swish"}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 3,
                "layer_types": None,
            },
        ),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": None,
                "max_window_layers": None,
            },
        ),  # from layer 28
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 0,
                "layer_types": ["full_attention"] * 3,
            },
        ),
    ],
)
def test_other_spellings_of_what_the_model_does(name, changes, tmp_path):
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS[name]))
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


def test_without_a_window_no_layer_slides(tmp_path):
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS["qwen2"]))
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", use_sliding_window=True, max_window_layers=0, layer_types=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    with torch.no_grad():
        assert_close(LM.load(tmp_path)(TOKENS), reread(tmp_path))


def test_a_window_that_some_layer_has_changes_what_transformers_computes(tmp_path):
    """Which is why it is refused."""
    model = liven(transformers.AutoModelForCausalLM.from_config(PEERS["qwen2"]))
    model.save_pretrained(tmp_path)
    edit(
        tmp_path / "config.json",
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
        layer_types=None,
    )
    assert (reread(tmp_path) - peer_logits(model)).abs().max() > 0.1
    assert "layers from 2 on" in refusal(tmp_path)


# ------------------------------------------------------------------ save and load


def assert_same_bits(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)  # dtype and shape too


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_comes_back_to_the_bit(name, tmp_path):
    model = liven(LM(CONFIGS[name]))
    model.save(tmp_path / "a" / "new" / "model")
    back = LM.load(tmp_path / "a" / "new" / "model")
    assert back.config == model.config
    assert_same_bits(back, model)


def test_bfloat16_is_read_and_written_as_such(tmp_path):
    MODEL.save(tmp_path / "float32")
    half = LM.load(tmp_path / "float32", dtype=torch.bfloat16)
    assert_same_bits(half, liven(LM(MODEL.config)).to(torch.bfloat16))
    half.save(tmp_path / "bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "bfloat16" / "model.safetensors").values()} == {
        torch.bfloat16
    }
    assert transformers.AutoConfig.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    assert_same_bits(LM.load(tmp_path / "bfloat16"), half.to(torch.float32))


def test_a_stale_dtype_in_the_config_is_replaced(tmp_path):
    MODEL.save(tmp_path / "model")
    edit(tmp_path / "model" / "config.json", dtype="bfloat16", torch_dtype="bfloat16")
    LM.load(tmp_path / "model").save(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {config.get("dtype", "float32"), config.get("torch_dtype", "float32")} == {"float32"}


def test_rope_frequencies_stay_exact_in_bfloat16():
    model = liven(LM(MODEL.config))
    exact = model.inv_freq.clone()
    model.to(torch.bfloat16)(TOKENS)
    torch.testing.assert_close(model.inv_freq, exact, rtol=0, atol=0)


def test_saving_over_a_model_leaves_only_the_new_one(tmp_path):
    LM(SMALL).save(tmp_path / "model")
    MODEL.save(tmp_path / "model")
    assert_same_bits(LM.load(tmp_path / "model"), MODEL)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_scaled_rope_needs_no_rope_type_to_come_back(tmp_path):
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_type"}
    model = LM(replace(SMALL, rope_scaling=scaling))
    model.save(tmp_path / "model")
    assert torch.equal(LM.load(tmp_path / "model").inv_freq, model.inv_freq)


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def raiser(error):
    def fail(*_, **__):
        raise error

    return fail


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "error",
    [DISK_FULL, SafetensorError("No space left on device")],
    ids=["OSError", "SafetensorError"],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_leaves_what_was_there_and_says_what_it_was_writing(
    exists, error, tmp_path, monkeypatch
):
    if exists:
        LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    monkeypatch.setattr("data.weights.save_file", raiser(error))
    with pytest.raises(OSError) as caught:
        MODEL.save(tmp_path / "model")
    assert contents(tmp_path) == before
    assert f"{tmp_path / 'model'}" in str(caught.value) and "No space left" in str(caught.value)


class BrokenTokenizer:
    def __init__(self, error):
        self.save = raiser(error)


@pytest.mark.parametrize("error", [DISK_FULL, KeyboardInterrupt()], ids=["disk full", "Ctrl-C"])
def test_a_save_that_is_cut_off_after_the_weights_leaves_what_was_there(error, tmp_path):
    LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    with pytest.raises(type(error)):
        MODEL.save(tmp_path / "model", BrokenTokenizer(error))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2])
def test_a_new_directory_that_cannot_take_the_old_ones_place_leaves_the_old(
    failing, tmp_path, monkeypatch
):
    LM(SMALL).save(tmp_path / "model")
    before = contents(tmp_path)
    calls, rename = itertools.count(1), os.rename
    monkeypatch.setattr(
        "os.rename",
        lambda *paths: raiser(DISK_FULL)() if next(calls) == failing else rename(*paths),
    )
    with pytest.raises(OSError):
        MODEL.save(tmp_path / "model")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("thesis", ["mine", "mine/thesis.txt"])
def test_what_is_no_model_directory_is_not_overwritten(thesis, tmp_path):
    (tmp_path / thesis).parent.mkdir(exist_ok=True)
    (tmp_path / thesis).write_text("my thesis")
    before = contents(tmp_path)
    with pytest.raises((OSError, ValueError), match="mine"):
        MODEL.save(tmp_path / "mine")
    assert contents(tmp_path) == before


# ------------------------------------------------------------------ directories that are no good


@pytest.fixture
def directory(tmp_path):
    """A good one, for a test to spoil."""
    liven(LM(replace(SMALL, n_layers=1, qkv_bias=True))).save(tmp_path / "model")
    return tmp_path / "model"


def refusal(directory, error=ValueError):
    with pytest.raises(error) as caught:
        LM.load(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_missing_directory_or_file_is_named(directory):
    assert "nowhere/config.json is missing" in refusal(directory / "nowhere", FileNotFoundError)
    (directory / "model.safetensors").unlink()
    assert "model.safetensors is missing" in refusal(directory, FileNotFoundError)
    (directory / "config.json").unlink()
    assert "config.json is missing" in refusal(directory, FileNotFoundError)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b'{"vocab_size": 61,',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"n": %s}' % (b"9" * 5000),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(directory, content):
    (directory / "config.json").write_bytes(content)
    assert "model/config.json" in refusal(directory)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": [], "model_type": None}, ["LlamaForCausalLM"]),
        ({"architectures": None, "model_type": "mistral"}, ["mistral", "LlamaForCausalLM"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["rope", "yarn"]),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, ["rope", "linear"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            ["rope", "dynamic"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, ["llama3", "low_freq_factor"]),
        ({"rope_scaling": "llama3"}, ["rope"]),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": "4"}}, ["factor"]),
        ({"rope_theta": "big"}, ["rope_theta"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
            ["use_sliding_window", "layers from 0 on"],
        ),
        ({"use_sliding_window": True, "max_window_layers": "1"}, ["use_sliding_window", "'1'"]),
        ({"layer_types": ["chunked_attention"]}, ["layer_types", "chunked_attention"]),
        ({"layer_types": ["sliding_attention"], "sliding_window": 4}, ["sliding"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_hidden_layers": 0}, ["n_layers"]),
        ({"num_attention_heads": 0}, ["n_heads"]),
        ({"vocab_size": "61"}, ["vocab_size"]),
        ({"num_key_value_heads": 3}, ["4 query heads", "3 key/value heads"]),
        ({"head_dim": 15}, ["head_dim"]),
    ],
)
def test_what_the_model_does_not_do_is_refused_by_name(directory, changes, words):
    edit(directory / "config.json", **changes)
    message = refusal(directory)
    assert all(word in message for word in ["config.json", *words])


def change_tensors(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_a_missing_tensor_is_named(directory):
    change_tensors(directory, lambda t: t.pop("model.layers.0.self_attn.k_proj.bias"))
    assert "model.layers.0.self_attn.k_proj.bias" in refusal(directory)


def test_an_unknown_tensor_is_named(directory):
    change_tensors(directory, lambda t: t.update({"model.layers.1.surprise": torch.zeros(2)}))
    assert "model.layers.1.surprise" in refusal(directory)


def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(directory):
    change_tensors(directory, lambda t: t.update({"model.norm.weight": torch.zeros(31)}))
    message = refusal(directory)
    assert all(word in message for word in ("model.norm.weight", "31", "32"))


def test_of_a_hundred_unknown_tensors_four_are_named_and_the_rest_counted(directory):
    change_tensors(
        directory, lambda t: t.update({f"surprise.{i:03}": torch.zeros(1) for i in range(108)})
    )
    assert "surprise.000, surprise.001, surprise.002, surprise.003 and 104 more" in refusal(
        directory
    )


def test_a_tied_model_whose_file_has_another_head_is_refused(directory):
    edit(
        directory / "config.json", tie_word_embeddings=True
    )  # transformers would quietly not tie these
    assert "lm_head.weight" in refusal(directory)


@pytest.mark.parametrize("length", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_refused(directory, length):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors" in refusal(directory)


def test_nothing_is_unpickled(directory):
    torch.save({"x": 1}, directory / "model.safetensors")
    assert "model.safetensors" in refusal(directory)


# Shards, and the files that travel with a model


def test_shards_written_by_transformers_are_read_and_ours_are_read_by_it(tmp_path):
    torch.manual_seed(0)
    theirs = liven(
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )
    )
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 1
    ours = LM.load(tmp_path / "theirs")
    weights.write_directory(
        tmp_path / "ours", ours.source, ours.disk_tensors(), ours.companions, shard_bytes=20_000
    )
    shards = sorted((tmp_path / "ours").glob("model-*.safetensors"))
    assert len(shards) > 1 and all(s.stat().st_size < 24_000 for s in shards)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    tokens = random_tokens(2, 9)
    with torch.no_grad():
        assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
        assert (again(tokens).logits - theirs(tokens).logits).abs().max() == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(LM.load(tmp_path / "ours").parameters(), ours.parameters(), strict=True)
    )


@pytest.fixture
def sharded(tmp_path):
    model = liven(LM(SMALL))
    weights.write_directory(
        tmp_path / "model",
        weights.config_to_json(SMALL),
        model.disk_tensors(),
        {},
        shard_bytes=20_000,
    )
    return tmp_path / "model"


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/hostname", "sub/x.safetensors", "weights.bin", ""]
)
def test_an_index_cannot_reach_out_of_its_directory(sharded, shard):
    (sharded.parent / "outside.safetensors").write_bytes(next(sharded.glob("model-*")).read_bytes())
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "index.json" in refusal(sharded)


def test_a_missing_shard_and_a_lying_index_are_named(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    moved = next(name for name, shard in index["weight_map"].items() if shard == first)
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"] | {moved: last}})
    )
    assert moved in refusal(sharded) and "where it is not" in refusal(sharded)
    (sharded / last).unlink()
    assert last in refusal(sharded, FileNotFoundError)
    (sharded / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    assert "weight_map" in refusal(sharded)


def test_what_came_with_a_model_leaves_with_it_to_the_byte(directory, tmp_path):
    carried = {
        "tokenizer.json": b"{ }",
        "generation_config.json": b'{"eos_token_id": [1, 2]}\n',
        "LICENSE": b"terms\r\n",
    }
    for name, content in carried.items():
        (directory / name).write_bytes(content)
    (directory / "pytorch_model.bin").write_bytes(b"\x80 a pickle")
    (directory / "old.safetensors").write_bytes(b"stale")
    LM.load(directory).save(tmp_path / "copy")
    assert {name: (tmp_path / "copy" / name).read_bytes() for name in carried} == carried
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(
        [*carried, "config.json", "model.safetensors"]
    )


def test_loading_and_sampling_do_not_import_torchs_compiler(tmp_path):
    """It takes as long as all the rest of torch."""
    LM(SMALL).save(tmp_path)
    script = (
        "import sys; from model import LM; from sampler import generate\n"
        "generate(LM.load(sys.argv[1]), [[1, 2]], max_tokens=2, stop=())\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", script, tmp_path]
    assert subprocess.run(command, cwd=os.path.dirname(__file__)).returncode == 0


@pytest.mark.slow
def test_loading_needs_the_model_and_its_largest_tensor_and_no_more(tmp_path):
    config = ModelConfig(
        vocab_size=16_000,
        dim=1024,
        n_layers=17,
        n_heads=16,
        n_kv_heads=8,
        head_dim=64,
        ffn_dim=3584,
    )
    LM(config).save(tmp_path / "big")
    size = (tmp_path / "big" / "model.safetensors").stat().st_size
    script = (
        "import sys; from model import LM; import torch; torch.ones(99, 99) @ torch.ones(99, 99)\n"
        "def kib(key): return int(next(l for l in open('/proc/self/status') if l.startswith(key)).split()[1])\n"
        "before = kib('VmRSS'); model = LM.load(sys.argv[1]); print((kib('VmHWM') - before) * 1024)"
    )
    growth = int(
        subprocess.run(
            [sys.executable, "-c", script, tmp_path / "big"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    assert size > 1e9 and growth < 1.15 * size, (size, growth)


# ------------------------------------------------------------------ parity with transformers


WIDE = dict(
    vocab_size=2000,
    hidden_size=448,
    intermediate_size=1200,
    num_hidden_layers=4,
    num_attention_heads=7,
    num_key_value_heads=1,
    max_position_embeddings=131072,
)
LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PUBLISHED_SHAPES = {  # fewer layers and a smaller width than the published ones; head size, rotation, biases, norms and ties are theirs
    "Llama 3 8B": transformers.LlamaConfig(
        **WIDE,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "Llama 3.1 8B": transformers.LlamaConfig(
        **WIDE, head_dim=128, rms_norm_eps=1e-5, rope_parameters=LLAMA31_ROPE
    ),
    "Llama 3.2 1B": transformers.LlamaConfig(
        **WIDE,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_parameters={**LLAMA31_ROPE, "factor": 32.0},
        tie_word_embeddings=True,
    ),
    "Qwen2.5 0.5B": transformers.Qwen2Config(
        **WIDE,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
    "Qwen2.5 7B": transformers.Qwen2Config(
        **WIDE, rms_norm_eps=1e-6, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
    "Qwen3 0.6B": transformers.Qwen3Config(
        **WIDE,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    ),
    "Qwen3 8B": transformers.Qwen3Config(
        **WIDE,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
def test_parity_over_a_thousand_positions(name, tmp_path):
    """Shown by `python -m pytest -q -s -m slow -k parity`."""
    theirs = liven(transformers.AutoModelForCausalLM.from_config(PUBLISHED_SHAPES[name]))
    theirs.save_pretrained(tmp_path)
    tokens = random_tokens(2, 1200) * 32
    with torch.no_grad():
        expected, ours = theirs(tokens).logits, LM.load(tmp_path)(tokens)
        rounding = (theirs.double()(tokens).logits - expected).abs().max().item()
    worst = (ours - expected).abs().max().item()
    print(
        f"\n{name}: worst difference {worst:.1e} in fp32 logits of standard deviation {expected.std():.2f}; transformers "
        f"{transformers.__version__} in fp32 is {rounding:.1e} from itself in float64"
    )
    assert worst < rounding
