"""Text of any size for benchmarks, made of the shipped one."""

import re
from pathlib import Path

import numpy as np

from distilcb.config import DEFAULT_RECIPE

MINI = DEFAULT_RECIPE.parent / "mini"


def write_text(path: Path, size: int) -> Path:
    """The shipped text repeated to `size` bytes, each time with another word at the end of each line."""
    lines = [
        line
        for source in sorted((MINI / "text" / "train").glob("*.txt"))
        for line in source.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    words = re.findall(r"\w{4,}", " ".join(lines))
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as stream:
        while stream.tell() < size:
            extra = generator.integers(len(words), size=len(lines))
            stream.writelines(f"{line} {words[place]}\n" for line, place in zip(lines, extra, strict=True))
    return path
