"""A corpus in parts: every document in one of them, cut by the sources alone, shared evenly."""

import gzip
import itertools
import json
import lzma
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from distilcb.config import REPOSITORY
from distilcb.data.corpus import find_sources, read_chunks, read_documents
from distilcb.data.damage import Damage
from distilcb.data.parts import Stream, cut, share_out
from distilcb.data.tables import opened
from distilcb.data.workers import parts_of_share
from distilcb.errors import DataError


def write_lines(path, lines, *, end="\n"):
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def sentences(count, *, seed=0, longest=200):
    generator = np.random.default_rng(seed)
    return [f"été {number} " + "mot " * int(generator.integers(0, longest // 4)) + "fin" for number in range(count)]


def units_of(folder, part_bytes):
    sources = find_sources([str(folder)])
    return sources, cut(sources, text_field="text", part_bytes=part_bytes)


def documents_of(part, sources, *, damage=None):
    damage = damage or Damage()
    how = {"text_field": "text", "damage": damage}
    for span in part.spans:
        source = sources[span.source]
        if part.chunk is not None:
            yield from part.chunk.read_documents(source, **how)
        else:
            yield from read_documents(source, start=span.start, end=span.end, **how)


def parts_in_order(units, sources, *, part_bytes, ranks=1):
    shares = share_out(units, ranks=ranks)
    each = [parts_of_share(share, sources, part_bytes=part_bytes, processes=4) for share in shares]
    return sorted(filter(None, itertools.chain(*each)), key=lambda part: part.name)


@pytest.mark.parametrize("part_bytes", [1, 10, 97, 1000, 5000, 1 << 20])
@pytest.mark.parametrize("end", ["\n", "", "\n\n\n"])
def test_every_line_of_a_file_is_in_one_part(tmp_path, part_bytes, end):
    lines = [*sentences(60), "x" * 3000, *sentences(20, seed=1)]
    write_lines(tmp_path / "a.txt", lines, end=end)
    sources, units = units_of(tmp_path, part_bytes)
    parts = parts_in_order(units, sources, part_bytes=part_bytes)
    assert list(itertools.chain(*(documents_of(part, sources) for part in parts))) == lines
    assert len(parts) == -(-(tmp_path / "a.txt").stat().st_size // part_bytes)


def test_a_part_in_the_middle_of_a_long_line_holds_little_of_it(tmp_path):
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(64 << 20)
        stream.seek(0, os.SEEK_END)
        stream.write(b"\nfin\n")
    sources, units = units_of(tmp_path, 16 << 20)
    tracemalloc.start()
    try:
        found = [list(documents_of(part, sources)) for part in units[1:]]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == [[], [], [], ["fin"]]
    assert peak < 8 << 20


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_document_of_a_mixed_corpus_is_in_one_part_whatever_the_ranks(tmp_path, ranks):
    lines = sentences(200)
    write_lines(tmp_path / "a.txt", lines[:60])
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[60:90]))
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("\n".join(lines[90:160]).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"text": lines[160:]}), tmp_path / "d.parquet", row_group_size=25)
    sources, units = units_of(tmp_path, 900)
    assert any(isinstance(unit, Stream) for unit in units)
    parts = parts_in_order(units, sources, part_bytes=900, ranks=ranks)
    assert list(itertools.chain(*(documents_of(part, sources) for part in parts))) == lines
    names = [part.name for part in parts_in_order(units, sources, part_bytes=900)]
    assert [part.name for part in parts] == names
    assert len(names) == len(set(names)) > 10


def test_small_files_are_packed_together_and_big_ones_are_not(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02}.txt").write_text("x" * 99 + "\n")
    write_lines(tmp_path / "big.txt", ["y" * 99] * 35)
    _, units = units_of(tmp_path, 1000)
    assert [len(part.spans) for part in units] == [10, 10, 10, 1, 1, 1, 1]
    assert [span.size for part in units[3:] for span in part.spans] == [875] * 4


