"""Text to token ids and back, and chat prompts, for a Hugging Face-style model directory.

tiktoken splits and merges; this file tells it how, from the tokenizer files in the directory:
tokenizer.json, Llama 3's tokenizer.model, vocab.json with merges.txt, or the built-in
wordproblems.tiktoken. All are byte-level BPE, so any text has ids and comes back from them. Other
kinds are refused by name.
Some vocabularies have no token for a few bytes (SmolLM2's for 21): text loses these bytes alone.

The ids are those of the `tokenizers` library with encode_special_tokens, which keeps special tokens
out of plain text. There are three known exceptions:
- If a file asks for NFC: text with one of 99 combining marks beside another, because that library
  has the NFC of Unicode 9, and Python 3.11 that of Unicode 14.
- Text of more than SLICE characters, because it is always split there.
- Special tokens: here no merges of text make one, and the markers of chat prompts are always
  special, whatever their flag says.

The files may come from a stranger. So only patterns known here are accepted, and ids and lengths
are bounded.
"""

import base64
import json
import re
import string
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import tiktoken

from data.added import FLAGS, SPACES, Added, Finder
from data.chat import BUILTIN_SPECIAL, FAMILIES, recognise, variant
from data.files import regular

SLICE = (
    100_000  # characters given to tiktoken at a time: on a million spaces in a row it would panic
)


class Tokenizer:
    """A vocabulary and the chat template that belongs to it; made by `load` or `builtin`."""

    def __init__(self, vocabulary: "Vocabulary", files: dict[str, bytes]):
        self._added = vocabulary.added
        self.special = {text: token.id for text, token in self._added.items()}
        published = published_template(files)
        self.family = recognise(self.special, published)
        self._variant = variant(self.family, self.special, published)
        self.stop = stop_ids(files, self.special, FAMILIES[self.family].end)
        self._files = {
            name: data for name, data in files.items() if name != "config.json"
        }  # that is the model's
        self._nfc, self._ids = vocabulary.nfc, vocabulary.ranked
        self._before_nfc = Finder(
            {text: token for text, token in self._added.items() if not token.normalized}
        )
        after_nfc: dict[str, Added] = {}
        for text, token in self._added.items():
            if token.normalized:  # the first counts of two that NFC makes the same
                after_nfc.setdefault(self._normal(text), token)
        self._after_nfc = Finder(after_nfc)
        self._pieces = vocabulary.pieces | {i: text.encode() for text, i in self.special.items()}
        self.vocab_size = max(self._pieces) + 1
        ranks = {vocabulary.pieces[i]: rank for rank, i in enumerate(vocabulary.ranked)}
        self._pattern = vocabulary.pattern
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self._encoding = tiktoken.Encoding(
            self.family, pat_str=vocabulary.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    @classmethod
    def load(cls, path) -> "Tokenizer":
        directory = Path(path)
        if not directory.is_dir():
            raise FileNotFoundError(
                f"{directory} is not a directory; give the one with the model's tokenizer files"
            )
        files = {
            name: regular(directory / name).read_bytes()
            for name in FILES
            if (directory / name).exists()
        }
        try:
            return cls(read_vocabulary(files), files)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{directory}: a tokenizer file there is not laid out as expected "
                f"({type(error).__name__}: {error}); download it again"
            ) from error

    @classmethod
    def builtin(cls) -> "Tokenizer":
        return cls.load(Path(__file__).parent)

    def save(self, path) -> None:
        """Write the files this tokenizer was loaded from, unchanged. They are kept in memory."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (directory / name).write_bytes(data)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text: "<|eot_id|>" in it is not the special token, only its letters.

        Added tokens that are not special are found in it.
        """
        ids = []
        for part in self._before_nfc.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in self._after_nfc.split(self._normal(part)):
                ids += [piece] if isinstance(piece, int) else self._merged(piece)
        return ids

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def _merged(self, text: str) -> list[int]:
        slices = (text[start : start + SLICE] for start in range(0, len(text), SLICE))
        return [self._ids[rank] for part in slices for rank in self._merge(part)]

    def _merge(self, text: str) -> list[int]:
        """The ranks of text. Bytes without a token are dropped first: neighbours may then merge."""
        if not self._missing:
            return self._encoding.encode_ordinary(text)
        # Half a surrogate pair has no bytes. tiktoken replaces it in the same way.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text.encode() == text.encode().translate(None, self._missing):
            return self._encoding.encode_ordinary(text)
        ranks = []
        for piece in split(self._pattern, text):
            if known := piece.encode().translate(None, self._missing):
                ranks += self._encoding._encode_single_piece(known)  # merges without splitting
        return ranks

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Ids beyond the vocabulary (embeddings may be padded) have no text."""
        return b"".join(self._pieces.get(i, b"") for i in ids).decode(errors="replace")

    def render(self, messages: list[dict], reply_as: str = "assistant") -> list[int]:
        """A chat prompt that ends where the turn of `reply_as` begins.

        messages: [{"role": ..., "content": ...}, ...]
        """
        speakers, template = FAMILIES[self.family].speakers, FAMILIES[self.family].template
        if reply_as not in speakers:
            raise ValueError(
                f"{self.family} models reply as {' or '.join(speakers)}, not as {reply_as!r}"
            )
        for message in messages:
            if message.get("role") not in ("system", "user", *speakers) or not isinstance(
                message.get("content"), str
            ):
                raise ValueError(
                    f"a message has a text as content and a role out of system, user, "
                    f"{', '.join(speakers)}; this one is {message}"
                )
        parts = list(template(messages, reply_as, **self._variant))
        following = [self._added[marker] for marker, _ in parts[1:]]
        ids = []
        for (marker, text), next_marker in zip(parts, [*following, None]):
            if self._added[marker].rstrip:
                text = text.lstrip(SPACES)
            if next_marker and next_marker.lstrip:
                text = text.rstrip(SPACES)
            ids += [self.special[marker], *self.encode(text)]
        return ids


def published_template(files) -> str:
    """The source of the chat template in the directory, "" without one."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode(errors="replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if template := read_json(files, name).get(
            "chat_template"
        ):  # a text, or several texts with names
            if isinstance(template, str):
                return template
            by_name = {named["name"]: named["template"] for named in template}
            return by_name["default"]
    return ""


