"""One part of a corpus -> one Arrow file of blocks, with its figures beside it.

    <folder>/<part>.arrow   the blocks
    <folder>/<part>.npz     token_counts; documents by their length in tokens
    <folder>/<part>.json    the rest of its figures, sizes and checksums of the other two; written last

A part with a JSON whose sums are right is finished, and is not made again.
"""

import hashlib
import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from distilcb.data.corpus import read_documents
from distilcb.data.damage import Damage
from distilcb.data.parts import Part
from distilcb.data.sentence_pieces import SentencePieceEncoder, flatten
from distilcb.data.tables import OpenDataset
from distilcb.data.tokenizer import Vocabulary
from distilcb.errors import DataError, writing

# Documents tokenized in one call, so that threads have something to share; fewer of long ones.
_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 22
# Blocks in one Arrow record batch.
_BATCH_BLOCKS = 1024

ON_FULL_DISK = (
    "Free some space or name another folder; finished parts are kept, and the same command goes on from there."
)


class PlainEncoder(Protocol):
    """Text to ids, a list for each document."""

    def encode(self, documents: list[str]) -> list[list[int]]: ...


@dataclass
class PartFacts:
    """What became of a part.

    Attributes:
        documents: those with a token.
        tokens: of the text, without separators.
        text_bytes: of the cleaned documents, in UTF-8.
        pending: tokens at its end that filled no block.
        read: by the number of the source: documents and characters.
        files: size and SHA-256 of the part's files by suffix.
    """

    name: str
    blocks: int = 0
    documents: int = 0
    tokens: int = 0
    words: int = 0
    unknown: int = 0
    text_bytes: int = 0
    pending: int = 0
    dropped_blocks: int = 0
    short_documents: int = 0
    duplicate_documents: int = 0
    damage: dict[str, Any] = field(default_factory=dict)
    read: dict[int, list[int]] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class PartReader:
    """Reads the documents of a part that are long enough."""

    sources: tuple[Path | OpenDataset, ...]
    text_field: str
    min_characters: int = 0
    skip_damaged: bool = False

    def read(self, part: Part, damage: Damage, facts: PartFacts) -> Iterator[str]:
        """Cleaned documents in their order; what was read and left out is counted."""
        for span in part.spans:
            source, tally = self.sources[span.source], facts.read.setdefault(span.source, [0, 0])
            how: dict[str, Any] = {"text_field": self.text_field, "damage": damage}
            if part.chunk is not None:
                assert isinstance(source, Path)
                documents = part.chunk.read_documents(source, **how)
            else:
                documents = read_documents(source, start=span.start, end=span.end, **how)
            for document in documents:
                tally[0] += 1
                tally[1] += len(document)
                if len(document) < self.min_characters:
                    facts.short_documents += 1
                else:
                    yield document


