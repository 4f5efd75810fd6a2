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

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.files import read_json, regular

A_MODEL_DIRECTORY = "a model directory holds config.json, model.safetensors and a tokenizer"
WRITTEN = ("config.json", "model.safetensors.index.json")  # by LM.save itself
LLAMA3_ROPE = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
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
MODEL_TYPES = {
    name.removesuffix("ForCausalLM").lower(): name for name in ARCHITECTURES
}  # "llama", ...


def read_config(directory) -> tuple[dict, dict]:
    """(ModelConfig's fields, the raw JSON) of a config.json, in its older or newer spelling.

    Raises ValueError for what LM cannot do, and for sizes that differ from the tensors beside it.
    """
    path = Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: {A_MODEL_DIRECTORY}")
    raw = read_json(path)
    try:
        fields = config_fields(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    check_sizes(Path(directory), fields)
    return fields, raw


def config_fields(raw: dict) -> dict:
    """ModelConfig's fields from a config.json's content. Raises ValueError for what is wrong."""
    architecture = architecture_of(raw)
    for key in ("quantization_config", "attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(f"{key} = {short(raw[key])} is not supported")
    accepted = {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (1.0,)}  # silu is swish
    for key, known in accepted.items():
        if raw.get(key, known[0]) not in known:
            raise ValueError(f"{key} {short(raw[key])} is not supported, only {known[0]!r}")
    refuse_sliding(raw)
    tied = raw.get("tie_word_embeddings") or False
    if tied is not True and tied is not False:
        raise ValueError(f"tie_word_embeddings = {short(tied)} must be true or false")
    sizes, eps = model_sizes(raw), raw.get("rms_norm_eps", 1e-6)
    theta, scaling = rotation(raw)
    check_positive("rms_norm_eps", eps)
    check_positive("rope_theta", theta)
    if scaling:
        for name, value in scaling.items():
            if name in LLAMA3_ROPE:
                check_positive(name, value)
        if scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
            raise ValueError("low_freq_factor must be below high_freq_factor")
    return {
        **sizes,
        "norm_eps": eps,
        "rope_theta": float(theta),
        "rope_scaling": scaling,
        "tie_embeddings": tied,
        **ARCHITECTURES[architecture],
    }


def check_positive(name: str, value) -> None:
    if type(value) not in (int, float) or not 0 < value < 1e30:
        raise ValueError(f"{name} = {short(value)} must be a number above 0")


def architecture_of(raw: dict) -> str:
    """One of ARCHITECTURES: the first of "architectures", or else that of "model_type"."""
    named, kind = raw.get("architectures"), raw.get("model_type")
    architecture = named[0] if isinstance(named, list) and named else named
    if not architecture and isinstance(kind, str):
        architecture = MODEL_TYPES.get(kind, kind)
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {short(architecture)} is not supported; "
            f"known are {', '.join(ARCHITECTURES)}"
        )
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
            raise ValueError(
                f"use_sliding_window is set and layers from {short(first)} on slide, "
                "which is not supported"
            )


def rotation(raw: dict) -> tuple:
    """(rope_theta, Llama 3's scaling or None), as config.json has them."""
    rope = {"rope_theta": raw.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):  # the older spelling, the newer one
        if not isinstance(raw.get(key) or {}, dict):
            raise ValueError(f"{key} = {short(raw[key])} is no JSON object")
        rope |= raw.get(key) or {}
    theta, kind = rope.pop("rope_theta"), rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope type {short(kind)} is not supported, only 'default' and 'llama3'")
    if kind == "llama3" and (missing := LLAMA3_ROPE - rope.keys()):
        raise ValueError(f"its llama3 rope scaling lacks {', '.join(sorted(missing))}")
    return theta, rope if kind == "llama3" else None


def model_sizes(raw: dict) -> dict[str, int]:
    try:
        heads = raw["num_attention_heads"]
        sizes = {
            "vocab_size": raw["vocab_size"],
            "dim": raw["hidden_size"],
            "n_layers": raw["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "ffn_dim": raw["intermediate_size"],
            "max_seq_len": raw.get("max_position_embeddings", 2048),
        }
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} is missing") from None
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"a size is not a number or is zero ({error})") from None
    bad = [name for name, size in sizes.items() if type(size) is not int or not 0 < size < 1 << 31]
    if bad:
        raise ValueError(f"{', '.join(bad)} must be whole numbers from 1 up (and below 2^31)")
    if sizes["head_dim"] % 2:
        raise ValueError(f"head_dim {sizes['head_dim']} is odd; rotary embeddings turn pairs")
    if heads % sizes["n_kv_heads"]:
        raise ValueError(
            f"{heads} query heads cannot share {sizes['n_kv_heads']} key/value heads evenly"
        )
    return sizes


