"""Shared by the tests of hostile input: valid inputs of every reader, changes, and what may happen.

An input is one bytes object: an answer and a response, a text, or the files of a directory, each
after a line "=== NAME".
"""

from __future__ import annotations

import functools
import json
import math
import random
import re
import shutil
from pathlib import Path

FILE = re.compile(rb"^=== ([a-z0-9_.-]{1,60})\n", re.M)


def joined(files: dict[str, bytes]) -> bytes:
    """The files of a directory as one input."""
    data = b""
    for name, content in files.items():
        data += b"=== " + name.encode() + b"\n" + content + b"\n"
    return data


def parted(data: bytes) -> dict[str, bytes]:
    _, *parts = FILE.split(data)
    return {
        name.decode(): content.removesuffix(b"\n") for name, content in zip(parts[::2], parts[1::2])
    }


def written(data: bytes, directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in parted(data).items():
        if name.strip("."):
            (directory / name).write_bytes(content)
    return directory


# Spoiling a valid input: one value of one JSON text in it becomes another.

NUMBERS = (-1, 0, 1, 2, 3, 2**31, 10**12, 10**400, 0.5, 1e308, -0.0, math.inf, math.nan)
TEXTS = ("", "x", "1", "\ud800", "\n", "../x", "/etc/passwd", "<|im_end|>", "</script>", "9" * 5000)
DEEP = functools.reduce(lambda inner, _: [inner], range(60), 0)  # 60 lists inside each other
CONTAINERS = ([], {}, [[]], [1, "x"], {"a": 1}, {"": None}, DEEP)
VALUES = (None, True, False, *NUMBERS, *TEXTS, *CONTAINERS)


def spoil(data: bytes, rng: random.Random) -> bytes:
    """`data` with one change in one of its JSON texts; unchanged if it has none."""
    files = parted(data)
    name = rng.choice(sorted(files)) if files else None
    content = files[name] if files else data
    lines = content.split(b"\n")
    i = rng.randrange(len(lines))
    if name and name.endswith(".safetensors"):
        content = spoil_header(content, rng)
    elif (whole := spoil_json(content, rng)) is not None:
        content = whole
    elif (line := spoil_json(lines[i], rng)) is not None:
        content = b"\n".join([*lines[:i], line, *lines[i + 1 :]])
    return joined(files | {name: content}) if files else content


def spoil_header(content: bytes, rng) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = spoil_json(content[8 : 8 + size], rng) or b"{}"
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def spoil_json(text: bytes, rng) -> bytes | None:
    try:
        root = {"": json.loads(text)}
    except (ValueError, RecursionError):
        return None
    places, containers = [], [root]
    while containers:
        container = containers.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        places += [(container, key) for key in keys]
        values = [container[key] for key in keys]
        containers += [value for value in values if isinstance(value, (dict, list))]
    container, key = rng.choice(places)
    match rng.randrange(4):
        case 0 if container is not root:
            del container[key]
        case 1:
            other, its_key = rng.choice(places)
            container[key] = json.loads(json.dumps(other[its_key]))
        case 2 if isinstance(container, dict) and container is not root:
            container[rng.choice((key + "x", "x", "\ud800", key.swapcase()))] = container.pop(key)
        case _:
            container[key] = rng.choice(VALUES)
    return json.dumps(root.get("")).encode()


# The readers. Each takes an input and an empty directory; an error that escapes is a finding.


def reward(data, directory):
    from data.reward import answers, equal, final_answer, is_correct

    answer, _, text = data.decode(errors="replace").partition("\0")
    last = final_answer(text)
    assert last is None or equal(last, last) and answers(text)[-1] == last
    assert is_correct(text, answer) == (last is not None and equal(last, answer)) and equal(
        text, answer
    ) == equal(answer, text)


def feedback(data, directory):
    from teacher import parse_feedback

    text = data.decode(errors="replace")
    found = parse_feedback(text)
    if found is not None:
        assert all(text.count(f"<{tag}>") == text.count(f"</{tag}>") == 1 for tag in found._fields)
        assert all(
            part in text and not re.search("</?(opinion|reason|phrase)>", part) for part in found
        )


def problems(data, directory):
    from data import load_problems

    for path in sorted(written(data, directory).glob("*.json*")):
        for problem in refusing(load_problems, path) or ():
            assert problem.question.strip() and problem.answer.strip()


def tokenizer(data, directory):
    from data.tokenizer import Tokenizer

    loaded = refusing(Tokenizer.load, written(data, directory))
    if loaded:
        # Text loses the bytes that a vocabulary has no token for, and nothing else.
        kept = b"ab c".translate(None, loaded._bpe.missing).decode()
        assert loaded.decode(loaded.encode("ab c")) == kept
        text = "It's 12 \ud83d\ude00<|im_end|>\n\n x\u00e9\0"
        prompt = loaded.render([{"role": "user", "content": text}])
        for ids in (loaded.encode(text), prompt, loaded.stop):
            assert all(type(i) is int and 0 <= i < 1 << 31 for i in ids)


def model(data, directory):
    import torch

    from model import LM
    from run.config import Config
    from show.plan import Sizes, memory

    path = written(data, directory)
    sizes = refusing(Sizes.read, path, None, torch.float32)
    if sizes:
        assert sum(memory(Config(), sizes).values()) > 0
        loaded = refusing(LM.load, path)
        if loaded:
            with torch.no_grad():
                assert loaded(torch.zeros(1, 2, dtype=torch.int64)).shape == (
                    1,
                    2,
                    loaded.config.vocab_size,
                )
            assert sum(p.numel() for p in loaded.parameters()) * 4 <= 8 * sum(
                f.stat().st_size for f in path.iterdir()
            )
            loaded.save(directory / "again")


def report(data, directory):
    from show.read_runs import read_runs
    from show.report import page

    read = refusing(read_runs, [written(data, directory)])
    made = read and refusing(page, *read)
    if made:
        assert (
            made.startswith("<!DOCTYPE html>")
            and len(made) < 1_000_000 + 9 * len(data)
            and "<script" not in made.lower()
        )


def checkpoint(data, directory):
    """The run directory of a tiny model. Half of the inputs get checksums that match the files."""
    import torch

    from run.checkpoint import checksum, hash_of
    from run.config import RunFailed
    from run.record import Run

    path = written(data, directory / "run")
    step = path / "checkpoint" / "step-00000001"
    step.mkdir(parents=True)
    for name in ("state.json", "model.safetensors", "optimizer.safetensors"):
        if (path / name).exists():
            (path / name).rename(step / name)
    if b'"forged"' in data and (step / "state.json").exists():
        sums = {
            name: checksum(step / name)
            for name in ("model.safetensors", "optimizer.safetensors")
            if (step / name).exists()
        }
        forged = (step / "state.json").read_bytes().replace(b'"forged"', json.dumps(sums).encode())
        (step / "state.json").write_bytes(forged.replace(b"CONFIG", hash_of(SETTINGS).encode()))
    student, optimizer = trained()
    (path / "config.json").write_text(json.dumps(SETTINGS))
    try:
        run = Run(path, SETTINGS, "x", resume=True)
        done, history = run.restore(student, optimizer)
        run.close()
    except (ValueError, OSError, RunFailed):
        return
    assert done in (0, 1) and len(history) <= 1
    student(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()


SETTINGS = {"seed": 0, "keep": 1}


def trained(steps=1):
    """A tiny student and its optimizer after a step."""
    import torch

    from grpo import MasterAdamW
    from model import LM, ModelConfig

    torch.manual_seed(0)
    student = LM(ModelConfig(8, 4, 1, 1, 1, 4, 4))
    optimizer = MasterAdamW(student.parameters(), lr=1e-3)
    for _ in range(steps):
        student(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return student, optimizer


def refusing(read, *args):
    """What `read` returns; None if it raises an error that the user sees as one sentence."""
    try:
        return read(*args)
    except (ValueError, OSError) as error:
        assert str(error) and not isinstance(error, UnicodeError), repr(error)


# Valid inputs, from which mutations start.


def reward_seeds():
    texts = (
        r"So \boxed{1} no, \boxed{\frac{1}{2}}",
        r"\boxed{-\$1,234.50 \text{ dollars}}",
        r"\boxed{x \in [-2,\infty)}",
        r"\boxed{\begin{bmatrix} 1 \\ 2 \end{bmatrix}} \boxed{50\%",
        r"\boxed{2\sqrt{5}\cdot 10,\! 080^{\circ}}",
        r"\boxed{(B)}.",
        r"\boxed{} \fbox 8, \boxed {\{\sqrt[3] x, 1\frac ab, \bf 5 \text{ km/h}\}}",
    )
    answers = ("1/2", "-1234.5", "[-2,∞)", "0.5", "7 cm", "B", "8 Hours")
    return [answer.encode() + b"\0" + text.encode() for text, answer in zip(texts, answers)]


def feedback_seeds():
    text = "<opinion>correct</opinion>\n<reason>Yes.</reason>\n<phrase>So \\boxed{7}.</phrase>"
    return [
        text.encode(),
        text.replace("Yes", "<phrase>Yes</phrase>").encode(),
        text.replace("correct", "incorrect").encode(),
    ]


def problem_seeds():
    entries = [
        {"question": "a", "answer": "1"},
        {"problem": "b", "answer": 1234.5},
        {"question": "c", "answer": "x\n#### 7"},
    ]
    lines = "\n".join(map(json.dumps, entries)).encode()
    files = (
        {"a.jsonl": lines},
        {"a.json": json.dumps(entries).encode()},
        {"a.json": b"\xef\xbb\xbf" + lines},
    )
    return list(map(joined, files))


MERGES = [["a", "b"], ["Ġ", "c"], ["ab", "Ġc"], ["ab", "ab"]]
MADE = {"ab": 256, "Ġc": 257, "abĠc": 258, "abab": 259}


def tokenizer_seeds():
    import base64

    from data.chat import FAMILIES
    from data.vocabulary import LLAMA3_PATTERN, QWEN2_PATTERN

    seeds = [tokenizer_files("llama3", LLAMA3_PATTERN), tokenizer_files("chatml", QWEN2_PATTERN)]
    ids = {str(262 + i): {"content": token} for i, token in enumerate(FAMILIES["chatml"].markers)}
    seeds.append(
        {
            "vocab.json": json.dumps(made_of_bytes()).encode(),
            "merges.txt": b"#version\n" + "\n".join(map(" ".join, MERGES)).encode(),
            "tokenizer_config.json": json.dumps({"added_tokens_decoder": ids}).encode(),
        }
    )
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    seeds += [{"tokenizer.model": ranks}, {"wordproblems.tiktoken": ranks + b"YWI= 256\n"}]
    return [joined(files) for files in seeds]


def made_of_bytes() -> dict[str, int]:
    from data.bpe import BYTES

    return BYTES | MADE


def tokenizer_files(family: str, pattern: str) -> dict[str, bytes]:
    """A tokenizer.json of a chat family, and what stands beside it."""
    from data.chat import FAMILIES

    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    model = {"type": "BPE", "vocab": made_of_bytes(), "merges": MERGES}
    special = [*FAMILIES[family].markers, "<think>", "</think>"]
    content = {
        "normalizer": {"type": "NFC"} if family == "chatml" else None,
        "added_tokens": [{"id": 260 + i, "content": token} for i, token in enumerate(special)],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, byte_level],
        },
        "model": model | {"ignore_merges": family == "llama3"},
    }
    template = "{%- if enable_thinking %}'<|im_start|>system\\nYou are.<|im_end|>' "
    template += "<|eot_id|>Cutting Knowledge Date"
    config = {
        "eos_token": {"content": FAMILIES[family].end},
        "chat_template": [{"name": "default", "template": template}],
    }
    files = {
        "tokenizer_config.json": json.dumps(config).encode(),
        "generation_config.json": b'{"eos_token_id": [260, 261]}',
        "tokenizer.json": json.dumps(content).encode(),
    }
    if family == "chatml":
        files["chat_template.jinja"] = template.encode()
    return files


def model_seeds():
    import tempfile

    import torch

    from data import weights
    from model import LM, ModelConfig

    torch.manual_seed(0)
    rope = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    seeds = []
    for changes in (
        {"rope_scaling": rope},
        {"qkv_bias": True, "tie_embeddings": True},
        {"qk_norm": True},
    ):
        made = LM(ModelConfig(8, 4, 2, 2, 1, 2, 4, **changes))
        with tempfile.TemporaryDirectory() as home:
            weights.write_directory(
                f"{home}/m",
                weights.config_to_json(made.config),
                made.disk_tensors(),
                {"tokenizer.json": b"{}"},
                shard_bytes=400 if made.config.qk_norm else 10**6,
            )
            seeds.append(
                joined({p.name: p.read_bytes() for p in sorted(Path(home, "m").iterdir())})
            )
    return seeds


STEP = {  # of metrics.jsonl
    "reward": 0.5,
    "reflection_rate": 0.1,
    "eval_accuracy": 0.4,
    "eval_accuracy_se": 0.1,
    "eval_reflection_rate": 0.2,
    "teacher_asked": 4,
    "teacher_parsed": 3,
    "guided": 2,
    "guided_reward": 1,
    "guided_original_reward": 0,
    "guided_share_of_rollouts": 0.1,
    "behaviours": {"self-critique": 2},
    "entropy": 0.2,
    "tokens_per_second": 50.0,
    "w_guided": 0.9,
    "pi_guided": 0.1,
}
TRANSCRIPT = {
    "question": "q",
    "answer": "4",
    "student": r"\boxed{3}",
    "attempt_right": False,
    "opinion": "incorrect",
    "reason": "r",
    "phrase": "p",
    "guidance": "\n\nr\n\np",
    "guidance_tokens": [["\n\nr", 0.4, 0.01], ["\n\np", None, 0.9]],
    "reward": 1.0,
    "advantage": 1.5,
}


def report_seeds():
    metrics = []
    for step in range(4):
        changing = {"step": step, "sampled_accuracy": step / 4, "fraction": 0.1 * (step < 2)}
        metrics.append(json.dumps(changing | STEP))
    lines = [json.dumps({"step": step} | TRANSCRIPT) for step in (0, 1, 3)]
    base = {"accuracy": 0.3, "accuracy_se": 0.02, "reflection_rate": 0.1, "wrong_to_right": 3}
    config = {"method": "thinktuning", "seed": 0, "steps": 4, "samples": 3, "learning_rate": 1e-4}
    files = {
        "config.json": json.dumps(config).encode(),
        "metrics.jsonl": "\n".join(metrics).encode(),
        "transcripts.jsonl": "\n".join(lines).encode(),
    }
    summary = json.dumps({"base": base, "grpo": {"accuracy": 0.9}}).encode()
    return [joined(files), joined(files | {"summary.json": summary})]


def checkpoint_seeds():
    import tempfile

    from run.checkpoint import save

    metrics = b'{"step": 0, "skipped": 0, "teacher_asked": 1, "teacher_parsed": 1}\n'
    with tempfile.TemporaryDirectory() as home:
        save(Path(home), 1, *trained(), SETTINGS, keep=1)
        files = {p.name: p.read_bytes() for p in sorted(Path(home, "step-00000001").iterdir())}
    forged = {**json.loads(files["state.json"]), "sha256": "forged", "config_sha256": "CONFIG"}
    return [
        joined({**files, "metrics.jsonl": metrics, "transcripts.jsonl": b'{"step": 0}\n'}),
        joined({**files, "state.json": json.dumps(forged).encode(), "metrics.jsonl": metrics}),
    ]


READERS = {  # name: (reader, its valid inputs, runs in the fuzz tests)
    "reward": (reward, reward_seeds, 10_000),
    "feedback": (feedback, feedback_seeds, 50_000),
    "problems": (problems, problem_seeds, 3_000),
    "tokenizer": (tokenizer, tokenizer_seeds, 2_000),
    "model": (model, model_seeds, 2_500),
    "report": (report, report_seeds, 1_000),
    "checkpoint": (checkpoint, checkpoint_seeds, 250),
}