def stop_ids(files, special, end) -> set[int]:
    """Every id that ends a turn: chat models often have several, named in different files."""
    stop = {special[end]} | eos_ids(files)
    for name in NAMING:
        eos = read_json(files, name).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos is not None and eos not in special:
            raise ValueError(
                f"{name} has the eos_token {short(eos)}, which is no token of this vocabulary; "
                "download the tokenizer files again"
            )
        stop |= {special[eos]} if eos else set()
    return stop


def eos_ids(files) -> set[int]:
    """The eos_token_id, a number or a list, of generation_config.json or else of config.json.

    Ids that no model can emit are left out, as transformers ignores them. `generate` ignores those
    that its own model cannot emit.
    """
    name = "generation_config.json" if "generation_config.json" in files else "config.json"
    eos = read_json(files, name).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if wrong := [i for i in ids if type(i) is not int]:
        raise ValueError(
            f"{name} has the eos_token_id {short(wrong[0])}; "
            "write a whole number or a list of them there"
        )
    return {i for i in ids if 0 <= i < ID_LIMIT}


# Reading a model directory.

FILES = (
    "wordproblems.tiktoken",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config.json",
)
MARKERS = {marker for family in FAMILIES.values() for marker in family.markers}
NAMING = (
    "tokenizer_config.json",
    "special_tokens_map.json",
)  # these say which token is the eos_token and so on

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
KNOWN_PATTERNS = (LLAMA3_PATTERN, QWEN2_PATTERN)  # that a Split may name
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# GPT-2's pattern after digits have been cut out: no space joins a digit, and to (?!\S) spaces
# before a digit are at the end of the text.
DIGITS_PATTERN = GPT2_PATTERN.replace(r" ?\p{N}+", r"\p{N}+").replace(r"(?!\S)", r"(?![^\s\p{N}])")

# Llama 3's own names. Later versions use some of the reserved ones, but moved none that a chat
# needs.
LLAMA3_SPECIAL = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|reserved_special_token_4|>",
    "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]