def check_sizes(directory: Path, fields: dict) -> None:
    """Raises ValueError unless the sizes in config.json are those of the tensors.

    So no model larger than its files is ever allocated. This compares one tensor of each size, and
    every layer with the first; read_tensors compares all names and shapes later.
    """
    shapes: dict[str, tuple] = {}
    places = tensor_places(directory)
    for file in sorted(set(places.values())):
        for name, shape in tensor_shapes(file).items():
            if name in places:
                shapes[name] = shape
    layers = layers_of(shapes)
    if len(layers) != fields["n_layers"]:
        last = max(filter(LAYER.fullmatch, shapes), default="none")
        raise ValueError(
            f"{directory}: config.json asks for {fields['n_layers']} layers, there are tensors of "
            f"{len(layers)} (such as {last})"
        )
    rows_of = {
        embedding_name(shapes, fields["tie_embeddings"]): fields["vocab_size"],
        "model.layers.0.self_attn.q_proj.weight": fields["n_heads"] * fields["head_dim"],
        "model.layers.0.self_attn.k_proj.weight": fields["n_kv_heads"] * fields["head_dim"],
        "model.layers.0.mlp.gate_proj.weight": fields["ffn_dim"],
    }
    for name, rows in rows_of.items():
        expected = (rows, fields["dim"])
        if name not in shapes:
            raise ValueError(f"{directory} lacks tensors for its config.json: {name}")
        if shapes[name] != expected:
            raise ValueError(
                f"{directory}: {name} has shape {shapes[name]}, config.json asks for {expected}"
            )
    for i, layer in layers.items():
        if other := layer.items() ^ layers["0"].items():
            raise ValueError(
                f"{directory}: model.layers.{i} and model.layers.0 differ in the tensor or shape "
                f"of {min(other)[0]}"
            )


def layers_of(shapes: dict[str, tuple]) -> dict[str, dict[str, tuple]]:
    """The number of a layer -> the shapes of its tensors by name."""
    layers: dict[str, dict] = {}
    for name, shape in shapes.items():
        if match := LAYER.fullmatch(name):
            layers.setdefault(match[1], {})[match[2]] = shape
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
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.ffn_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling and {"rope_type": "llama3", **config.rope_scaling},
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }


def read_tensors(directory, wanted: dict, tied: bool) -> None:
    """Copy a directory's tensors into those in `wanted`; names and shapes must match exactly.

    A tied model's matrix may be there as the embedding, as the head, or as both if they are equal.
    Tensors are read one at a time, so memory holds the model and at most one more tensor.
    """
    directory = Path(directory)
    places = tensor_places(directory)
    embedding = embedding_name(places, tied)
    wanted = {embedding if name == EMBEDDING else name: tensor for name, tensor in wanted.items()}
    # Some exporters write the tied head as well.
    twice = tied and embedding == EMBEDDING and HEAD in places
    present = places.keys() - ({HEAD} if twice else set())
    refuse_names(directory, "lacks", wanted.keys() - present)
    refuse_names(directory, "has unknown", present - wanted.keys())
    for name, tensor in wanted.items():
        with opened(places[name]) as file:
            shape, expected = tuple(file.get_slice(name).get_shape()), tuple(tensor.shape)
            if shape != expected:
                raise ValueError(
                    f"{places[name]}: {name} has shape {shape}, config.json asks for {expected}"
                )
            tensor.detach().copy_(file.get_tensor(name))
    if twice:
        with opened(places[HEAD]) as head, opened(places[EMBEDDING]) as embed:
            if not head.get_tensor(HEAD).equal(embed.get_tensor(EMBEDDING)):
                raise ValueError(
                    f"{directory}: {HEAD} is not {EMBEDDING}, though config.json ties them"
                )


def refuse_names(directory: Path, problem: str, names: set[str]) -> None:
    """Raises ValueError if there are any such names."""
    if names:
        shown = ", ".join(sorted(names)[:4])
        if len(names) > 4:
            shown += f" and {len(names) - 4} more"
        raise ValueError(f"{directory} {problem} tensors for its config.json: {shown}")


def tensor_places(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, without the COMPUTED tensors."""
    places = all_places(directory)
    return {name: file for name, file in places.items() if not name.endswith(COMPUTED)}


def all_places(directory: Path) -> dict[str, Path]:
    """Tensor name -> its file: model.safetensors, or one of the shards that an index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return dict.fromkeys(tensor_shapes(single), single)
    if not index.exists():
        raise FileNotFoundError(f"{single} is missing: {A_MODEL_DIRECTORY}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index} has no weight_map from tensor names to files; copy it again")
    held = {}
    for shard in sorted(set(weight_map.values())):
        path = directory / shard
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index} names the file {short(shard)}; "
                "shards are .safetensors files in the same directory"
            )
        if not path.exists():
            raise FileNotFoundError(
                f"{path} is missing, though {index.name} names it: copy the directory again"
            )
        held |= dict.fromkeys(tensor_shapes(path), path)
    for name, shard in weight_map.items():
        if held.get(name) != directory / shard:
            raise ValueError(
                f"{index} says that {name} is in {shard}, where it is not; copy the directory again"
            )
    return held


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of one file, from its header. ValueError if one is not of FLOATS."""
    with opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}
        for name, tensor in slices.items():
            dtype = tensor.get_dtype()
            if dtype not in FLOATS:  # integers would need scales, which these files do not have
                raise ValueError(
                    f"{path}: {name} is stored as {dtype}; only {', '.join(FLOATS)} can be read"
                )
        return {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}


@contextmanager
def opened(path: Path):
    try:
        with safe_open(regular(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or incomplete ({str(error)[:200]}); copy it again"
        ) from None


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
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": weight_map,
        }
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
