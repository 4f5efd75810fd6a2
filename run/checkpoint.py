"""Checkpoints: all that the next step depends on. A crash at any moment leaves a whole one behind.

    checkpoint/step-00000040/    model.safetensors  optimizer.safetensors  state.json

Random numbers (run.loop.Loop.generator) and the teacher's schedule (teacher.guidance_fraction)
follow from the seed and the step, so a checkpoint keeps nothing of them but the step's number.
Tensors are stored as safetensors, the rest as JSON. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.files import read_json, regular
from data.weights import tensor_shapes
from run.config import MAY_CHANGE, RunFailed
from run.world import full, like


def save(
    directory: Path, step: int, student, optimizer, config: dict, keep: int, is_first=True
) -> None:
    """Write the state after `step` steps, then delete all but the newest `keep` checkpoints.

    Raises OSError; the newest whole checkpoint is still there then. All processes of a run must
    call this, because each holds a part of the tensors. The first one writes.
    """
    tensors = {
        "model": in_one_piece(weights(student, optimizer), is_first),
        "optimizer": in_one_piece(moments(optimizer), is_first),
    }
    if not is_first:
        return
    directory.mkdir(parents=True, exist_ok=True)
    new = directory / "unfinished"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        write(new, step, tensors, config)
        final = directory / f"step-{step:08}"
        shutil.rmtree(final, ignore_errors=True)  # a damaged one, whose steps were done again
        os.rename(new, final)
        flush(directory)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(new, ignore_errors=True)
        last = max(directory.glob("step-*"), default="none")
        problem = f"the checkpoint of step {step} could not be written ({error})"
        raise OSError(f"{problem}; the last one is {last}: go on with --resume") from None
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def write(directory: Path, step: int, tensors: dict[str, dict], config: dict) -> None:
    """Write the three files and wait until the disk has them."""
    for name, content in tensors.items():
        save_file(content, directory / f"{name}.safetensors")
    sums = {path.name: checksum(path) for path in sorted(directory.iterdir())}
    state = {"step": step, "config_sha256": hash_of(config), "sha256": sums}
    (directory / "state.json").write_text(json.dumps(state, indent=2) + "\n")
    for path in (*directory.iterdir(), directory):
        flush(path)


def restore(directory: Path, student, optimizer, config: dict) -> int:
    """Load the newest whole checkpoint; returns its number of steps, 0 if there is no checkpoint.

    Raises RunFailed if there are checkpoints, but none that can be used.
    """
    found = sorted(directory.glob("step-*"), reverse=True)
    for path in found:
        try:
            step = verified_step(path, config)
            check_tensors(path, student, optimizer)
        except (OSError, ValueError) as error:
            print(f"{path} is damaged ({error}); going back to the one before", file=sys.stderr)
        else:
            load_tensors(path, student, optimizer)
            return step
    if found:
        raise RunFailed(f"no checkpoint in {directory} is whole: start anew with another --out")
    print(f"there is no checkpoint in {directory}: starting at the first step", file=sys.stderr)
    return 0


def verified_step(path: Path, config: dict) -> int:
    """The number of steps, after its files were compared with the checksums in state.json."""
    state = read_json(path / "state.json")
    step, sums = state.get("step"), state.get("sha256")
    if type(step) is not int or path.name != f"step-{step:08}":
        raise ValueError("its state.json is of another step")
    if state.get("config_sha256") != hash_of(config):
        raise ValueError("it belongs to another configuration")
    for name in ("model.safetensors", "optimizer.safetensors"):
        if not isinstance(sums, dict) or sums.get(name) != checksum(regular(path / name)):
            raise ValueError(f"{name} has changed since it was written")
    return step


def check_tensors(path: Path, student, optimizer) -> None:
    """Raises ValueError unless names and shapes are those of this student and of AdamW."""
    ours = weights(student, optimizer)
    expected = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    if tensor_shapes(path / "model.safetensors") != expected:
        raise ValueError("its weights are not shaped as the model's")
    expected = {}
    for i, parameter in enumerate(parameters_of(optimizer)):
        shape = tuple(parameter.shape)
        expected |= {f"{i}.step": (), f"{i}.exp_avg": shape, f"{i}.exp_avg_sq": shape}
    found = tensor_shapes(path / "optimizer.safetensors")
    if found and found != expected:  # empty until the first step with a finite gradient
        raise ValueError("its moments are not shaped as the optimizer's")


def hash_of(config: dict) -> str:
    """A hash of the settings that a resumed run must not change."""
    fixed = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def parameters_of(optimizer) -> list:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def weights(student, optimizer) -> dict:
    """The parameters by name; a float32 master copy takes the place of a bfloat16 parameter.

    A tied head is the embedding itself, and there once.
    """
    masters = {id(weight): master for weight, master in optimizer.copies}
    return {name: masters.get(id(p), p) for name, p in student.named_parameters()}


def moments(optimizer) -> dict:
    """AdamW's state as tensors, named by the number of the parameter: "0.exp_avg"."""
    named = {}
    for i, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            named[f"{i}.{key}"] = value
    return named


def in_one_piece(tensors: dict, keep: bool) -> dict:
    """The tensors on the CPU, in the process that is to `keep` them; {} in the others.

    One after the other is put together, because a GPU may not have room for all.
    """
    kept = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if keep:
            kept[name] = whole.cpu().contiguous()
    return kept


@torch.no_grad()
def load_tensors(path: Path, student, optimizer) -> None:
    stored = load_file(path / "model.safetensors")
    for name, tensor in weights(student, optimizer).items():
        tensor.copy_(like(stored[name], tensor))
    for weight, master in optimizer.copies:
        weight.copy_(master)
    parameters = parameters_of(optimizer)
    state: dict[int, dict] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        number, _, key = name.partition(".")
        i = int(number)
        if tensor.shape == parameters[i].shape:
            tensor = like(tensor, parameters[i])
        state.setdefault(i, {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until the disk has a file's content, or a directory's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
