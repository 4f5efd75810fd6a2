"""Tokens added to a vocabulary beside its merges, found in text as `tokenizers` finds them."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import tiktoken


class Added(NamedTuple):
    """An added token. Its flags have their names from tokenizer.json."""

    id: int
    special: bool = True  # text never makes it; only a chat template puts it there
    normalized: bool = False  # it is looked for in text after NFC; otherwise before
    single_word: bool = False  # it is found only where no letter, mark or digit stands beside it
    lstrip: bool = False  # the white space before it becomes part of it
    rstrip: bool = False  # and the white space after it


FLAGS = Added._fields[1:]

# White space and word characters are those of Rust, in which the library is written: Python's \s
# has four control characters more, its \w has neither marks nor joiners. tiktoken is in Rust too.
SPACES = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
WORD_CHARACTERS = tiktoken.Encoding(
    "word characters",
    pat_str=r"\w",
    mergeable_ranks={bytes([i]): i for i in range(256)},
    special_tokens={},
)


def in_a_word(character: str) -> bool:
    return bool(WORD_CHARACTERS.encode_ordinary(character))


class Finder:
    """Finds added tokens in text. `tokens` are those to look for before NFC, or those after it."""

    def __init__(self, tokens: dict[str, Added]):
        self.tokens = {text: token for text, token in tokens.items() if text}
        self.lengths = sorted({len(text) for text in self.tokens}, reverse=True)
        first = "".join(re.escape(text[0]) for text in self.tokens)
        self.first = re.compile(f"[{first}]" if first else "(?!)")  # (?!) matches nowhere

    def split(self, text: str) -> Iterator[str | int]:
        """The parts of a text, from left to right: ids of added tokens, and strs without any."""
        end = 0
        for start, found in self.occurrences(text):
            token, stop = self.tokens[found], start + len(found)
            if token.special or token.single_word and is_inside_a_word(text, start, stop):
                continue  # its letters are text, and no shorter token is looked for in them
            while token.lstrip and start > end and text[start - 1] in SPACES:
                start -= 1
            while token.rstrip and stop < len(text) and text[stop] in SPACES:
                stop += 1
            if token.lstrip and start < end:
                start = end  # the token before it took the white space that it begins with
            if start > end:
                yield text[end:start]
            if start < stop:
                yield token.id
            end = stop
        if end < len(text):
            yield text[end:]

    def occurrences(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, token) of each token in the text: the longest at its place. None overlap."""
        at = 0
        while match := self.first.search(text, at):
            at = match.start()
            heads = (text[at : at + length] for length in self.lengths)
            found = next((head for head in heads if head in self.tokens), "")
            if found:
                yield at, found
            at += len(found) or 1


def is_inside_a_word(text: str, start: int, stop: int) -> bool:
    return in_a_word(text[start - 1 : start]) or in_a_word(text[stop : stop + 1])
