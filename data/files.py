"""Files that a stranger may have written.

Only those that really lie in their directory are opened, and JSON is bounded.
"""

from __future__ import annotations

import json
from pathlib import Path

# levels of brackets; Python's own limit would fail only later, where the value is written or shown
DEEPEST = 50


def regular(path) -> Path:
    """`path` itself, a file of its directory. Raises FileNotFoundError if it is no file, ValueError
    if it is a link to elsewhere.

    A link could make the program show, or copy beside the weights that it saves, a file of the
    reader's own. One layout of links is what it seems: a hub's cache keeps snapshots/REVISION/FILE
    as a link to blobs/HASH.
    """
    path = Path(path)
    if not path.is_file():  # also keeps out devices and pipes, which might never end
        raise FileNotFoundError(f"{path} is missing or is not a file")
    directory, real = path.parent.resolve(), path.resolve()
    cache = directory.parents[1] / "blobs" if directory.parent.name == "snapshots" else None
    if real.parent not in (directory, cache):
        raise ValueError(
            f"{path} is a link to {real}, outside its directory: put the file itself there"
        )
    return path


def read_json(path) -> dict:
    """The JSON object in a file. Raises FileNotFoundError or ValueError, naming the file."""
    return json_object(regular(path).read_bytes(), path)


def json_object(content: bytes, name) -> dict:
    """The JSON object that `content` is. Raises ValueError, naming the file, for all else."""
    try:
        value = parse_json(content)
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds a JSON {type(value).__name__} instead of an object")
    return value


def parse_json(text: str | bytes):
    """The value of a JSON text. ValueError: it is none, or a number or its nesting is too long."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("brackets too deep") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = []
        for container in level:
            if isinstance(container, dict):
                inner += container.values()
            elif isinstance(container, list):
                inner += container
        if not inner:
            return value
        level = inner
    raise ValueError("brackets too deep")
