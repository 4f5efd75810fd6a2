"""Model directories on disk: config.json and safetensors as Hugging Face's tools write them.

Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from data.files import read_json, regular

WRITTEN = ("config.json", "model.safetensors.index.json")  # by LM.save itself
LLAMA3_ROPE = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "factor")
SHARD = re.compile(r"[^/\\]+\.safetensors")
LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Older files hold these tensors. They follow from config.json, and transformers ignores them too.
COMPUTED = "rotary_emb.inv_freq"
FLOATS = ("F64", "F32", "F16", "BF16")
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}
MODEL_TYPES = {name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES}

SIZES = {  # of ModelConfig: their names in config.json
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
}


class Stored(NamedTuple):
    """A tensor in a file."""

    file: Path
    shape: tuple[int, ...]


def read_config(directory) -> tuple[dict, dict]:
    """(ModelConfig's fields, the raw JSON) of a config.json, in its older or newer spelling.

    Raises ValueError for what LM cannot do, and for sizes that differ from the tensors beside it.
    """
    path = Path(directory) / "config.json"
    raw = read_json(path)
    try:
        fields = config_fields(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_sizes(Path(directory), fields)
    return fields, raw


def config_fields(raw: dict) -> dict:
    """ModelConfig's fields from a config.json's content. Raises ValueError for what is wrong."""
    flags = ARCHITECTURES[architecture_of(raw)]
    for key in ("quantization_config", "attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{key} = {short(raw[key])} is not supported")
    accepted = {
        "hidden_act": ("silu", "swish"),  # two names of one function
        "partial_rotary_factor": (1.0,),
        "tie_word_embeddings": (False, True, None),
    }
    for key, known in accepted.items():
        if raw.get(key, known[0]) not in known:
            names = ", ".join(map(str, known))
            raise ValueError(f"{key} = {short(raw[key])} is not supported, only {names}")
    refuse_sliding(raw)
    theta, scaling = rotation(raw)
    return {
        **model_sizes(raw),
        "norm_eps": positive("rms_norm_eps", raw.get("rms_norm_eps", 1e-6)),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_embeddings": bool(raw.get("tie_word_embeddings")),
        **flags,
    }


def architecture_of(raw: dict) -> str:
    """One of ARCHITECTURES: the first of "architectures", or else that of "model_type"."""
    named, kind = raw.get("architectures"), raw.get("model_type")
    architecture = named[0] if isinstance(named, list) and named else named
    if not architecture and isinstance(kind, str):
        architecture = MODEL_TYPES.get(kind, kind)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {short(architecture)} is not supported; known are {known}")
    return architecture


def refuse_sliding(raw: dict) -> None:
    """Raises ValueError if a layer attends only to a window of earlier tokens.

    layer_types says so or, without it, Qwen's three older keys.
    """
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        if other := [kind for kind in kinds if kind != "full_attention"]:
            raise ValueError(f"layer_types has {short(other[0])}, which is not supported")
    elif raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
        first = raw.get("max_window_layers", 28)  # the first layer with a window
        layers = raw.get("num_hidden_layers")
        if type(first) is not int or type(layers) is not int or first < layers:
            raise ValueError(f"use_sliding_window is set for layers from {short(first)} on")


def rotation(raw: dict) -> tuple:
    """(rope_theta, Llama 3's scaling or None), as config.json has them."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):  # the older spelling, the newer one
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} = {short(raw[key])} is no JSON object")
        rope |= raw.get(key) or {}
    theta = float(positive("rope_theta", rope.pop("rope_theta")))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope type {short(kind)} is not supported, only 'default' and 'llama3'")
    for name in LLAMA3_ROPE:
        positive(f"llama3's {name}", rope.get(name))
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError("low_freq_factor must be below high_freq_factor")
    return theta, rope


def positive(name: str, value):
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name} = {short(value)} must be a number above 0")
    return value