ID_LIMIT = 1 << 31  # no model's embedding has so many rows
# Of a token. Llama 3's longest is 128 spaces. Finding a token's merges takes time with the square.
MOST_CHARACTERS = 256


class Vocabulary(NamedTuple):
    pattern: str  # splits text into the pieces that merging stays within
    pieces: dict[int, bytes]  # id -> bytes
    ranked: list[int]  # the ids that encoding can give, earliest merge first
    added: dict[str, Added]
    nfc: bool = False  # whether text is normalised to NFC first


def read_vocabulary(files) -> Vocabulary:
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


def from_ranks(files, name, pattern, special) -> Vocabulary:
    ranks = parse_ranks(files[name], name)
    if absent := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise ValueError(
            f"{name} has no token for the byte {absent[0]:#04x}; "
            "in tiktoken's format all 256 bytes are needed"
        )
    first = max(checked_ids(ranks.values())) + 1
    return Vocabulary(
        pattern,
        {i: token for token, i in ranks.items()},
        sorted(ranks.values()),
        {token: Added(first + i) for i, token in enumerate(special)},
    )


def from_tokenizer_json(files) -> Vocabulary:
    config = read_json(files, "tokenizer.json")
    model = config["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(
            f"tokenizer.json holds a {short(model['type'])} model; only byte-level BPE can be read"
        )
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise ValueError(
                f"tokenizer.json asks for {option}, which byte-level BPE models do without"
            )
    absent = [byte for token, byte in BYTES.items() if token not in model["vocab"]]
    for option in ("unk_token", "ignore_merges"):
        if absent and model.get(option):
            raise ValueError(
                f"tokenizer.json asks for {option} but has no token for the byte "
                f"{absent[0]:#04x}; with {option} all 256 bytes are needed"
            )
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    added = added_tokens(files, config.get("added_tokens") or [], model["vocab"])
    return from_bpe(
        pattern_of(config.get("pre_tokenizer")),
        model["vocab"],
        merges,
        added,
        whole=model.get("ignore_merges", False),
        nfc=asks_for_nfc(config.get("normalizer")),
    )


def asks_for_nfc(normalizer) -> bool:
    """Whether a tokenizer.json's normalizer is NFC, alone or in a Sequence, rather than nothing."""
    if not normalizer:
        return False
    if normalizer["type"] == "Sequence":
        asked = [asks_for_nfc(step) for step in normalizer["normalizers"]]  # checks every step
        return any(asked)
    if normalizer["type"] != "NFC":
        raise ValueError(
            f"tokenizer.json asks for the normalizer {short(normalizer['type'])}; "
            "only NFC or none can be had"
        )
    return True


def pattern_of(pre_tokenizer) -> str:
    """The one pattern for tiktoken that splits text as all steps of a tokenizer.json do."""
    steps = [pre_tokenizer]
    if pre_tokenizer and "pretokenizers" in pre_tokenizer:
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            # Another pattern could take for ever, or gigabytes when it is compiled.
            if pattern not in KNOWN_PATTERNS:
                raise ValueError(
                    "tokenizer.json splits text by a pattern that is not known here "
                    f"({short(pattern)}); known are those of Llama 3 and of Qwen"
                )
            return pattern
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
        f"tokenizer.json has the pre_tokenizer {json.dumps(steps)[:200]}; only Split and "
        "ByteLevel, ByteLevel, or Digits and ByteLevel can be read, without add_prefix_space"
    )


def from_vocab_and_merges(files) -> Vocabulary:
    vocab, config = read_json(files, "vocab.json"), read_json(files, "tokenizer_config.json")
    if "Ġ" not in vocab:  # GPT-2's spelling of the space: nothing else there says "byte-level"
        raise ValueError(
            "vocab.json has no token Ġ, which is the space in byte-level BPE; "
            "only byte-level BPE can be read"
        )
    lines = files["merges.txt"].decode(errors="replace").split("\n")
    merges = [
        tuple(line.rstrip("\r").split(" "))
        for line in lines
        if line.strip() and not line.startswith("#version")
    ]
    added = added_tokens(files, [], vocab)
    qwen = config.get("tokenizer_class", "").startswith("Qwen2Tokenizer")
    return from_bpe(QWEN2_PATTERN if qwen else GPT2_PATTERN, vocab, merges, added, nfc=qwen)


