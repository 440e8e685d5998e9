"""Sources of text: files, folders, globs and data sets of the hub, read as a stream of documents."""

import gc
import glob
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distilcb.data.compression import COMPRESSIONS, open_bytes
from distilcb.data.damage import Damage, UntilDamage, clean, naming
from distilcb.data.tables import NAME_ANOTHER, OpenDataset, Source, opened, read_dataset, read_parquet
from distilcb.errors import DataError, first_line
from distilcb.hub import HUB_PREFIX, HubDataset

log = logging.getLogger(__name__)

_FORMATS = (".txt", ".jsonl", ".parquet")
# Where a disk's own root keeps what a check of it finds; closed to users.
_OF_THE_FILE_SYSTEM = "lost+found"
_PIECE_CHARACTERS = 1 << 20
_SKIPPED_AT_ONCE = 1 << 20


def find_sources(names: Sequence[str]) -> list[Source]:
    """What the names stand for: readable files, sorted within each folder or glob, and hub:… names.

    A file that comes again, by another spelling or a link, is left out, and the log says so.

    Raises:
        DataError: a name that stands for nothing, or for nothing readable.
    """
    found: list[Source] = []
    for name in names:
        if name.startswith(HUB_PREFIX):
            found.append(HubDataset.parse(name))
            continue
        try:
            found += _files(name)
        except (OSError, RuntimeError) as error:  # a closed folder of somebody else; the home of nobody
            raise DataError(
                f"{name} cannot be read: {first_line(error)}. Leave out what is closed by naming files or a glob."
            ) from error
    once: dict[Source, Source] = {}
    again = [source for source in found if once.setdefault(_place_of(source), source) != source]
    if again:
        log.info("%s is read once: %s is the same file (%d such)", once[_place_of(again[0])], again[0], len(again))
    return list(once.values())


def _place_of(source: Source) -> Source:
    """Where it lies, however it is spelt."""
    return source.resolve() if isinstance(source, Path) else source


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in _below(path) if _format(p) and p.is_file())
    elif path.is_file():
        if not _format(path):
            raise DataError(f"{name}: not a format that can be read. Needed: a name that ends in {_readable()}.")
        files = [path]
    else:
        matches = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        files = sorted(p for p in matches if _format(p))
    if not files:
        what = "has no readable file" if path.is_dir() or matches else "does not exist"
        if "," in name and all(Path(part).expanduser().exists() for part in name.split(",")):
            what += ": these are several names, and each stands by itself: with spaces between them, or in a list"
        raise DataError(f"{name} {what}. Needed: a file, folder or glob of {_readable()}.")
    return files


def _below(folder: Path) -> Iterator[Path]:
    """What is no folder below this one, links to folders followed; OSError at a folder that is closed."""

    def refuse(error: OSError) -> None:
        if Path(str(error.filename)).name != _OF_THE_FILE_SYSTEM:
            raise error

    seen = set[str]()
    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to where it has been, or is
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(place, name) for name in names)


def read_documents(
    source: Source, *, text_field: str, damage: Damage, start: int = 0, end: int | None = None
) -> Iterator[str]:
    """The documents of one source, cleaned: a line of .txt, a record of .jsonl, a row of .parquet or of a data set.

    Invalid UTF-8 becomes U+FFFD, control characters become spaces, empty documents are left out; `damage` counts.

    Args:
        start, end: a stretch of it: bytes of a plain .txt or .jsonl, of which the lines that begin there are read;
            rows of a table. Compressed files can only be read whole.

    Raises:
        DataError: naming the file, and the line or column where one is at fault.
    """
    source = opened(source)
    yield from _cleaned(source, _texts(source, text_field, damage, start, end), damage)


def _texts(
    source: Path | OpenDataset, text_field: str, damage: Damage, start: int = 0, end: int | None = None
) -> Iterator[str | bytes]:
    """As they are; lines of a .txt with their ends."""
    if isinstance(source, OpenDataset):
        yield from read_dataset(source, text_field, start, end)
    elif _format(source) == ".parquet":
        yield from read_parquet(source, text_field, start, end)
    else:
        lines = _lines(source, start, end)
        before = partial(_count_lines_before, source, start)
        yield from _of_lines(source, lines, text_field, damage, lines_before=before)


def read_as_it_runs(names: Sequence[str], *, text_field: str = "text") -> Iterator[str]:
    """One running text in pieces of about a megabyte: what these names hold as it is, line ends too, nothing cleaned.

    Pieces end where a line, a record or a row does.

    Raises:
        DataError: a name that stands for nothing readable, a file that is damaged or not UTF-8.
    """
    piece, characters = list[str](), 0
    for source in map(opened, find_sources(names)):
        with naming(source):
            for text in _texts(source, text_field, Damage()):
                try:
                    piece.append(text if isinstance(text, str) else text.decode())
                    piece[-1].encode()  # JSON can spell what is no character
                except UnicodeError as error:
                    raise DataError(f"{source} is not UTF-8: {error}. Save it as UTF-8.") from error
                characters += len(piece[-1])
                if characters >= _PIECE_CHARACTERS:
                    yield "".join(piece)
                    piece, characters = [], 0
    if piece:
        yield "".join(piece)


