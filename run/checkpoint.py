"""Checkpoints: everything the next step depends on, written so that a crash at any moment leaves a whole one behind.

    checkpoint/step-00000040/    model.safetensors  optimizer.safetensors  state.json

The random streams of a step and the teacher's schedule are functions of the seed and the step (thinktuning.seeds_of_step,
teacher.guidance_fraction), so the step's number is all there is to keep of them. Tensors are safetensors and the rest
is JSON: nothing is unpickled.
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
    """Write the state after `step` steps beside the older ones; only then do those beyond the newest `keep` go.

    Raises OSError. Whatever happens, the newest whole checkpoint of before is still there. Of several processes all take
    part, and the first writes.
    """
    tensors = {
        name: in_one_piece(named(student, optimizer), is_first)
        for name, named in (("model", weights), ("optimizer", moments))
    }
    if not is_first:
        return
    directory.mkdir(parents=True, exist_ok=True)
    final, new = place(directory, step), directory / "unfinished"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    try:
        for name, content in tensors.items():
            save_file(content, new / f"{name}.safetensors")
        sums = {path.name: checksum(path) for path in sorted(new.iterdir())}
        state = {"step": step, "config_sha256": hash_of(config), "sha256": sums}
        (new / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in (*new.iterdir(), new):
            flush(path)
        shutil.rmtree(final, ignore_errors=True)  # one that was found damaged, and is made again
        os.rename(new, final)
        flush(directory)
    except (SafetensorError, OSError) as error:
        shutil.rmtree(new, ignore_errors=True)
        last = max(directory.glob("step-*"), default="none")
        raise OSError(
            f"the checkpoint of step {step} could not be written ({error}); the last one is {last}: "
            "mend that and go on with --resume"
        ) from None
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def restore(directory: Path, student, optimizer, config: dict) -> int:
    """Load the newest whole checkpoint into both; returns its number of steps, 0 where there is none.

    Raises RunFailed where none of those there can be used.
    """
    found = sorted(directory.glob("step-*"), reverse=True)
    for path in found:
        try:
            step = verified_step(path, config)
            check_tensors(path, student, optimizer)
        except (OSError, ValueError) as error:
            print(f"{path} is damaged ({error}); going back to the one before", file=sys.stderr)
            continue
        load_tensors(path, student, optimizer)
        return step
    if found:
        raise RunFailed(f"no checkpoint in {directory} is whole: start anew with another --out")
    print(f"there is no checkpoint in {directory}: starting at the first step", file=sys.stderr)
    return 0


def verified_step(path: Path, config: dict) -> int:
    """The number of steps of a checkpoint whose files are what its state.json says they are."""
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
    """Raises ValueError unless the tensors are those of this student and of AdamW, by name and shape."""
    if tensor_shapes(path / "model.safetensors") != {
        n: tuple(t.shape) for n, t in weights(student, optimizer).items()
    }:
        raise ValueError("its weights are not shaped as the model's")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        f"{i}.{key}": shape
        for i, p in enumerate(parameters)
        for key, shape in (
            ("step", ()),
            ("exp_avg", tuple(p.shape)),
            ("exp_avg_sq", tuple(p.shape)),
        )
    }
    found = tensor_shapes(path / "optimizer.safetensors")
    if found and found != state:  # empty until the first step with a finite gradient
        raise ValueError("its moments are not shaped as the optimiser's")


def hash_of(config: dict) -> str:
    """Of all that makes the steps what they are."""
    fixed = {key: value for key, value in config.items() if key not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def weights(student, optimizer) -> dict:
    """The parameters by name, each as the optimiser steps on it: its float32 master copy if it has one."""
    masters = {id(weight): master for weight, master in optimizer.copies}
    return {
        name: masters.get(id(p), p) for name, p in student.named_parameters()
    }  # a tied head is there once


def moments(_, optimizer) -> dict:
    """AdamW's state by the number of the parameter."""
    return {
        f"{i}.{key}": value
        for i, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def in_one_piece(tensors: dict, keep: bool) -> dict:
    pieces = (
        (name, full(t.detach())) for name, t in tensors.items()
    )  # one after the other: a GPU may not have room for all
    return {name: t.cpu().contiguous() for name, t in pieces if keep}


@torch.no_grad()
def load_tensors(path: Path, student, optimizer) -> None:
    stored = load_file(path / "model.safetensors")
    for name, tensor in weights(student, optimizer).items():
        tensor.copy_(like(stored[name], tensor))
    for weight, master in optimizer.copies:
        weight.copy_(master)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict] = {}
    for name, tensor in load_file(path / "optimizer.safetensors").items():
        i, _, key = name.partition(".")
        parameter = parameters[int(i)]
        state.setdefault(int(i), {})[key] = (
            like(tensor, parameter) if tensor.shape == parameter.shape else tensor
        )
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def place(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08}"


def checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """To the disk itself: a file's content, or a directory's list of files."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
