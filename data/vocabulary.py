"""Vocabularies as model directories hold them, all of byte-level BPE.

These are tokenizer.json, Llama 3's tokenizer.model, vocab.json with merges.txt, and the built-in
wordproblems.tiktoken. Other kinds are refused by name. The files may come from a stranger. So only
patterns known here are accepted, and ids and lengths are bounded.
"""

import base64
import json
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

from data.added import FLAGS, Added
from data.bpe import BYTES, to_bytes, tokens_in_order
from data.chat import BUILTIN_SPECIAL, FAMILIES
from data.files import json_object

VOCABULARIES = (
    "wordproblems.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
NAMING = ("tokenizer_config.json", "special_tokens_map.json")  # which token is the eos_token, ...
MARKERS = {marker for family in FAMILIES.values() for marker in family.markers}

# A number is always a token of its own, the same after any word or sign, because the space before
# it belongs to these.
BUILTIN_PATTERN = (
    r"</?[a-z]+>| ?\\boxed\{| ?[A-Za-z']+(?: (?=[0-9]))?| [-+*/=] |: (?=[0-9])"
    r"|[0-9]+|\n+|\s|[^\sA-Za-z0-9]"
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern after digits have been cut out: no space joins a digit, and to (?!\S) spaces
# before a digit are at the end of the text.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}+").replace(r"(?!\S)", r"(?![^\s\p{N}])")

# Llama 3's own names. Later versions use some of the reserved ones, but moved none that a chat
# needs.
RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(251)]
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", *RESERVED[:4], "<|start_header_id|>"]
LLAMA3_SPECIAL += ["<|end_header_id|>", RESERVED[4], "<|eot_id|>", *RESERVED[5:]]

ID_LIMIT = 1 << 31  # no model's embedding has so many rows
# Of a token. Llama 3's longest is 128 spaces. Finding a token's merges takes time with the square.
MOST_CHARACTERS = 256


class Vocabulary(NamedTuple):
    pattern: str  # splits text into the pieces that merging stays within
    pieces: dict[int, bytes]  # id -> bytes
    ranked: list[int]  # the ids that encoding can give, earliest merge first
    added: dict[str, Added]
    nfc: bool = False  # whether text is normalised to NFC first


def read_vocabulary(files: dict[str, bytes]) -> Vocabulary:
    if "wordproblems.tiktoken" in files:
        return from_ranks(files, "wordproblems.tiktoken", BUILTIN_PATTERN, BUILTIN_SPECIAL)
    if "tokenizer.json" in files:
        return from_tokenizer_json(files)
    if "tokenizer.model" in files:
        return from_ranks(files, "tokenizer.model", LLAMA3_PATTERN, LLAMA3_SPECIAL)
    if "vocab.json" in files and "merges.txt" in files:
        return from_vocab_and_merges(files)
    raise ValueError(
        "no tokenizer there; it needs tokenizer.json, tokenizer.model (tiktoken's format), "
        "or vocab.json with merges.txt"
    )


def read_json(files, name: str) -> dict:
    return json_object(files.get(name, b"{}"), name)


def from_ranks(files, name, pattern, special) -> Vocabulary:
    ranks = parse_ranks(files[name], name)
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(f"{name} has no token for the byte {absent[0]:#04x}; all 256 are needed")
    check_ids(ranks.values())
    first = max(ranks.values()) + 1
    added = {token: Added(first + i) for i, token in enumerate(special)}
    pieces = {i: token for token, i in ranks.items()}
    return Vocabulary(pattern, pieces, sorted(pieces), added)


def from_tokenizer_json(files) -> Vocabulary:
    config = read_json(files, "tokenizer.json")
    model = config["model"]
    if model.get("type", "BPE") != "BPE":
        kind = short(model["type"])
        raise ValueError(f"tokenizer.json holds a {kind} model; only byte-level BPE can be read")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise ValueError(f"tokenizer.json asks for {option}, which byte-level BPE has not")
    absent = [byte for token, byte in BYTES.items() if token not in model["vocab"]]
    for option in ("unk_token", "ignore_merges"):
        if absent and model.get(option):
            raise ValueError(
                f"tokenizer.json asks for {option} but has no token for the byte {absent[0]:#04x}"
            )
    merges = []
    for merge in model["merges"]:
        merges.append(tuple(merge.split(" ") if isinstance(merge, str) else merge))
    added = added_tokens(files, config.get("added_tokens") or [], model["vocab"])
    pattern = pattern_of(config.get("pre_tokenizer"))
    nfc = asks_for_nfc(config.get("normalizer"))
    return from_bpe(pattern, model["vocab"], merges, added, nfc, model.get("ignore_merges", False))


def asks_for_nfc(normalizer) -> bool:
    """Whether a tokenizer.json's normalizer is NFC, alone or in a Sequence, rather than nothing."""
    if not normalizer:
        return False
    if normalizer["type"] == "Sequence":
        asked = [asks_for_nfc(step) for step in normalizer["normalizers"]]  # checks every step
        return any(asked)
    if normalizer["type"] != "NFC":
        kind = short(normalizer["type"])
        raise ValueError(f"tokenizer.json asks for the normalizer {kind}; only NFC can be had")
    return True


def pattern_of(pre_tokenizer) -> str:
    """The one pattern for tiktoken that splits text as all steps of a tokenizer.json do."""
    steps = [pre_tokenizer]
    if pre_tokenizer and "pretokenizers" in pre_tokenizer:
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [
            {"type": "Split", "pattern": {"Regex": known}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ] if known in (LLAMA3_PATTERN, QWEN2_PATTERN):
            # Another pattern could take for ever, or gigabytes when it is compiled.
            return known
        case [{"type": "ByteLevel", "add_prefix_space": False, **options}] if options.get(
            "use_regex", True
        ):
            return GPT2_PATTERN
        case [
            {"type": "Digits", "individual_digits": individual},
            {"type": "ByteLevel", "add_prefix_space": False, **options},
        ] if options.get("use_regex", True):
            return DIGITS_PATTERN.replace(r"\p{N}+", r"\p{N}") if individual else DIGITS_PATTERN
    raise ValueError(
        f"tokenizer.json has the pre_tokenizer {json.dumps(steps)[:200]}, a pattern that is not "
        "known; known are those of Llama 3, Qwen, GPT-2 and SmolLM2, without add_prefix_space"
    )


def from_vocab_and_merges(files) -> Vocabulary:
    vocab = read_json(files, "vocab.json")
    if "Ġ" not in vocab:  # GPT-2's spelling of the space: nothing else there says "byte-level"
        raise ValueError("vocab.json has no token Ġ, the space of byte-level BPE; no other is read")
    merges = []
    for line in files["merges.txt"].decode(errors="replace").split("\n"):
        if line.strip() and not line.startswith("#version"):
            merges.append(tuple(line.rstrip("\r").split(" ")))
    kind = read_json(files, "tokenizer_config.json").get("tokenizer_class", "")
    qwen = kind.startswith("Qwen2Tokenizer")
    pattern = QWEN2_PATTERN if qwen else GPT2_PATTERN
    return from_bpe(pattern, vocab, merges, added_tokens(files, [], vocab), nfc=qwen)


def from_bpe(pattern, vocab, merges, added, nfc=False, whole=False) -> Vocabulary:
    if any(len(token) > MOST_CHARACTERS for token in vocab):
        raise ValueError(f"the vocabulary holds a token of more than {MOST_CHARACTERS} characters")
    if not BYTES.keys() & vocab.keys():
        raise ValueError("the vocabulary has no token for any single byte, as byte-level BPE has")
    check_ids([*vocab.values(), *(token.id for token in added.values())])
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocab:
            raise ValueError(f"the merge {short(merge)} makes no token of the vocabulary")
    special = {text for text, token in added.items() if token.special}  # no text makes these
    ranked = [vocab[token] for token in tokens_in_order(vocab, merges, special, whole)]
    return Vocabulary(pattern, {i: to_bytes(t) for t, i in vocab.items()}, ranked, added, nfc)


def check_ids(ids) -> None:
    """Raises ValueError unless a model's embedding could have a row for each of the ids."""
    for i in ids:
        if type(i) is not int or not 0 <= i < ID_LIMIT:
            raise ValueError(f"the id {short(i)} is not a whole number from 0 up (and below 2^31)")


def added_tokens(files, listed: list[dict], vocab: dict) -> dict[str, Added]:
    """Text -> added token. `listed` are those of tokenizer.json.

    As in transformers, tokenizer_config.json overrides what tokenizer.json says of a token, and a
    token of the vocabulary that a file calls special (for example as eos_token) is added too.
    """
    added = {}
    for text, i in read_json(files, "added_tokens.json").items():
        added[text] = Added(i, special=False, normalized=True)
    decoder = read_json(files, "tokenizer_config.json").get("added_tokens_decoder") or {}
    for entry in [*listed, *({**token, "id": int(i)} for i, token in decoder.items())]:
        added[entry["content"]] = with_flags(entry["id"], entry)
    called = called_special(files)
    for text, entry in called.items():
        if text in vocab and text not in added:
            added[text] = with_flags(vocab[text], entry)
    for text in added.keys() & (called.keys() | MARKERS):
        added[text] = added[text]._replace(special=True)
        if text in MARKERS and added[text].single_word:  # beside a word it would be no marker
            raise ValueError(f"{text} has single_word; set single_word to false in every file")
    return added


def with_flags(i: int, entry: dict) -> Added:
    return Added(i, **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})


def called_special(files) -> dict[str, dict]:
    """Text -> entry of the tokens that files call special: as eos_token and so on, or in a list."""
    called = {}
    for name in NAMING:
        content = read_json(files, name)
        # Not all of these are tokens: add_bos_token is a bool.
        tokens = [token for key, token in content.items() if key.endswith("_token")]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens += content[key] if isinstance(content.get(key), list) else []
        for token in tokens:
            if isinstance(token, str):
                called[token] = {}
            elif isinstance(token, dict):
                called[token["content"]] = token
    return called


# tiktoken's own format: a token in base64, a space, its rank, on each line.


def parse_ranks(data: bytes, name: str) -> dict[bytes, int]:
    try:
        lines = [line.split() for line in data.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        ranks = {}
    if not ranks:
        raise ValueError(
            f"{name} is not in tiktoken's format (base64 token, space, rank on each line); "
            "a SentencePiece model cannot be read"
        )
    return ranks


def write_ranks(path, tokens: list[bytes]) -> None:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    Path(path).write_text("".join(lines))
