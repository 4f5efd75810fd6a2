"""Byte-pair encoding: text to token ids, merged by tiktoken.

tiktoken knows no list of merges. It joins any two neighbours that together are a token, those of
the lowest rank first. So a list of merges becomes ranks here (`tokens_in_order`). And tiktoken
refuses a vocabulary that lacks a byte, so text with such bytes is split here (`Encoder`).
"""

import re
import string
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import tiktoken

# Characters given to tiktoken at a time: on a million spaces in a row it would panic.
SLICE = 100_000

# GPT-2's spelling of bytes: a printable byte is itself, the others are the characters from 256 on.
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


class Encoder:
    """Plain text to ids.

    pattern: splits text into the pieces that merging stays within. pieces: the bytes of each id.
    ranked: the ids that encoding can give, earliest merge first.
    """

    def __init__(self, pattern: str, pieces: dict[int, bytes], ranked: list[int]):
        ranks = {pieces[i]: rank for rank, i in enumerate(ranked)}
        self.pattern, self.ids = pattern, ranked
        self.missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.tiktoken = tiktoken.Encoding(
            "bpe", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str) -> list[int]:
        slices = [text[start : start + SLICE] for start in range(0, len(text), SLICE)]
        return [self.ids[rank] for part in slices for rank in self.merge(part)]

    def merge(self, text: str) -> list[int]:
        """The ranks of text. Bytes without a token are dropped first: neighbours may then merge."""
        if not self.missing:
            return self.tiktoken.encode_ordinary(text)
        # Half a surrogate pair has no bytes. tiktoken replaces it in the same way.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        if text.encode() == text.encode().translate(None, self.missing):
            return self.tiktoken.encode_ordinary(text)
        ranks = []
        for piece in split(self.pattern, text):
            if known := piece.encode().translate(None, self.missing):
                ranks += self.tiktoken._encode_single_piece(known)  # merges without splitting
        return ranks


def split(pattern: str, text: str) -> list[str]:
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


def of_kind(kind: str, characters: str) -> str:
    """The characters of a class such as \\p{L}. tiktoken leaves out what no pattern matches."""
    return bytes(bytes_of(kind).encode_ordinary(characters)).decode()


@cache
def bytes_of(pattern: str) -> tiktoken.Encoding:
    """Encodes text as the bytes of what the pattern matches."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    return tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})


def tokens_in_order(vocab, merges: list[tuple[str, str]], special: set[str], whole: bool) -> list:
    """The tokens that encoding can give, in GPT-2's spelling, in the order of their ranks.

    These are single bytes, the tokens that the merges make and, with `whole` (tokenizer.json's
    ignore_merges), any other token that is a whole piece of text. None is `special`.
    """
    made = makeable(merges)
    tokens = [token for token in BYTES if token in vocab]
    tokens += sorted(made.keys() - special, key=made.get)
    if not whole:
        return tokens
    known = set(tokens) | special
    others = [token for token in vocab if token not in known and BYTES.keys() >= set(token)]
    ranks = {token: rank for rank, token in enumerate(tokens + others)}
    for token in others:  # tiktoken takes it where it is a whole piece, and must not merge it too
        if apply_merges(token, lambda pair: ranks.get("".join(pair)))[0] == [token]:
            raise ValueError(f"no merge makes the token {token!r}, yet tiktoken would merge it")
    return tokens + others


def makeable(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> the position of the merge that makes it; without tokens that merging never makes.

    tiktoken joins any neighbours that together are a token. A list of merges joins only the pairs
    on it, and may have several pairs for one token. With these positions as ranks the two agree on
    every text. Why: if x and y become neighbours in any text, they also do in the text xy alone.
    Merging xy comes down to two parts only once, so only one pair of a token ever meets, and the
    token is here exactly if that pair is on the list.
    """
    order = {pair: position for position, pair in enumerate(merges)}
    made = {}
    for token in dict.fromkeys(left + right for left, right in merges):
        parts, position = apply_merges(token, order.get)
        if len(parts) == 1:  # not so of 588 tokens of Llama 3
            made[token] = position
    return made


def apply_merges(token: str, rank: Callable) -> tuple[list[str], int | None]:
    """BPE as it is defined: join the pair of lowest rank, leftmost first, until no pair has one.

    Returns the parts that are left, and the rank of the last pair.
    """
    parts, last = list(token), None
    while True:
        ranked = []
        for i, pair in enumerate(pairwise(parts)):
            if (r := rank(pair)) is not None:
                ranked.append((r, i))
        if not ranked:
            return parts, last
        last, i = min(ranked)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
