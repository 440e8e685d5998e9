"""How a corpus is cut into parts that are packed for themselves.

The cut depends on the sources alone, so that the blocks do not depend on who packs what. A part is a stretch of some
32 MB of text: several small files, or some of a big one. A compressed file cannot be entered in the middle; where it
is big it is a stream, of which every so many bytes of text are a part, found while reading.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distilcb.data.corpus import Chunk, is_compressed, is_compressed_lines, is_table
from distilcb.data.tables import Source, table_groups

PART_BYTES = 32 << 20
# Text is taken to be so many times as long as what it is compressed to; only decides what is big.
_EXPANSION = 4
# Shares of a stream that one rank would do alone in its time: more of them even out, and each rank reads it whole.
_SHARES_A_RANK = 4


@dataclass(frozen=True)
class Span:
    """A stretch of a source: bytes of a plain text file, rows of a table, or all of it.

    Attributes:
        source: its number.
        size: bytes on disk, for progress.
        text_bytes: bytes of text, about, for even shares.
    """

    source: int
    size: int
    text_bytes: int
    start: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Part:
    """Stretches that are packed together, with nothing between."""

    name: str
    spans: tuple[Span, ...]
    chunk: Chunk | None = None

    @property
    def size(self) -> int:
        return sum(span.size for span in self.spans)

    @property
    def text_bytes(self) -> int:
        return sum(span.text_bytes for span in self.spans)


@dataclass(frozen=True)
class Stream:
    """A big compressed file, read from its beginning and cut into parts on the way."""

    number: int
    source: int
    size: int

    @property
    def text_bytes(self) -> int:
        return self.size * _EXPANSION

    def name(self, chunk: int) -> str:
        """The name of one of its parts."""
        return _name(self.number, chunk)


@dataclass(frozen=True)
class StreamShare:
    """Of a stream's parts those whose number leaves a remainder in `taken`, when divided by `shares`."""

    stream: Stream
    shares: int
    taken: frozenset[int]

    def has(self, chunk: int) -> bool:
        return chunk % self.shares in self.taken


@dataclass(frozen=True)
class Share:
    """What one rank packs."""

    parts: tuple[Part, ...]
    streams: tuple[StreamShare, ...]

    @property
    def is_one_part(self) -> bool:
        return len(self.parts) == 1 and not self.streams

    @property
    def text_bytes(self) -> float:
        streams = (each.stream.text_bytes * len(each.taken) / each.shares for each in self.streams)
        return sum(part.text_bytes for part in self.parts) + sum(streams)


def cut(
    sources: Sequence[Source], *, text_field: str, part_bytes: int = PART_BYTES, skip_damaged: bool = False
) -> list[Part | Stream]:
    """The corpus in parts, in its order.

    Args:
        skip_damaged: leave what is wrong with a table to whoever reads it.

    Raises:
        DataError: a table that cannot be read.
    """
    units: list[Part | Stream] = []
    spans: list[Span] = []
    filled = 0

    def end_part() -> None:
        nonlocal filled
        if spans:
            units.append(Part(_name(len(units), 0), tuple(spans)))
        spans.clear()
        filled = 0

    for number, source in enumerate(sources):
        if is_compressed_lines(source) and _size(source) * _EXPANSION > part_bytes:
            end_part()
            units.append(Stream(len(units), number, _size(source)))
            continue
        for span in _spans(number, source, text_field, part_bytes, skip_damaged):
            if filled + span.text_bytes > part_bytes:
                end_part()
            spans.append(span)
            filled += span.text_bytes
    end_part()
    return units


def share_out(units: Sequence[Part | Stream], *, ranks: int) -> list[Share]:
    """What each rank packs: about the same bytes of text, the same for whoever asks."""
    total = sum(unit.text_bytes for unit in units)
    pieces: list[tuple[float, Part | Stream, int, int]] = []  # bytes of text, whole, shares, which of them
    for unit in units:
        shares = 1
        if isinstance(unit, Stream) and ranks > 1:
            shares = -(-_SHARES_A_RANK * ranks * unit.text_bytes // total)
        pieces += [(unit.text_bytes / shares, unit, shares, which) for which in range(shares)]
    loads = [0.0] * ranks
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    streams: list[dict[Stream, tuple[int, set[int]]]] = [{} for _ in range(ranks)]
    for text_bytes, unit, shares, which in sorted(pieces, key=lambda piece: -piece[0]):
        rank = loads.index(min(loads))
        loads[rank] += text_bytes
        if isinstance(unit, Part):
            parts[rank].append(unit)
        else:
            streams[rank].setdefault(unit, (shares, set()))[1].add(which)
    return [
        Share(
            tuple(sorted(own, key=lambda part: part.name)),
            tuple(StreamShare(stream, shares, frozenset(taken)) for stream, (shares, taken) in read.items()),
        )
        for own, read in zip(parts, streams, strict=True)
    ]


def _spans(number: int, source: Source, text_field: str, part_bytes: int, skip_damaged: bool) -> Iterator[Span]:
    if is_table(source):
        groups = table_groups(source, text_field=text_field, skip_damaged=skip_damaged)
        yield from _table_spans(number, groups, part_bytes)
        return
    size = _size(source)
    compressed = is_compressed(source)
    pieces = 1 if compressed else max(1, math.ceil(size / part_bytes))
    if pieces == 1:
        yield Span(number, size, size * _EXPANSION if compressed else size)
        return
    edges = [size * piece // pieces for piece in range(pieces + 1)]
    for start, end in itertools.pairwise(edges):
        yield Span(number, end - start, end - start, start, end)


def _table_spans(number: int, groups: list[tuple[int, int]], part_bytes: int) -> Iterator[Span]:
    """Stored groups of rows, those that are too big in pieces."""
    first = 0
    for rows, text_bytes in groups:
        pieces = max(1, min(rows, math.ceil(text_bytes / part_bytes)))
        edges = [first + rows * piece // pieces for piece in range(pieces + 1)]
        for start, end in itertools.pairwise(edges):
            yield Span(number, text_bytes // pieces, text_bytes // pieces, start, end)
        first += rows


def _size(source: Source) -> int:
    return source.stat().st_size if isinstance(source, Path) else 0


def _name(unit: int, chunk: int) -> str:
    return f"{unit:06d}-{chunk:06d}"
