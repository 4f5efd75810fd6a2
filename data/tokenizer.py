"""Text to token ids and back, and chat prompts, for a Hugging Face-style model directory.

All vocabularies are byte-level BPE (data/vocabulary.py), so any text has ids and comes back from
them. Some have no token for a few bytes (SmolLM2's for 21): text loses these bytes alone.

The ids are those of the `tokenizers` library with encode_special_tokens, which keeps special tokens
out of plain text. There are three known exceptions:
- If a file asks for NFC: text with one of 99 combining marks beside another, because that library
  has the NFC of Unicode 9, and Python 3.11 that of Unicode 14.
- Text of more than data.bpe.SLICE characters, because it is always split there.
- Special tokens: here no merges of text make one, and the markers of chat prompts are always
  special, whatever their flag says.
"""

import unicodedata
from pathlib import Path
from reprlib import repr as short

from data.added import SPACES, Added, Finder
from data.bpe import Encoder
from data.chat import FAMILIES, recognise, variant
from data.files import regular
from data.vocabulary import ID_LIMIT, NAMING, VOCABULARIES, Vocabulary, read_json, read_vocabulary

FILES = (*VOCABULARIES, *NAMING, "generation_config.json", "config.json")
FILES += ("chat_template.jinja", "chat_template.json")


class Tokenizer:
    """A vocabulary and the chat template that belongs to it; made by `load` or `builtin`."""

    def __init__(self, vocabulary: Vocabulary, files: dict[str, bytes]):
        self._added = vocabulary.added
        self.special = {text: token.id for text, token in self._added.items()}
        published = published_template(files)
        self.family = recognise(self.special, published)
        self._variant = variant(self.family, self.special, published)
        self.stop = stop_ids(files, self.special, FAMILIES[self.family].end)
        # config.json is the model's, which writes its own.
        self._files = {name: files[name] for name in files if name != "config.json"}
        self._nfc = vocabulary.nfc
        before_nfc: dict[str, Added] = {}
        after_nfc: dict[str, Added] = {}
        for text, token in self._added.items():
            if not token.normalized:
                before_nfc[text] = token
            else:  # the first counts of two that NFC makes the same
                after_nfc.setdefault(self._normal(text), token)
        self._before_nfc, self._after_nfc = Finder(before_nfc), Finder(after_nfc)
        self._bpe = Encoder(vocabulary.pattern, vocabulary.pieces, vocabulary.ranked)
        self._pieces = vocabulary.pieces | {i: text.encode() for text, i in self.special.items()}
        self.vocab_size = max(self._pieces) + 1

    @classmethod
    def load(cls, path) -> "Tokenizer":
        directory = Path(path)
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is not a directory; give the model's")
        files = {}
        for name in FILES:
            if (directory / name).exists():
                files[name] = regular(directory / name).read_bytes()
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
                ids += [piece] if isinstance(piece, int) else self._bpe.encode(piece)
        return ids

    def _normal(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self._nfc else text

    def decode(self, ids: list[int]) -> str:
        """The text of ids. Ids beyond the vocabulary (embeddings may be padded) have no text."""
        return b"".join(self._pieces.get(i, b"") for i in ids).decode(errors="replace")

    def render(self, messages: list[dict], reply_as: str = "assistant") -> list[int]:
        """A chat prompt that ends where the turn of `reply_as` begins.

        messages: [{"role": ..., "content": ...}, ...]
        """
        speakers, template = FAMILIES[self.family].speakers, FAMILIES[self.family].template
        if reply_as not in speakers:
            known = " or ".join(speakers)
            raise ValueError(f"{self.family} models reply as {known}, not as {reply_as!r}")
        roles = ("system", "user", *speakers)
        for message in messages:
            if message.get("role") not in roles or not isinstance(message.get("content"), str):
                raise ValueError(
                    f"a message needs a text and a role of {', '.join(roles)}: {message}"
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
        template = read_json(files, name).get("chat_template")  # a text, or several with names
        if isinstance(template, str):
            return template
        if template:
            return {named["name"]: named["template"] for named in template}["default"]
    return ""


def stop_ids(files, special, end) -> set[int]:
    """Every id that ends a turn: chat models often have several, named in different files."""
    stop = {special[end]} | eos_ids(files)
    for name in NAMING:
        eos = read_json(files, name).get("eos_token")
        eos = eos["content"] if isinstance(eos, dict) else eos
        if eos is not None and eos not in special:
            raise ValueError(f"{name} has the eos_token {short(eos)}, which the vocabulary lacks")
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
    for i in ids:
        if type(i) is not int:
            raise ValueError(
                f"{name} has the eos_token_id {short(i)}; write a whole number or a list of them"
            )
    return {i for i in ids if 0 <= i < ID_LIMIT}