@dataclass(frozen=True)
class PartMaker:
    """Makes a part: reads, cleans, tokenizes, packs, writes. It pickles, for processes that make several.

    twins: the name of a part -> (documents,) whether each was there before and is left out; None: all stay.
    """

    reader: PartReader
    encoder: SentencePieceEncoder | PlainEncoder
    vocabulary: Vocabulary
    seq_len: int
    folder: Path
    twins: Callable[[str], NDArray[np.bool_]] | None = None

    def __call__(self, part: Part, tick: Callable[[], None] = lambda: None) -> PartFacts:
        """The facts of the part, once its files are in the folder. `tick` is called now and then.

        Raises:
            DataError: text that cannot be read, or files that cannot be written.
        """
        return finished_part(self.folder, part.name) or self._make(part, tick)

    def _make(self, part: Part, tick: Callable[[], None]) -> PartFacts:
        facts, damage = PartFacts(part.name), Damage(skips=self.reader.skip_damaged)
        packer = _Packer(self.vocabulary, self.seq_len)
        lengths: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
        unwritten = self.folder / f"{part.name}.{uuid.uuid4().hex}"
        try:
            with _Writer(unwritten, self.vocabulary, self.seq_len) as writer:
                for batch in _batches(self._documents(part, damage, facts)):
                    ids, counts = self._encode(batch)
                    tick()
                    writer.write(packer.add(ids, counts))
                    lengths = _sum(lengths, np.bincount(counts))
                    facts.unknown += int(np.count_nonzero(ids == self.vocabulary.unk_id))
            facts.blocks, facts.documents, facts.tokens = writer.blocks, packer.documents, packer.tokens
            facts.pending, facts.dropped_blocks = packer.pending, packer.dropped_blocks
            facts.damage = asdict(damage)
            with writing(self.folder, DataError, ON_FULL_DISK):
                self._finish(facts, unwritten, token_counts=writer.token_counts, lengths=lengths)
        finally:
            with suppress(OSError):
                unwritten.unlink()
        return facts

    def _finish(self, facts: PartFacts, unwritten: Path, **arrays: NDArray[np.int64]) -> None:
        """Name the blocks that are written, and put the part's arrays and figures beside them."""
        unwritten.replace(self.folder / f"{facts.name}.arrow")
        with unwritten.open("wb") as stream:
            np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
        unwritten.replace(self.folder / f"{facts.name}.npz")
        facts.files = {suffix: _size_and_sum(self.folder / f"{facts.name}{suffix}") for suffix in _SUFFIXES}
        unwritten.write_text(json.dumps(asdict(facts)), encoding="utf-8")
        unwritten.replace(self.folder / f"{facts.name}.json")

    def _documents(self, part: Part, damage: Damage, facts: PartFacts) -> Iterator[str]:
        twins = self.twins(part.name) if self.twins else None
        for number, document in enumerate(self.reader.read(part, damage, facts)):
            if twins is not None and number >= twins.size:
                raise DataError(
                    f"{part.name}: more documents than when they were looked through for duplicates. Start again when "
                    "nothing changes the text."
                )
            if twins is not None and twins[number]:
                facts.duplicate_documents += 1
                continue
            facts.words += document.count(" ") + 1
            facts.text_bytes += len(document.encode())
            yield document

    def _encode(self, documents: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        if isinstance(self.encoder, SentencePieceEncoder):
            return self.encoder.encode_flat(documents)
        return flatten(self.encoder.encode(documents))


_SUFFIXES = (".arrow", ".npz")


def finished_part(folder: Path, name: str) -> PartFacts | None:
    """The facts of a part whose files are there and whole."""
    try:
        facts = PartFacts(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))
        facts.read = {int(number): tally for number, tally in facts.read.items()}
        whole = all(_size_and_sum(folder / f"{name}{suffix}") == facts.files[suffix] for suffix in _SUFFIXES)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return facts if whole else None


def has_finished_parts(folder: Path) -> bool:
    """Whether a later start would find something to go on from."""
    return any(folder.glob("*.json")) or any(folder.glob("*.places"))  # the latter are of duplicates.py