def test_a_small_compressed_file_is_packed_with_its_neighbours(tmp_path):
    (tmp_path / "a.txt").write_text("un\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"deux\n"))
    (tmp_path / "c.txt").write_text("trois\n")
    sources, units = units_of(tmp_path, 1000)
    assert [list(documents_of(part, sources)) for part in units] == [["un", "deux", "trois"]]


@pytest.mark.parametrize("ranks", [2, 3, 7, 16])
def test_one_big_file_is_shared_evenly(tmp_path, ranks):
    with (tmp_path / "a.txt").open("wb") as stream:
        stream.truncate(64_000_000)
    _, units = units_of(tmp_path, 1_000_000)
    loads = [share.text_bytes for share in share_out(units, ranks=ranks)]
    assert sum(loads) == 64_000_000
    assert max(loads) - min(loads) <= 1_000_000


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_one_big_compressed_file_is_shared_evenly(tmp_path, ranks):
    lines = sentences(3000)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    sources, units = units_of(tmp_path, 2000)
    shares = share_out(units, ranks=ranks)
    chunks = [filter(None, parts_of_share(share, sources, part_bytes=2000, processes=1)) for share in shares]
    sizes = [sum(len(part.chunk.text) for part in own) for own in chunks]
    assert sum(sizes) == len("\n".join(lines).encode())
    assert max(sizes) < 1.15 * sum(sizes) / ranks
    assert min(sizes) > 0.85 * sum(sizes) / ranks


@pytest.mark.parametrize(("files", "ranks"), [(5, 4), (9, 8), (40, 8), (3, 16)])
def test_compressed_files_that_ranks_cannot_divide_are_shared_evenly(tmp_path, files, ranks):
    for number in range(files):
        with (tmp_path / f"{number}.txt.gz").open("wb") as stream:
            stream.truncate(1_000_000)
    _, units = units_of(tmp_path, 100_000)
    shares = share_out(units, ranks=ranks)
    loads = [share.text_bytes for share in shares]
    assert sum(loads) == pytest.approx(files * 4_000_000)
    assert max(loads) <= 1.26 * sum(loads) / ranks
    read = [share.stream.source for share in itertools.chain(*(share.streams for share in shares))]
    assert len(read) <= files + 4 * ranks  # a file that several ranks share is decompressed by each of them


def test_each_chunk_of_a_stream_belongs_to_one_rank():
    stream = Stream(0, 0, 1000)
    share, other = share_out([stream], ranks=2)
    taken = [
        [number for number in range(100) if any(each.has(number) for each in own.streams)] for own in (share, other)
    ]
    assert sorted(itertools.chain(*taken)) == list(range(100))
    assert [len(each) for each in taken] == [50, 50]
    assert share.streams[0].stream == stream


@pytest.mark.parametrize("group", [7, 40, 1000])
@pytest.mark.parametrize("part_bytes", [50, 500, 10_000])
def test_every_row_of_a_table_is_in_one_part_also_of_big_groups(tmp_path, group, part_bytes):
    lines = sentences(100)
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "a.parquet", row_group_size=group)
    sources, units = units_of(tmp_path, part_bytes)
    assert [document for part in units for document in documents_of(part, sources)] == lines
    if part_bytes == 50:
        assert len(units) > 50  # a row group that holds everything is no obstacle


def test_rows_of_a_data_set_are_cut_into_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "wiki").mkdir()
    lines = sentences(50)
    pyarrow.parquet.write_table(pyarrow.table({"text": lines}), tmp_path / "wiki/train.parquet")
    sources = [opened(source) for source in find_sources([f"hub:{tmp_path}/wiki"])]
    units = cut(sources, text_field="text", part_bytes=500)
    assert len(units) > 5
    assert [document for part in units for document in documents_of(part, sources)] == lines


CUT = """
import sys
from distilcb.data.corpus import find_sources
from distilcb.data.parts import cut
print(*cut(find_sources(sys.argv[1:]), text_field="text", part_bytes=700), sep="\\n")
"""