def added_tokens(files, listed: list[dict], vocab: dict) -> dict[str, Added]:
    """Text -> added token. `listed` are those of tokenizer.json.

    As in transformers, tokenizer_config.json overrides what tokenizer.json says of a token, and a
    token of the vocabulary that a file calls special (for example as eos_token) is added too.
    """
    entries = [
        {"content": text, "id": i, "special": False, "normalized": True}
        for text, i in read_json(files, "added_tokens.json").items()
    ]
    decoder = read_json(files, "tokenizer_config.json").get("added_tokens_decoder") or {}
    entries += listed + [{**token, "id": int(i)} for i, token in decoder.items()]
    added = {entry["content"]: with_flags(entry["id"], entry) for entry in entries}
    called = called_special(files)
    for text, entry in called.items():
        if text in vocab and text not in added:
            added[text] = with_flags(vocab[text], entry)
    for text in added.keys() & (called.keys() | MARKERS):
        added[text] = added[text]._replace(special=True)
        if text in MARKERS and added[text].single_word:
            raise ValueError(
                f"{text} has single_word, so that beside a word it would be no marker; "
                "set single_word to false wherever the tokenizer files list it"
            )
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


def read_json(files, name) -> dict:
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{name} holds a JSON {type(value).__name__} instead of an object; download it again"
        )
    return value


# The pieces of a text. tiktoken keeps them to itself, and text with missing bytes needs them.


def split(pattern, text) -> list[str]:
    """The pieces that tiktoken splits text into, by one of the patterns for a tokenizer.json.

    Python's `re` has no \\p{L} and \\p{N}. So it splits a copy of the text, in which one character
    stands for all letters, one for all numbers, one for all spaces, and one for everything else.
    Those that a pattern names stand for themselves.
    """
    characters = "".join(set(text))
    copied = dict.fromkeys(characters, "!")
    for kind, stand_in in ((r"\p{L}", "é"), (r"\p{N}", "#"), (r"\s", "\t")):
        copied |= dict.fromkeys(of_kind(kind, characters), stand_in)
    copied |= {named: named for named in string.ascii_letters + "' \r\n"}
    copied["ſ"] = "ſ"  # a small s, too, where a pattern ignores case
    copy = "".join(copied[character] for character in text)
    pieces = re.finditer(pattern.replace(r"\p{L}", r"\w").replace(r"\p{N}", "#"), copy)
    return [text[piece.start() : piece.end()] for piece in pieces]


def of_kind(kind, characters) -> str:
    """The characters of a class such as \\p{L}. tiktoken leaves out what no pattern matches."""
    return bytes(bytes_of(kind).encode_ordinary(characters)).decode()