def part_arrays(folder: Path, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """token_counts, and how many documents have 0, 1, 2, … tokens."""
    with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
        return arrays["token_counts"], arrays["lengths"]


def sum_of_arrays(folder: Path, names: Iterable[str], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """`part_arrays` of all these parts together."""
    token_counts = np.zeros(vocab_size, dtype=np.int64)
    lengths = np.zeros(1, dtype=np.int64)
    for name in names:
        more_counts, more_lengths = part_arrays(folder, name)
        token_counts += more_counts
        lengths = _sum(lengths, more_lengths)
    return token_counts, lengths


def _sum(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.int64]:
    """Their sum, the shorter filled up with zeros."""
    total = np.zeros(max(one.size, other.size), dtype=np.int64)
    total[: one.size] += one
    total[: other.size] += other
    return total


def _size_and_sum(path: Path) -> list[Any]:
    with path.open("rb") as stream:
        return [os.fstat(stream.fileno()).st_size, hashlib.file_digest(stream, "sha256").hexdigest()]


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    while batch := _batch(documents):
        yield batch


def _batch(documents: Iterator[str]) -> list[str]:
    batch: list[str] = []
    characters = 0
    for document in itertools.islice(documents, _BATCH_DOCUMENTS):
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            break
    return batch


class _Packer:
    """Joins documents and cuts them into blocks; keeps the rest for the next call."""

    def __init__(self, vocabulary: Vocabulary, seq_len: int) -> None:
        self.vocabulary, self.seq_len = vocabulary, seq_len
        self.documents = self.tokens = self.dropped_blocks = 0
        self._rest: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._special = np.zeros(vocabulary.size, dtype=bool)
        self._special[vocabulary.special_ids] = True

    @property
    def pending(self) -> int:
        """Tokens that do not fill a block yet."""
        return int(self._rest.size)

    def add(self, ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """(blocks, seq_len) int64: the blocks that these documents complete.

        Args:
            ids: the tokens of all documents.
            lengths: how many each document has; one that has none gets no separator.
        """
        ends = np.cumsum(lengths)[lengths > 0]
        self.documents += ends.size
        self.tokens += ids.size
        stream = np.concatenate([self._rest, np.insert(ids, ends, self.vocabulary.eos_id)])
        # A causal model reads on from block to block of one document; others have a separator at both ends.
        outer = 0 if self.vocabulary.is_causal else 1
        inner = self.seq_len - 2 * outer
        count = stream.size // inner
        self._rest = stream[count * inner :].copy()  # a view would keep the whole batch
        blocks = np.empty((count, self.seq_len), dtype=np.int64)
        blocks[:, :1], blocks[:, -1:] = self.vocabulary.bos_id, self.vocabulary.eos_id
        blocks[:, outer : self.seq_len - outer] = stream[: count * inner].reshape(count, inner)
        if self.vocabulary.is_causal:  # one token at least that has a next one
            usable = (blocks[:, :-1] != self.vocabulary.eos_id).any(1)
        else:
            # A mask takes up to half of a block's tokens, and none that is special: a block of <unk> cannot give them.
            usable = (~self._special[blocks]).sum(1) >= inner // 2 + 1
        self.dropped_blocks += int(count - usable.sum())
        return blocks[usable]


class _Writer:
    """Writes blocks to one Arrow file and counts their tokens. Raises DataError where they cannot be written."""

    def __init__(self, path: Path, vocabulary: Vocabulary, seq_len: int) -> None:
        import pyarrow

        self.path = path
        self.blocks = 0
        self.token_counts = np.zeros(vocabulary.size, dtype=np.int64)
        self._dtype = np.dtype(np.uint16 if vocabulary.size <= 1 << 16 else np.int32)
        self._type = pyarrow.list_(pyarrow.from_numpy_dtype(self._dtype), seq_len)
        with self._writing():
            self._file = pyarrow.OSFile(str(self.path), "wb")
            self._stream = pyarrow.ipc.new_stream(self._file, pyarrow.schema([("input_ids", self._type)]))

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            with suppress(Exception):  # a full disk has been told already
                self._stream.close()
            with suppress(Exception):
                self._file.close()

    def write(self, blocks: NDArray[np.int64]) -> None:
        """Append (blocks, seq_len) token ids to the file, and count them."""
        import pyarrow

        self.token_counts += np.bincount(blocks.ravel(), minlength=self.token_counts.size)
        self.blocks += len(blocks)
        for start in range(0, len(blocks), _BATCH_BLOCKS):
            ids = blocks[start : start + _BATCH_BLOCKS].astype(self._dtype).ravel()
            # pyarrow.array would import pandas, half a second in every process.
            values = pyarrow.Array.from_buffers(self._type.value_type, len(ids), [None, pyarrow.py_buffer(ids)])
            lists = pyarrow.FixedSizeListArray.from_arrays(values, type=self._type)
            with self._writing():
                self._stream.write_batch(pyarrow.record_batch([lists], names=["input_ids"]))

    def close(self) -> None:
        with self._writing():
            self._stream.close()
            self._file.close()
            with self.path.open("rb") as stream:
                os.fsync(stream.fileno())

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path.parent, DataError, ON_FULL_DISK)