def test_the_cut_depends_on_the_sources_alone(tmp_path):
    """Nor on cores, ranks, the time, or Python's hashes, which differ from process to process."""
    for folder in ("one", "other/place"):
        (tmp_path / folder).mkdir(parents=True)
        write_lines(tmp_path / folder / "a.txt", sentences(100))
        for number in range(9):
            write_lines(tmp_path / folder / f"b{number}.txt", sentences(2, seed=number))
        (tmp_path / folder / "c.txt.gz").write_bytes(gzip.compress(b"x\n" * 4000, mtime=0))
    expected = [str(unit) for unit in units_of(tmp_path / "one", 700)[1]]
    assert len(expected) > 10
    first_core = min(os.sched_getaffinity(0))
    for seed, ranks in (("1", "1"), ("2", "7")):
        environ = os.environ | {"PYTHONHASHSEED": seed, "WORLD_SIZE": ranks, "SLURM_NTASKS": ranks}
        found = subprocess.run(
            [sys.executable, "-c", CUT, tmp_path / "other/place"],
            cwd=REPOSITORY,
            env=environ,
            preexec_fn=lambda: os.sched_setaffinity(0, {first_core}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert found.stdout.splitlines() == expected


@pytest.mark.parametrize("bad_line", [0, 1, 57, 99])
def test_a_fault_in_a_stretch_of_a_file_names_its_line(tmp_path, bad_line):
    lines = [json.dumps({"text": text}) for text in sentences(100)]
    lines[bad_line] = "{"
    write_lines(tmp_path / "a.jsonl", lines)
    sources, units = units_of(tmp_path, 800)
    with pytest.raises(DataError, match=rf"a\.jsonl, line {bad_line + 1}: not JSON"):
        list(itertools.chain(*(documents_of(part, sources) for part in units)))


@pytest.mark.parametrize("bad_line", [0, 57, 99])
def test_a_fault_in_a_chunk_of_a_stream_names_its_line(tmp_path, bad_line):
    lines = [json.dumps({"text": text}) for text in sentences(100)]
    lines[bad_line] = json.dumps({"other": ""})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    sources, units = units_of(tmp_path, 800)
    parts = parts_in_order(units, sources, part_bytes=800)
    assert len(parts) > 5
    with pytest.raises(DataError, match=rf"a\.jsonl\.gz, line {bad_line + 1}: came \['other'\], needed a text"):
        list(itertools.chain(*(documents_of(part, sources) for part in parts)))


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_ranks_that_share_a_compressed_file_count_its_bytes_once(tmp_path, ranks):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(os.urandom(200_000).hex("\n", 40).encode()))
    sources, units = units_of(tmp_path, 20_000)
    parts = parts_in_order(units, sources, part_bytes=20_000, ranks=ranks)
    assert len(parts) > 10
    assert sum(part.size for part in parts) == (tmp_path / "a.txt.gz").stat().st_size


@pytest.mark.parametrize("name", ["a.jsonl.txt", "a.txt.v2.txt"])
def test_a_plain_file_with_another_formats_name_within_its_own_is_cut(tmp_path, name):
    lines = sentences(100)
    write_lines(tmp_path / name, lines)
    sources, units = units_of(tmp_path, 700)
    assert len(units) > 5
    assert list(itertools.chain(*(documents_of(part, sources) for part in units))) == lines


def test_chunks_hold_whole_lines_and_take_the_whole_file(tmp_path):
    text = "".join(f"{line}\n" for line in sentences(500)).encode()
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(text))
    chunks, sizes = zip(*read_chunks(path, chunk_bytes=1000), strict=True)
    assert b"".join(chunk.text for chunk in chunks) == text
    assert all(1000 <= len(chunk.text) < 1300 and chunk.text.endswith(b"\n") for chunk in chunks[:-1])
    assert sum(sizes) == path.stat().st_size
    assert [chunk.lines_before for chunk in chunks[:3]] == [
        0,
        chunks[0].text.count(b"\n"),
        chunks[0].text.count(b"\n") + chunks[1].text.count(b"\n"),
    ]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("xz", lzma.compress), ("zst", zstandard.compress)]
)
@pytest.mark.parametrize("chunk_bytes", [1, 4_000, 60_000, 1 << 20])
def test_the_chunks_of_a_file_take_all_its_bytes_also_those_after_the_text(tmp_path, suffix, compress, chunk_bytes):
    text = os.urandom(60_000).hex("\n", 500).encode() + b"\n"
    path = tmp_path / f"a.txt.{suffix}"
    path.write_bytes(compress(text) + compress(b"") * 2000)
    chunks, sizes = zip(*read_chunks(path, chunk_bytes=chunk_bytes), strict=True)
    assert b"".join(chunk.text for chunk in chunks) == text
    assert sum(sizes) == path.stat().st_size
    assert min(sizes) >= 0


def test_a_stream_that_ends_in_the_middle_is_refused_by_name(tmp_path):
    whole = gzip.compress("\n".join(sentences(500)).encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[: len(whole) // 2])
    sources, units = units_of(tmp_path, 1000)
    with pytest.raises(DataError, match=r"a\.txt\.gz: .*Fetch or make the file again"):
        list(parts_of_share(share_out(units, ranks=1)[0], sources, part_bytes=1000, processes=1))
