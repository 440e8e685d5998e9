"""Parquet files and data sets of the hub: text that is read by rows."""

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distilcb.data.compression import open_bytes
from distilcb.data.damage import Damage, naming
from distilcb.errors import DataError
from distilcb.hub import HubDataset

NAME_ANOTHER = "Name another with --data.text_field (launch/prepare.py: --text_field)."


@dataclass(frozen=True)
class OpenDataset:
    """A data set that is loaded; another process that gets it maps the same files and asks no hub."""

    name: HubDataset

    @cached_property
    def rows(self) -> Any:
        """The datasets.Dataset."""
        return self.name.load()

    def __str__(self) -> str:
        return str(self.name)


Source = Path | HubDataset | OpenDataset


def opened(source: Source) -> Path | OpenDataset:
    """The source with its data set loaded, when it is needed."""
    return OpenDataset(source) if isinstance(source, HubDataset) else source


def table_groups(source: Source, *, text_field: str, skip_damaged: bool = False) -> list[tuple[int, int]]:
    """(rows, bytes of text, about) of each stretch of a table that is stored together.

    Args:
        skip_damaged: give of a file that is no table one stretch of no rows; whoever reads it counts the damage.

    Raises:
        DataError: not a table, or no such column.
    """
    source = opened(source)
    if isinstance(source, OpenDataset):
        rows = source.rows
        _check_column(source, rows.column_names, text_field)
        return [(len(rows), rows.data.column(text_field).nbytes)]
    with naming(source, Damage(skips=skip_damaged, tells=False)), open_table(source) as table:
        _check_column(source, table.schema_arrow.names, text_field)
        groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
        return [(group.num_rows, _column_bytes(group, text_field)) for group in groups]
    return [(0, 0)]


def starts_of_groups(source: Path) -> list[int]:
    """The first row of each stretch of a table that is stored together; before it nothing need be decoded."""
    with naming(source), open_table(source) as table:
        rows = [table.metadata.row_group(number).num_rows for number in range(table.num_row_groups)]
    return list(itertools.accumulate(rows[:-1], initial=0))


def _column_bytes(group: Any, text_field: str) -> int:
    columns = [group.column(number) for number in range(group.num_columns)]
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema == text_field)


@contextmanager
def open_table(path: Path) -> Iterator[Any]:
    """A pyarrow ParquetFile; a compressed one is unpacked on disk. OSError where it is damaged."""
    import pyarrow
    import pyarrow.parquet

    with ExitStack() as closing, open_bytes(path) as (stream, _):
        if path.suffix != ".parquet":
            unpacked = closing.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, unpacked)
            stream = unpacked
        try:
            # With a buffer, a row group's column is read bit by bit and not whole.
            yield pyarrow.parquet.ParquetFile(stream, buffer_size=1 << 20)
        except pyarrow.ArrowInvalid as error:
            raise OSError(f"not parquet ({error})") from error


def read_parquet(path: Path, text_field: str, start: int, end: int | None) -> Iterator[str | bytes]:
    """The texts of rows start .. end - 1, as they are stored; DataError where the column is not there or holds none."""
    with open_table(path) as table:
        _check_column(path, table.schema_arrow.names, text_field)
        first = 0
        for number in range(table.num_row_groups):
            last = first + table.metadata.row_group(number).num_rows
            if last > start and (end is None or first < end):
                for batch in table.iter_batches(columns=[text_field], row_groups=[number], batch_size=1024):
                    before = max(0, start - first)  # these rows are decoded, and no more
                    wanted = batch.slice(before, None if end is None else max(0, end - first - before))
                    first += len(batch)
                    for text in _values(wanted.column(0)):
                        yield _text_of(path, text_field, text)
                    if end is not None and first >= end:
                        return
            first = last


def _values(column: Any) -> list[Any]:
    """A column's texts; as bytes where not all are UTF-8, which whoever wrote the file need not have looked at."""
    try:
        return column.to_pylist()  # type: ignore[no-any-return]
    except UnicodeDecodeError:
        return column.cast("large_binary").to_pylist()  # type: ignore[no-any-return]


def read_dataset(source: OpenDataset, text_field: str, start: int, end: int | None) -> Iterator[str | bytes]:
    """As `read_parquet`, of a data set."""
    _check_column(source, source.rows.column_names, text_field)
    rows = source.rows.select_columns(text_field)
    rows = rows.select(range(start, len(rows) if end is None else end))
    for batch in rows.iter(batch_size=1024):
        for text in batch[text_field]:
            yield _text_of(source, text_field, text)


def _check_column(source: Source, names: list[str], text_field: str) -> None:
    if text_field not in names:
        raise DataError(f"{source}: columns {names}, needed one named '{text_field}'. {NAME_ANOTHER}")


def _text_of(source: Source, text_field: str, text: Any) -> str | bytes:
    """A cell's text; none is an empty one."""
    if not isinstance(text, str | bytes | None):
        raise DataError(f"{source}: column '{text_field}' holds {type(text).__name__}, needed text. {NAME_ANOTHER}")
    return text or ""