@dataclass(frozen=True)
class Chunk:
    """Whole lines of a compressed file, after `lines_before` others. fault: what the file's damage after them is."""

    text: bytes
    lines_before: int
    fault: str = ""

    def read_documents(self, source: Path, *, text_field: str, damage: Damage) -> Iterator[str]:
        """Its documents, as `read_documents` gives those of a file."""
        lines = io.BytesIO(self.text)
        texts = _of_lines(source, lines, text_field, damage, lines_before=lambda: self.lines_before)
        yield from _cleaned(source, texts, damage)
        if self.fault:
            damage.survive(source, self.fault)


def read_chunks(path: Path, *, chunk_bytes: int, skip_damaged: bool = False) -> Iterator[tuple[Chunk, int]]:
    """A compressed file of lines in chunks of `chunk_bytes` or a line more, each with the bytes of the file it took.

    Args:
        skip_damaged: give of a file that ends in the middle what comes before that; the last chunk tells.

    Raises:
        DataError: the file is damaged.
    """
    lines = position = 0
    with naming(path), open_bytes(path) as (compressed, tell):
        stream = UntilDamage(compressed, survives=skip_damaged)
        ahead, is_first = stream.read(1), True
        while ahead or (stream.fault and is_first):
            text = b"".join((ahead, stream.read(chunk_bytes - 1), stream.readline()))
            ahead = stream.read(1)
            there = tell() if ahead else path.stat().st_size  # the last takes what a reader leaves unread
            yield Chunk(text, lines, "" if ahead else stream.fault), there - position
            lines, position, is_first = lines + text.count(b"\n"), there, False


def is_compressed(source: Source) -> bool:
    """Whether it is a file that can only be read from its beginning."""
    return isinstance(source, Path) and source.suffix in COMPRESSIONS


def is_compressed_lines(source: Source) -> bool:
    """Whether it is a stream that nobody can enter in the middle, and that is cut into chunks."""
    return isinstance(source, Path) and is_compressed(source) and _format(source) != ".parquet"


def is_table(source: Source) -> bool:
    """Whether it is read by rows: a plain .parquet, a data set."""
    return not isinstance(source, Path) or source.suffix == ".parquet"


def _cleaned(source: Source, texts: Iterable[str | bytes], damage: Damage) -> Iterator[str]:
    with naming(source, damage):
        for text in texts:
            document = clean(text, damage)
            if document:
                yield document
            else:
                damage.empty_documents += 1


def kind_of(source: Source) -> list[str]:
    """Format and compression of a readable file, such as [".jsonl", ".gz"]: what its name says of how to read it."""
    if not isinstance(source, Path):
        return [HUB_PREFIX]
    return [suffix for suffix in source.suffixes if suffix in _FORMATS + COMPRESSIONS]


def _readable() -> str:
    return f"{', '.join(_FORMATS)}, each also with {', '.join(COMPRESSIONS)}"


def _format(path: Path) -> str:
    """'.txt', '.jsonl' or '.parquet', whatever the compression; '' for other files and hidden ones."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    last = suffixes[-1] if suffixes else ""
    return last if last in _FORMATS and not path.name.startswith(".") else ""


def _lines(path: Path, start: int, end: int | None) -> Iterator[bytes]:
    """The lines that begin from byte `start` up to byte `end`."""
    with open_bytes(path) as (stream, _):
        position = start
        if start:
            position, line = stream.seek(start - 1), b""
            while not line.endswith(b"\n") and (end is None or position < end):  # the one that begins before
                line = stream.readline(_SKIPPED_AT_ONCE)
                if not line:
                    return
                position += len(line)
        if end is None:
            yield from stream
            return
        while position < end and (line := stream.readline()):
            position += len(line)
            yield line


def _count_lines_before(path: Path, start: int) -> int:
    """How many lines of a plain file begin before byte `start`."""
    if not start:
        return 0
    lines, left = 1, start - 1
    with path.open("rb") as stream:
        while left and (data := stream.read(min(left, 1 << 20))):
            lines += data.count(b"\n")
            left -= len(data)
    return lines


def _record(line: str) -> Any:
    """What a line of JSON says. Brackets in brackets take Python to the end of its stack, where whatever the garbage
    collector would end fails half way (a line of our own tests met it); so it waits until the line is read."""
    collected = gc.isenabled()
    gc.disable()
    try:
        return json.loads(line)
    finally:
        if collected:
            gc.enable()


def _of_lines(
    path: Path, lines: Iterable[bytes], text_field: str, damage: Damage, *, lines_before: Callable[[], int]
) -> Iterator[str | bytes]:
    """The texts of a .txt's or a .jsonl's lines; lines_before() is asked where one is at fault."""
    if _format(path) == ".txt":
        yield from lines
        return
    for number, raw in enumerate(lines, 1):
        line = raw.decode(errors="surrogateescape").removeprefix("\ufeff").rstrip()
        if not line:
            continue
        try:
            record = _record(line)
        except (ValueError, RecursionError) as error:
            if damage.may_skip:
                damage.damaged_records += 1
                continue
            fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(
                f"{path}, line {lines_before() + number}: not JSON ({fault}). launch/prepare.py --skip_damaged leaves "
                "such records out."
            ) from error
        text = record.get(text_field, 0) if isinstance(record, dict) else 0
        if text is None:
            text = ""  # as a null in parquet
        if not isinstance(text, str):
            came = sorted(record) if isinstance(record, dict) else type(record).__name__
            if isinstance(record, dict) and text_field in record:
                came = f"'{text_field}' as {type(text).__name__}"
            raise DataError(
                f"{path}, line {lines_before() + number}: came {came}, needed a text named '{text_field}'. "
                f"{NAME_ANOTHER}"
            )
        yield text