def model_sizes(raw: dict) -> dict[str, int]:
    sizes = {name: raw.get(key) for name, key in SIZES.items()}
    sizes["max_seq_len"] = sizes["max_seq_len"] or 2048
    sizes["n_kv_heads"] = sizes["n_kv_heads"] or sizes["n_heads"]
    if is_size(sizes["dim"]) and is_size(sizes["n_heads"]):
        sizes["head_dim"] = sizes["head_dim"] or sizes["dim"] // sizes["n_heads"]
    for name, size in sizes.items():
        if not is_size(size):
            given = f"{SIZES[name]} = {short(size)}, which is {name}"
            raise ValueError(f"{given}, must be a whole number from 1 up (and below 2^31)")
    if sizes["head_dim"] % 2:
        raise ValueError(f"head_dim {sizes['head_dim']} is odd; rotary embeddings turn pairs")
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        heads = f"{sizes['n_heads']} query heads cannot share {sizes['n_kv_heads']}"
        raise ValueError(f"{heads} key/value heads evenly")
    return sizes


def is_size(value) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def check_sizes(directory: Path, fields: dict) -> None:
    """Raises ValueError unless the sizes in config.json are those of the tensors.

    So no model larger than its files is ever allocated. This compares one tensor of each size, and
    every layer with the first; read_tensors compares all names and shapes later.
    """
    stored = stored_tensors(directory)
    layers = layers_of(stored)
    if len(layers) != fields["n_layers"]:
        last = max(filter(LAYER.fullmatch, stored), default="none")
        asked = f"config.json asks for {fields['n_layers']} layers"
        raise ValueError(f"{directory}: {asked}, not {len(layers)} as in {last}")
    rows_of = {
        embedding_name(stored, fields["tie_embeddings"]): fields["vocab_size"],
        "model.layers.0.self_attn.q_proj.weight": fields["n_heads"] * fields["head_dim"],
        "model.layers.0.self_attn.k_proj.weight": fields["n_kv_heads"] * fields["head_dim"],
        "model.layers.0.mlp.gate_proj.weight": fields["ffn_dim"],
    }
    refuse_names(directory, "lacks", rows_of.keys() - stored.keys())
    for name, rows in rows_of.items():
        check_shape(name, stored[name], (rows, fields["dim"]))
    for i, layer in layers.items():
        if other := layer.items() ^ layers["0"].items():
            name = min(other)[0]
            raise ValueError(f"{directory}: layers {i} and 0 differ in {name} or its shape")


