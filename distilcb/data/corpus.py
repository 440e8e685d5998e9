"""Sources of text: files, folders, globs and data sets of the hub, read as a stream of documents."""

import glob
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from distilcb.errors import DataError, first_line
from distilcb.hub import HUB_PREFIX, HubDataset

Source = Path | HubDataset

_FORMATS = (".txt", ".jsonl", ".parquet")
_COMPRESSIONS = (".gz", ".xz", ".zst")
_NAME_ANOTHER = "Name another with --data.text_field (launch/prepare.py: --text_field)."


@dataclass
class Damage:
    """What was survived while reading: counted, and reported in the description of the blocks."""

    empty_documents: int = 0
    undecodable_documents: int = 0
    control_characters: int = 0


def find_sources(names: Sequence[str]) -> list[Source]:
    """What the names stand for, without repeats: readable files, sorted within each folder or glob, and hub:… names.

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
            raise DataError(f"{name} cannot be read: {first_line(error)}.") from error
    return list(dict.fromkeys(found))


def _files(name: str) -> list[Path]:
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _format(p))
    elif path.is_file():
        if not _format(path):
            raise DataError(f"{name}: not a format that can be read. Needed: a name that ends in {_readable()}.")
        files = [path]
    else:
        matches = [p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file()]
        files = sorted(p for p in matches if _format(p))
    if not files:
        what = "has no readable file" if path.is_dir() or matches else "does not exist"
        raise DataError(f"{name} {what}. Needed: a file, folder or glob of {_readable()}.")
    return files


def read_documents(source: Source, *, text_field: str, damage: Damage) -> Iterator[str]:
    """The documents of one source, cleaned: a line of .txt, a record of .jsonl, a row of .parquet or of a data set.

    Invalid UTF-8 becomes U+FFFD, control characters become spaces, empty documents are left out; `damage` counts.

    Raises:
        DataError: naming the file, and the line or column where one is at fault.
    """
    readers: dict[str, Callable[[Path, str], Iterator[str | bytes]]] = {
        ".txt": _read_text,
        ".jsonl": _read_json_lines,
        ".parquet": _read_parquet,
    }
    if isinstance(source, HubDataset):
        texts = _read_dataset(source, text_field)
    else:
        texts = readers[_format(source)](source, text_field)
    try:
        for text in texts:
            document = _clean(text, damage)
            if document:
                yield document
            else:
                damage.empty_documents += 1
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{source}: {error or 'the file ends in the middle'}. Fetch or make the file again.") from error


def kind_of(source: Source) -> list[str]:
    """Format and compression of a readable file, such as [".jsonl", ".gz"]: what its name says of how to read it."""
    if isinstance(source, HubDataset):
        return [HUB_PREFIX]
    return [suffix for suffix in source.suffixes if suffix in _FORMATS + _COMPRESSIONS]


def _readable() -> str:
    return f"{', '.join(_FORMATS)}, each also with {', '.join(_COMPRESSIONS)}"


def _format(path: Path) -> str:
    """'.txt', '.jsonl' or '.parquet', whatever the compression; '' for other files and hidden ones."""
    suffixes = [s for s in path.suffixes if s not in _COMPRESSIONS]
    last = suffixes[-1] if suffixes else ""
    return last if last in _FORMATS and not path.name.startswith(".") else ""


@contextmanager
def _open_bytes(path: Path) -> Iterator[IO[bytes]]:
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            yield stream  # type: ignore[misc]
    elif path.suffix == ".xz":
        with lzma.open(path) as stream:
            yield stream
    elif path.suffix == ".zst":
        import pyarrow

        # zstandard's stream_reader takes a file that ends in the middle for a whole one.
        with pyarrow.input_stream(str(path), compression="zstd") as zst:
            yield io.BufferedReader(zst, buffer_size=1 << 20)
    else:
        with path.open("rb") as stream:
            yield stream


def _read_text(path: Path, _text_field: str) -> Iterator[bytes]:
    with _open_bytes(path) as stream:
        yield from stream


def _read_json_lines(path: Path, text_field: str) -> Iterator[str]:
    with _open_bytes(path) as stream:
        for number, raw in enumerate(stream, 1):
            line = raw.decode(errors="surrogateescape").removeprefix("\ufeff").rstrip()
            if not line:
                continue
            try:
                record: Any = json.loads(line)
            except (ValueError, RecursionError) as error:
                fault = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"{path}, line {number}: not JSON ({fault}).") from error
            text = record.get(text_field, 0) if isinstance(record, dict) else 0
            if text is None:
                text = ""  # as a null in parquet
            if not isinstance(text, str):
                names = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise DataError(
                    f"{path}, line {number}: came {names}, needed a text named '{text_field}'. {_NAME_ANOTHER}"
                )
            yield text


def _read_parquet(path: Path, text_field: str) -> Iterator[str | bytes]:
    import pyarrow
    import pyarrow.parquet

    with _open_bytes(path) as stream:
        seekable = stream if path.suffix == ".parquet" else io.BytesIO(stream.read())
        try:
            table = pyarrow.parquet.ParquetFile(seekable)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path}: not parquet ({error}).") from error
        _check_column(path, table.schema_arrow.names, text_field)
        for batch in table.iter_batches(columns=[text_field], batch_size=1024):
            for text in batch.column(0).to_pylist():
                yield _text_of(path, text_field, text)


def _read_dataset(source: HubDataset, text_field: str) -> Iterator[str | bytes]:
    rows = source.load()
    _check_column(source, rows.column_names, text_field)
    for row in rows.select_columns(text_field):
        yield _text_of(source, text_field, row[text_field])


def _check_column(source: Source, names: list[str], text_field: str) -> None:
    if text_field not in names:
        raise DataError(f"{source}: columns {names}, needed one named '{text_field}'. {_NAME_ANOTHER}")


def _text_of(source: Source, text_field: str, text: Any) -> str | bytes:
    """A cell's text; none is an empty one."""
    if not isinstance(text, str | bytes | None):
        raise DataError(f"{source}: column '{text_field}' holds {type(text).__name__}, needed text. {_NAME_ANOTHER}")
    return text or ""


# Every control character but tab and line ends, which split() takes for spaces.
_CONTROL = {code: " " for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n\r\x0b\x0c\x85"}

# Decoding turns bytes that are no UTF-8 into these, and JSON can spell them ("\\ud83d"); no tokenizer takes one.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def _clean(text: str | bytes, damage: Damage) -> str:
    if isinstance(text, bytes):
        text = text.decode(errors="surrogateescape").removeprefix("\ufeff")
    if not text.isprintable():
        text, undecodable = _LONE_SURROGATE.subn("\ufffd", text)
        damage.undecodable_documents += undecodable > 0
        cleaned = text.translate(_CONTROL)
        damage.control_characters += sum(a != b for a, b in zip(text, cleaned, strict=True)) if cleaned != text else 0
        text = cleaned
    return " ".join(text.split())