@cache
def bytes_of(pattern) -> tiktoken.Encoding:
    """Encodes text as the bytes of what the pattern matches."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


# From a list of merges to tiktoken's ranks. Here a token is a str with one character per byte
# (GPT-2's BYTES): a printable byte is itself, the others are the characters from 256 on.

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES = {chr(byte): byte for byte in PRINTABLE}
BYTES |= {chr(256 + i): byte for i, byte in enumerate(OTHER_BYTES)}
TO_LATIN1 = str.maketrans(BYTES)


def to_bytes(token: str) -> bytes:
    try:
        return token.translate(TO_LATIN1).encode("latin-1")
    except UnicodeEncodeError:
        return token.encode()  # a special token, which is spelt as it reads


def from_bpe(pattern, vocab, merges, added, whole=False, nfc=False) -> Vocabulary:
    """Encoding can give single bytes and the tokens that the merges make, in the merges' order.

    With `whole` (tokenizer.json's ignore_merges) it can also give any other token that is a whole
    piece of text.
    """
    if not isinstance(vocab, dict) or any(len(token) > MOST_CHARACTERS for token in vocab):
        raise ValueError(
            f"the vocabulary is no object of tokens of up to {MOST_CHARACTERS} characters "
            "and their ids"
        )
    checked_ids([*vocab.values(), *(token.id for token in added.values())])
    special = {text for text, token in added.items() if token.special}  # no text makes these
    for merge in merges:
        if len(merge) != 2 or "".join(merge) not in vocab:
            raise ValueError(
                f"the merge {short(merge)} makes no token of the vocabulary; "
                "download the tokenizer files again"
            )
    if not BYTES.keys() & vocab.keys():
        raise ValueError(
            "the vocabulary has no token for any single byte; only byte-level BPE can be read"
        )
    made = makeable(merges)
    tokens = [token for token in BYTES if token in vocab] + sorted(
        made.keys() - special, key=made.get
    )
    if whole:
        known = set(tokens) | special
        others = [token for token in vocab if token not in known and BYTES.keys() >= set(token)]
        ranks = {token: rank for rank, token in enumerate(tokens + others)}
        # tiktoken takes such a token where it is a whole piece. Merging must not make it too.
        for token in others:
            parts, _ = apply_merges(token, lambda left, right: ranks.get(left + right))
            if len(parts) == 1:
                raise ValueError(
                    f"no merge makes the token {token!r}, yet tiktoken would; "
                    "it cannot be read exactly"
                )
        tokens += others
    return Vocabulary(
        pattern,
        {i: to_bytes(token) for token, i in vocab.items()},
        [vocab[token] for token in tokens],
        added,
        nfc,
    )


def checked_ids(ids):
    """Returns `ids`; raises ValueError unless a model's embedding could have a row for each."""
    for i in ids:
        if type(i) is not int or not 0 <= i < ID_LIMIT:
            raise ValueError(f"the id {short(i)} is not a whole number from 0 up (and below 2^31)")
    return ids


def makeable(merges) -> dict[str, int]:
    """Token -> the position of the merge that makes it; without tokens that merging never makes.

    tiktoken joins any neighbours that together are a token. A list of merges joins only the pairs
    on it, and may have several pairs for one token. With these positions as ranks the two agree on
    every text. Why: if x and y become neighbours in any text, they also do in the text xy alone.
    Merging xy comes down to two parts only once, so only one pair of a token ever meets, and the
    token is here exactly if that pair is on the list.
    """
    order = {pair: position for position, pair in enumerate(merges)}
    steps = dict.fromkeys(BYTES, (-1, "", ""))  # token -> position, left, right
    for position, (left, right) in enumerate(merges):
        is_known = left in steps and right in steps and order[left, right] == position
        if is_known and meet(left, right, steps, order):
            steps[left + right] = position, left, right
    made = {token: step[0] for token, step in steps.items() if token not in BYTES}
    # The others are made by a merge listed before those of its parts, or (588 tokens of Llama 3)
    # never.
    for token in {left + right for left, right in merges} - made.keys():
        parts, position = apply_merges(token, lambda left, right: order.get((left, right)))
        if len(parts) == 1:
            made[token] = position
    return made


def meet(left, right, steps, order) -> bool:
    """Whether two tokens side by side are finished before a merge joins parts across their border.

    Goes back in time from the finished pair. Each turn undoes the later merge at the border; then
    no merge of the two parts that touch may come earlier than the undone one.
    """
    while (undone := max(steps[left][0], steps[right][0])) >= 0:
        if steps[left][0] > steps[right][0]:
            left, limit = steps[left][2], undone
        else:
            # Equal merges go from left to right. So the right one is undone first, and the same
            # merge across the border would come before it.
            right, limit = steps[right][1], undone + 1
        if order.get((left, right), limit) < limit:
            return False
    return True


def apply_merges(token, rank) -> tuple[list[str], int | None]:
    """BPE as it is defined: join the pair of lowest rank, leftmost first, until no pair has one."""
    parts, last = list(token), None
    while True:
        ranked = []
        for i, pair in enumerate(pairwise(parts)):
            if (r := rank(*pair)) is not None:
                ranked.append((r, i))
        if not ranked:
            return parts, last
        last, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


# tiktoken's own format: a token in base64, a space, its rank, on each line.


def read_ranks(path) -> dict[bytes, int]:
    return parse_ranks(Path(path).read_bytes(), str(path))


def write_ranks(path, tokens: list[bytes]) -> None:
    Path(path).write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    )


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