def check_shape(name: str, tensor: Stored, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        asked = f"config.json asks for {expected}"
        raise ValueError(f"{tensor.file}: {name} has shape {tensor.shape}, {asked}")


def layers_of(stored: dict[str, Stored]) -> dict[str, dict[str, tuple]]:
    """The number of a layer -> the shapes of its tensors by name."""
    layers: dict[str, dict] = {}
    for name, tensor in stored.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = tensor.shape
    return layers


def embedding_name(names, tied: bool) -> str:
    """The embedding's name in the files. Those of a tied model may name the same matrix HEAD."""
    only_head = HEAD in names and EMBEDDING not in names
    return HEAD if tied and only_head else EMBEDDING


def config_to_json(config) -> dict:
    """The config.json of a model that this program made, from its ModelConfig."""
    flags = {k: True for k in ("qkv_bias", "qk_norm") if getattr(config, k)}
    architecture = next((name for name, needs in ARCHITECTURES.items() if needs == flags), None)
    if architecture is None:
        raise ValueError("no known architecture has both qkv_bias and qk_norm")
    return {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        **{key: getattr(config, name) for name, key in SIZES.items()},
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling},
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


class NoInit(TorchFunctionMode):
    """Within it, modules are made without values.

    On the meta device there are none, but to draw a normal one torch would import its compiler,
    which takes as long as all the rest of torch.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", "") == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def read_tensors(directory, wanted: dict, tied: bool) -> None:
    """Copy a directory's tensors into those in `wanted`; names and shapes must match exactly.

    A tied model's matrix may be there as the embedding, as the head, or as both if they are equal.
    Tensors are read one at a time, so memory holds the model and at most one more tensor.
    """
    directory = Path(directory)
    stored = stored_tensors(directory)
    embedding = embedding_name(stored, tied)
    wanted = {embedding if name == EMBEDDING else name: tensor for name, tensor in wanted.items()}
    # Some exporters write the tied head as well.
    twice = tied and embedding == EMBEDDING and HEAD in stored
    present = stored.keys() - ({HEAD} if twice else set())
    refuse_names(directory, "lacks", wanted.keys() - present)
    refuse_names(directory, "has unknown", present - wanted.keys())
    for name, tensor in wanted.items():
        check_shape(name, stored[name], tuple(tensor.shape))
        tensor.detach().copy_(read_tensor(name, stored))
    if twice and not read_tensor(HEAD, stored).equal(read_tensor(EMBEDDING, stored)):
        raise ValueError(f"{directory}: {HEAD} is not {EMBEDDING}, though config.json ties them")


def read_tensor(name: str, stored: dict[str, Stored]):
    with opened(stored[name].file) as file:
        return file.get_tensor(name)


def refuse_names(directory: Path, problem: str, names: set[str]) -> None:
    """Raises ValueError if there are any such names."""
    if names:
        shown = ", ".join(sorted(names)[:4])
        if len(names) > 4:
            shown += f" and {len(names) - 4} more"
        raise ValueError(f"{directory} {problem} tensors for its config.json: {shown}")


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """The tensors of model.safetensors, or of the shards that an index names, by name."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists() or not index.exists():
        return {name: Stored(single, shape) for name, shape in tensor_shapes(single).items()}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    for shard in weight_map.values():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(f"{index}: {short(shard)} in its weight_map is no file beside it")
    stored = {}
    for shard in sorted(set(weight_map.values())):
        for name, shape in tensor_shapes(directory / shard).items():
            stored[name] = Stored(directory / shard, shape)
    for name, shard in weight_map.items():
        is_there = name in stored and stored[name].file == directory / shard
        if not is_there and not name.endswith(COMPUTED):
            raise ValueError(f"{index} says that {name} is in {shard}, where it is not")
    return stored


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of one file, from its header, without the COMPUTED tensors.

    Raises ValueError if a tensor is not of FLOATS: integers would need scales, which these files
    do not have.
    """
    shapes = {}
    with opened(path) as file:
        for name in file.keys():
            tensor = file.get_slice(name)
            if (dtype := tensor.get_dtype()) not in FLOATS:
                known = ", ".join(FLOATS)
                raise ValueError(f"{path}: {name} is stored as {dtype}; only {known} can be read")
            if not name.endswith(COMPUTED):
                shapes[name] = tuple(tensor.get_shape())
    return shapes


@contextmanager
def opened(path: Path):
    try:
        with safe_open(regular(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({str(error)[:200]}); copy it again") from None


def read_companions(directory) -> dict[str, bytes]:
    """The small files that are copied with a model: tokenizer, chat template, licence, ..."""
    suffixes = (".json", ".txt", ".model", ".tiktoken", ".jinja", ".md", "")
    companions = {}
    for path in sorted(Path(directory).iterdir()):
        if not path.is_file() or path.name in WRITTEN or path.name.startswith("."):
            continue
        if path.suffix in suffixes and path.stat().st_size < 1 << 26:
            companions[path.name] = regular(path).read_bytes()
    return companions


def write_directory(
    path, config: dict, tensors, companions: dict[str, bytes], tokenizer=None, shard_bytes=5 * 10**9
) -> None:
    """Write a whole model directory beside `path`, then put it in its place all at once."""
    path = Path(path)
    is_other = path.is_dir() and any(path.iterdir()) and not any(path.glob("*.safetensors"))
    if path.is_file() or is_other:
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
    """One model.safetensors or, if that exceeds `shard_bytes`, shards and their index."""
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    weight_map = {}
    for i, names in enumerate(shards):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        content = {name: tensors[name].detach().cpu().contiguous() for name in names}
        save_file(content, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        size = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def replace_directory(new: Path, old: Path) -> None:
    """Put `new` in the place of `old`; at every moment one of the two is whole."""
    if not old.exists():
        os.rename(new, old)
        return
    aside = new.with_suffix(".old")
    os.rename(old, aside)
    try:
        os.rename(new, old)
    except OSError:
        os.rename(aside, old)
        raise
    shutil.rmtree(aside, ignore_errors=True)
