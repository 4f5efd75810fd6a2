"""Model directories on disk: the config.json, safetensors and tensor names that the ecosystem's tools share.

Nothing is ever unpickled. `LM.load` and `LM.save` are the only callers.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

A_MODEL_DIRECTORY = "a model directory holds config.json, model.safetensors and a tokenizer"
WRITTEN = ("config.json", "model.safetensors.index.json")  # by LM.save itself
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
ARCHITECTURES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {"qkv_bias": True}, "Qwen3ForCausalLM": {"qk_norm": True}}


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {A_MODEL_DIRECTORY}") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, and numbers of 5,000 digits
        raise ValueError(f"{path} is not valid JSON ({error}); copy it again from where the model came from") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def read_config(directory) -> tuple[dict, dict]:
    """(ModelConfig's fields, the raw JSON) of a Hugging Face config.json, in its older or its transformers-5 spelling.

    What LM does not do is refused by name.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"{path}: architecture {architecture!r} is not supported; known are {', '.join(ARCHITECTURES)}")
    for key in ("quantization_config", "use_sliding_window", "attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act {raw['hidden_act']!r} is not supported, only 'silu'")
    if raw.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor = {raw['partial_rotary_factor']!r} is not supported")
    if "sliding_attention" in (raw.get("layer_types") or ()):
        raise ValueError(f"{path}: layer_types has sliding_attention, which is not supported")
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):  # the older spelling, the newer one
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{path}: {key} = {raw[key]!r} is no JSON object")
        rope |= raw.get(key) or {}
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{path}: rope type {kind!r} is not supported, only 'default' and 'llama3'")
    if kind == "llama3" and (missing := LLAMA3_ROPE - rope.keys()):
        raise ValueError(f"{path}: its llama3 rope scaling lacks {', '.join(sorted(missing))}")
    try:
        heads = raw["num_attention_heads"]
        sizes = {"vocab_size": raw["vocab_size"], "dim": raw["hidden_size"], "n_layers": raw["num_hidden_layers"],
                 "n_heads": heads, "n_kv_heads": raw.get("num_key_value_heads") or heads,
                 "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
                 "ffn_dim": raw["intermediate_size"], "max_seq_len": raw.get("max_position_embeddings", 2048)}
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]!r} is missing") from None
    except (TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: a size is not a number or is zero ({error})") from None
    if bad := [name for name, size in sizes.items() if not isinstance(size, int) or size < 1]:
        raise ValueError(f"{path}: {', '.join(bad)} must be whole numbers from 1 up")
    if sizes["head_dim"] % 2:
        raise ValueError(f"{path}: head_dim {sizes['head_dim']} is odd; rotary embeddings turn pairs")
    eps = raw.get("rms_norm_eps", 1e-6)
    numbers = {"rope_theta": theta, "rms_norm_eps": eps, **(rope if kind == "llama3" else {})}
    for name in ("rope_theta", "rms_norm_eps", *sorted(LLAMA3_ROPE & numbers.keys())):
        if not isinstance(numbers[name], (int, float)) or not numbers[name] > 0:
            raise ValueError(f"{path}: {name} = {numbers[name]!r} must be a number above 0")
    if heads % sizes["n_kv_heads"]:
        raise ValueError(f"{path}: {heads} query heads cannot share {sizes['n_kv_heads']} key/value heads evenly")
    return {**sizes, "norm_eps": eps, "rope_theta": float(theta), "rope_scaling": rope if kind == "llama3" else None,
            "tie_embeddings": raw.get("tie_word_embeddings", False), **ARCHITECTURES[architecture]}, raw


def config_to_json(config) -> dict:
    """The config.json of a model that was made here, from its ModelConfig."""
    flags = {k: True for k in ("qkv_bias", "qk_norm") if getattr(config, k)}
    architecture = next((name for name, needs in ARCHITECTURES.items() if needs == flags), None)
    if architecture is None:
        raise ValueError("no known architecture has both qkv_bias and qk_norm")
    return {
        "architectures": [architecture], "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "vocab_size": config.vocab_size, "hidden_size": config.dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim, "rms_norm_eps": config.norm_eps, "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling},
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings, "hidden_act": "silu",
    }


