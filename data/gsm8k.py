"""GSM8K from its authors' repository: fetched once, its checksum compared at every use.

python -m data.gsm8k        fetch both files now, and print where they are
"""

import hashlib
import http.client
import os
import sys
import urllib.request
from pathlib import Path

from data import Problem, read_problems

BASE_URL = (
    "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
)
SHA256 = {
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",  # 7,473 problems
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",  # 1,319 problems
}
MAX_BYTES = 8 << 20  # twice the larger file
TIMEOUT = 30  # seconds without an answer


def load(split: str, base_url: str = BASE_URL) -> list[Problem]:
    path = cache_directory() / f"{split}.jsonl"
    if not path.exists():
        _write(path, _fetch(f"{base_url}/{split}.jsonl", SHA256[split], path))
    elif _sha256(path.read_bytes()) != SHA256[split]:
        raise ValueError(
            f"{path} is not GSM8K's {split} file (its SHA-256 differs): delete it and start again"
        )
    return read_problems(path)


def cache_directory() -> Path:
    home = os.environ.get("THINKTUNING_DATA") or Path.home() / ".cache" / "thinktuning"
    return Path(home) / "gsm8k"


def _fetch(url: str, sha256: str, path: Path) -> bytes:
    """The content of `url`, checked before anything is written."""
    by_hand = f"fetch it by any other means and put it at {path}"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            content = response.read(MAX_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:  # no network, no such page, cut off
        raise ConnectionError(
            f"could not fetch {url} ({error}): try again with a network, or {by_hand}"
        ) from None
    if _sha256(content) != sha256:
        raise ValueError(
            f"{url} gave {len(content):,} bytes with the wrong SHA-256 (cut off, or another file), "
            f"and nothing was kept: try again, or {by_hand}"
        )
    return content


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(
        f"{path.name}.{os.getpid()}.tmp"
    )  # the process's own: two may fetch at once
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    for split in SHA256:
        try:
            problems = load(split)
        except (OSError, ValueError) as error:
            sys.exit(str(error))
        print(f"{cache_directory() / split}.jsonl: {len(problems):,} problems")


if __name__ == "__main__":
    main()
