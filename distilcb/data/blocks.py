"""The token store: full blocks of one length in Arrow files, memory-mapped, with a description of their own.

    <folder>/description.json    format, tokenizer, counts, sources, options
    <folder>/token_counts.npy    (vocab,) int64: how often each token occurs in the blocks
    <folder>/blocks-00000.arrow  one column, input_ids: fixed-size lists of uint16, or int32 where 65,536 is too few

Any tool that reads Arrow reads it: datasets.load_dataset("arrow", data_files="<folder>/*.arrow").
"""

import errno
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distilcb.data.order import mix
from distilcb.data.tokenizer import Vocabulary
from distilcb.errors import DataError

FORMAT_VERSION = 1
DESCRIPTION = "description.json"
TOKEN_COUNTS = "token_counts.npy"
_AGAIN = "Move the folder aside or delete it, and prepare the text again."


def _advice(error: Exception) -> str:
    """What to do about a file that cannot be read: blocks are not to be deleted for a file system that is ill."""
    if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.EINVAL):
        return "Once it can be read again the same command goes on."
    return _AGAIN


@dataclass(frozen=True)
class Description:
    """What a folder of blocks holds and how it was made."""

    blocks: int
    seq_len: int
    vocab_size: int
    tokenizer: str
    tokenizer_fingerprint: str
    documents: int
    tokens: int
    dropped: dict[str, int]
    damage: dict[str, int]
    sources: list[dict[str, Any]]
    options: dict[str, Any]
    files: list[str]
    content: str
    format_version: int = FORMAT_VERSION
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write description.json into the folder."""
        text = json.dumps(asdict(self), indent=2, ensure_ascii=False)
        (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def is_prepared(folder: Path) -> bool:
    """Whether the folder holds blocks (and not raw text)."""
    return (folder / DESCRIPTION).is_file()


def read_description(folder: Path) -> Description:
    """The description of a folder of blocks.

    Raises:
        DataError: missing, unreadable, or of another format version.
    """
    try:
        facts = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        version = facts["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(f"{folder}: blocks of format {version}, this version reads {FORMAT_VERSION}. {_AGAIN}")
        return Description(**facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / DESCRIPTION} cannot be read ({error}). {_advice(error)}") from error


class BlockSource(Protocol):
    """What batches are made from."""

    token_counts: NDArray[np.int64]
    seq_len: int

    def __len__(self) -> int: ...

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, tokens) int64 token ids."""


class Blocks:
    """Prepared blocks, opened for random reading; processes share the pages of the files."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError where a file is missing or does not hold what the description says."""
        import datasets

        self.folder, self.description = folder, read_description(folder)
        self.seq_len = self.description.seq_len
        try:
            self.token_counts: NDArray[np.int64] = np.load(folder / TOKEN_COUNTS, allow_pickle=False)
            parts = [datasets.Dataset.from_file(str(folder / name)) for name in self.description.files]
        except (OSError, EOFError, ValueError) as error:
            raise DataError(f"{folder}: {error}. {_advice(error)}") from error
        self._dataset = datasets.concatenate_datasets(parts).with_format("numpy")
        if len(self._dataset) != self.description.blocks:
            raise DataError(
                f"{folder}: {len(self._dataset)} blocks on disk, {self.description.blocks} in {DESCRIPTION}. {_AGAIN}"
            )

    @property
    def content(self) -> str:
        """What tells this text from another."""
        return self.description.content

    def __len__(self) -> int:
        return self.description.blocks

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, tokens) int64 token ids."""
        return np.asarray(self._dataset[rows]["input_ids"], dtype=np.int64)


def check_fits(blocks: Blocks, *, seq_len: int, fingerprint: str, tokenizer: str) -> None:
    """Raise DataError where blocks were made for another length or with another tokenizer."""
    made = blocks.description
    if made.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"{blocks.folder} was prepared with another tokenizer ({made.tokenizer}) than {tokenizer}. "
            "Prepare the text again with the teacher's, or give the raw text as data.train."
        )
    if made.seq_len != seq_len:
        raise DataError(
            f"{blocks.folder} holds blocks of {made.seq_len} tokens, data.seq_len is {seq_len}. "
            f"Give --data.seq_len {made.seq_len}, or prepare the text again."
        )


class RandomBlocks:
    """Blocks of random words, for runs that try a machine rather than train; the same for the same row."""

    def __init__(self, vocabulary: Vocabulary, *, seq_len: int, blocks: int) -> None:
        self.vocabulary, self.seq_len, self.blocks = vocabulary, seq_len, blocks
        self.token_counts: NDArray[np.int64] = np.ones(vocabulary.size, dtype=np.int64)
        self._words = np.setdiff1d(np.arange(vocabulary.size), vocabulary.special_ids)

    def __len__(self) -> int:
        return self.blocks

    def read(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """(rows, tokens) int64 token ids."""
        places = rows[:, None] * self.seq_len + np.arange(self.seq_len, dtype=np.int64)
        bits = mix(places.astype(np.uint64))
        blocks = self._words[(bits % np.uint64(self._words.size)).astype(np.int64)]
        blocks[:, 0], blocks[:, -1] = self.vocabulary.bos_id, self.vocabulary.eos_id
        return blocks