def read_tensors(directory, wanted: dict, tied: bool) -> None:
    """Copy the safetensors of a directory into the tensors `wanted` by name; names and shapes must match exactly.

    Files are mapped for one tensor at a time, so that at the peak there is the model and its largest tensor.
    """
    directory = Path(directory)
    places = tensor_places(directory)
    present = places.keys() - ({"lm_head.weight"} if tied else set())
    for problem, names in (("lacks", wanted.keys() - present), ("has unknown", present - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
            raise ValueError(f"{directory} {problem} tensors for its config.json: {shown}")
    for name, tensor in wanted.items():
        with opened(places[name]) as file:
            shape = tuple(file.get_slice(name).get_shape())
            if shape != tuple(tensor.shape):
                raise ValueError(f"{places[name]}: {name} has shape {shape}, config.json asks for {tuple(tensor.shape)}")
            tensor.detach().copy_(file.get_tensor(name))
    if tied and "lm_head.weight" in places:  # some exporters write the tied head out as well
        embedding = "model.embed_tokens.weight"
        with opened(places["lm_head.weight"]) as head, opened(places[embedding]) as embed:
            if not head.get_tensor("lm_head.weight").equal(embed.get_tensor(embedding)):
                raise ValueError(f"{directory}: lm_head.weight is not {embedding}, though config.json ties them")


def tensor_places(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it: model.safetensors, or the shards that an index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        with opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if not index.is_file():
        raise FileNotFoundError(f"{single} is missing: {A_MODEL_DIRECTORY}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files; copy it again")
    held = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        # A stranger's index must not reach out of its directory; hubs link a file to a cache beside it, which is fine.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(f"{index} names the file {shard!r}; shards are .safetensors files in the same directory")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, though {index.name} names it: the directory is half written")
        with opened(path) as file:
            held |= dict.fromkeys(file.keys(), path)
    if wrong := [name for name, shard in weight_map.items() if held.get(name) != directory / shard]:
        raise ValueError(f"{index} says that {wrong[0]} is in {weight_map[wrong[0]]}, where it is not; copy the directory again")
    return held


@contextmanager
def opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}); copy it again") from None


def read_companions(directory) -> dict[str, bytes]:
    """The small files that travel with a model untouched: tokenizer, generation settings, chat template, licence."""
    return {path.name: path.read_bytes() for path in sorted(Path(directory).iterdir())
            if path.is_file() and path.name not in WRITTEN and not path.name.startswith(".")
            and path.suffix in (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", "") and path.stat().st_size < 1 << 26}


def write_directory(path, config: dict, tensors, companions: dict[str, bytes], tokenizer=None, shard_bytes=5 * 10**9) -> None:
    """Write a whole model directory beside `path`, then put it in its place all at once."""
    path = Path(path)
    if path.is_file() or path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors")):
        raise FileExistsError(f"{path} is there and is no model directory: not overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent))
    try:
        for name, content in companions.items():
            (new / name).write_bytes(content)
        if tokenizer is not None:
            tokenizer.save(new)
        tensors = dict(tensors)
        dtype = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
        config = {**config, "torch_dtype": dtype, "dtype": dtype}  # older and newer readers
        (new / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_tensors(new, tensors, shard_bytes)
        new.chmod(0o755)  # mkdtemp's own is 0700
        replace_directory(new, path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def write_tensors(directory: Path, tensors: dict, shard_bytes: int) -> None:
    """One model.safetensors, or where that would be larger than `shard_bytes`, shards and their index."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    weight_map = {}
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        content = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def replace_directory(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; at every moment one of the two is whole."""
    if old.exists():
        aside = new.with_suffix(".old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(new, old)
