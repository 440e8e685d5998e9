"""From documents to packed blocks on disk: nothing lost, nothing half written, and opened as it was written."""

import errno
import gzip
import itertools
import json
import lzma
import os
import stat
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from filelock import SoftFileLock, Timeout

import distilcb
from distilcb.config import REPOSITORY
from distilcb.data import packing, request, tables
from distilcb.data.blocks import Blocks, RandomBlocks, check_fits, is_prepared, read_description
from distilcb.data.data_report import write_report
from distilcb.data.prepare import _sample, prepare, prepare_cached
from distilcb.data.request import How, plan_of
from distilcb.data.tokenizer import TextTokenizer, Vocabulary
from distilcb.data.working_folder import _try_to_make_a_file
from distilcb.errors import ConfigError, DataError

BOS, EOS, MASK, UNK = 0, 1, 2, 3
TEXT = REPOSITORY / "recipes/mini/text/train"
CORPUS = REPOSITORY.parent / "shared/data/corpus"
ARROW = "blocks-00000.arrow"


class Numerals:
    """A tokenizer of texts such as "10 11 12", whose token ids they are."""

    folder = "numerals"

    def __init__(self, size=100, fingerprint="numerals"):
        starts = np.ones(size, dtype=bool)
        self.vocabulary = Vocabulary(size, BOS, EOS, MASK, np.array([BOS, EOS, MASK, UNK]), starts, fingerprint, UNK)
        self.calls = 0

    def encode(self, documents):
        self.calls += 1
        return [[int(word) for word in document.split()] for document in documents]

    def pieces(self, ids):
        return list(map(str, ids))


@pytest.fixture(scope="module")
def teacher():
    return TextTokenizer(str(REPOSITORY / "recipes/mini/teacher"))


@pytest.fixture(scope="module")
def prepared(teacher, tmp_path_factory):
    """The mini recipe's text in blocks of 64."""
    output = tmp_path_factory.mktemp("prepared") / "blocks"
    prepare([str(TEXT)], tokenizer=teacher, output=output, seq_len=64)
    return output


def write_lines(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def random_numerals(documents, *, size=100, seed=0, lowest=4, longest=30):
    generator = np.random.default_rng(seed)
    return [
        " ".join(map(str, generator.integers(lowest, size, generator.integers(1, longest)))) for _ in range(documents)
    ]


def all_blocks(folder):
    blocks = Blocks(folder)
    return blocks.read(np.arange(len(blocks)))


def files_of(folder):
    """Names and bytes of what a folder holds, but for the report, which tells times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


def snapshot(folder):
    """Names, bytes and times of everything in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.rglob("*")) if path.is_file()}


# Packing


def test_documents_are_packed_as_by_hand(tmp_path):
    text = write_lines(tmp_path / "a.txt", ["10 11 12", "13 14", "", "15 16 17 18 19"])
    description = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=8)
    assert all_blocks(tmp_path / "out").tolist() == [
        [BOS, 10, 11, 12, EOS, 13, 14, EOS],
        [BOS, EOS, 15, 16, 17, 18, 19, EOS],
    ]
    assert description.blocks == 2
    assert description.tokens == 16
    assert description.documents == 3
    assert description.dropped == {"tokens_at_the_end": 1, "blocks_of_special_tokens": 0}
    assert description.damage == {"empty_documents": 1, "undecodable_documents": 0, "control_characters": 0}


@pytest.mark.parametrize("seq_len", [8, 9, 64, 250])
def test_the_blocks_tokens_are_the_documents_with_one_separator_after_each(tmp_path, seq_len):
    lines = random_numerals(300)
    text = write_lines(tmp_path / "a.txt", lines)
    description = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=seq_len)
    blocks = all_blocks(tmp_path / "out")
    stream = [token for line in lines for token in [*map(int, line.split()), EOS]]
    assert blocks.shape == (len(stream) // (seq_len - 2), seq_len)
    assert (blocks[:, 0] == BOS).all()
    assert (blocks[:, -1] == EOS).all()
    inner = blocks[:, 1:-1].ravel().tolist()
    assert inner == stream[: len(inner)]
    assert description.dropped["tokens_at_the_end"] == len(stream) - len(inner) < seq_len - 2


def test_the_blocks_of_french_text_decode_to_the_text(teacher, prepared):
    stream = all_blocks(prepared)[:, 1:-1].ravel()
    ends = np.flatnonzero(stream == teacher.vocabulary.eos_id)
    parts = np.split(stream, ends + 1)[:-1]  # the last document may be cut
    documents = [line for path in sorted(TEXT.iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(parts) >= 100
    decoded = [teacher.hugging_face.decode(part[:-1]).strip() for part in parts]
    intact = [(d, text) for d, text in zip(documents, decoded, strict=False) if "<unk>" not in text]
    assert len(intact) > len(parts) / 2
    for document, text in intact:
        assert text == " ".join(unicodedata.normalize("NFKC", document).split())


def test_every_token_is_in_a_block_or_counted_as_dropped(teacher, prepared):
    made = read_description(prepared)
    lines = [line for path in sorted(TEXT.iterdir()) for line in path.read_text(encoding="utf-8").splitlines()]
    tokens = sum(map(len, teacher.encode(lines)))
    blocks_cut = made.blocks + made.dropped["blocks_of_special_tokens"]
    assert tokens + made.documents == blocks_cut * 62 + made.dropped["tokens_at_the_end"]


def test_token_counts_are_those_of_the_blocks(prepared, teacher):
    blocks = Blocks(prepared)
    recount = np.bincount(all_blocks(prepared).ravel(), minlength=teacher.vocabulary.size)
    assert np.array_equal(blocks.token_counts, recount)
    assert blocks.token_counts.shape == (teacher.vocabulary.size,)
    assert blocks.token_counts.sum() == blocks.description.tokens


@pytest.mark.parametrize("batch_documents", [1, 7, 10_000])
def test_blocks_do_not_depend_on_how_many_documents_are_tokenized_at_once(tmp_path, monkeypatch, batch_documents):
    text = write_lines(tmp_path / "a.txt", random_numerals(400))
    expected = prepare([text], tokenizer=Numerals(), output=tmp_path / "whole", seq_len=16)
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", batch_documents)
    monkeypatch.setattr(packing, "_BATCH_BLOCKS", batch_documents)
    found = prepare([text], tokenizer=Numerals(), output=tmp_path / "parts", seq_len=16)
    assert np.array_equal(all_blocks(tmp_path / "whole"), all_blocks(tmp_path / "parts"))
    assert expected == found


def test_a_document_without_tokens_leaves_no_separator(tmp_path):
    class Deaf(Numerals):
        def encode(self, documents):
            return [[] if 99 in ids else ids for ids in super().encode(documents)]

    text = write_lines(tmp_path / "a.txt", ["10 11", "99", "12 13 14"] * 4)
    description = prepare([text], tokenizer=Deaf(), output=tmp_path / "out", seq_len=9)
    assert all_blocks(tmp_path / "out")[0].tolist() == [BOS, 10, 11, EOS, 12, 13, 14, EOS, EOS]
    assert description.documents == 8


@pytest.mark.parametrize(("size", "dtype"), [(100, "uint16"), (1 << 16, "uint16"), ((1 << 16) + 1, "int32")])
def test_tokens_are_stored_in_two_bytes_where_the_vocabulary_allows(tmp_path, size, dtype):
    tokenizer = Numerals(size)
    lines = [*random_numerals(50, size=size), f"{size - 1} {size // 2} {size - 2}"] * 2
    prepare([write_lines(tmp_path / "a.txt", lines)], tokenizer=tokenizer, output=tmp_path / "out", seq_len=12)
    with pyarrow.ipc.open_stream(tmp_path / "out" / ARROW) as reader:
        assert str(reader.schema.field("input_ids").type.value_type) == dtype
    inner = all_blocks(tmp_path / "out")[:, 1:-1].ravel().tolist()
    assert inner == [token for line in lines for token in [*map(int, line.split()), EOS]][: len(inner)]
    assert size - 1 in inner
    assert Blocks(tmp_path / "out").token_counts[size - 1] >= 1


def test_blocks_that_are_mostly_special_tokens_are_dropped_and_counted(tmp_path):
    good = [f"{i} {i + 1} {i + 2}" for i in range(10, 40)]
    text = write_lines(tmp_path / "a.txt", [" ".join([str(UNK)] * 100), *good, f"{UNK} {UNK} 9"])
    description = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=12)
    blocks = all_blocks(tmp_path / "out")
    # 10 inner tokens: 100 <unk> fill ten blocks; then a separator, and 30 documents of 4 with theirs.
    assert description.dropped["blocks_of_special_tokens"] == 10
    assert blocks[0].tolist() == [BOS, EOS, 10, 11, 12, EOS, 11, 12, 13, EOS, 12, EOS]
    assert not (blocks == UNK).any()
    assert Blocks(tmp_path / "out").token_counts[UNK] == 0
    assert (blocks > UNK).sum(1).min() >= 6  # enough for the highest rate, half of the inner tokens


@pytest.mark.parametrize("rate_of_ordinary", [0.3, 0.5, 0.6, 0.9])
def test_every_block_that_is_kept_can_give_half_of_its_tokens_to_a_mask(tmp_path, rate_of_ordinary):
    generator = np.random.default_rng(0)
    tokens = np.where(generator.random(4000) < rate_of_ordinary, generator.integers(4, 100, 4000), UNK)
    text = write_lines(tmp_path / "a.txt", [" ".join(map(str, tokens)), " ".join(["9"] * 100)])
    description = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=22)
    assert (all_blocks(tmp_path / "out") > UNK).sum(1).min() > 10
    assert description.blocks + description.dropped["blocks_of_special_tokens"] == (4000 + 1 + 100 + 1) // 20


def test_text_in_a_script_that_the_tokenizer_lacks_is_dropped_and_counted(teacher, tmp_path):
    strange, known = "漢\n字\n" * 300, "Le chat dort sur le toit de la maison.\n" * 30
    (tmp_path / "a.txt").write_text(strange + known, encoding="utf-8")
    description = prepare([str(tmp_path)], tokenizer=teacher, output=tmp_path / "out", seq_len=32)
    # A line is "▁", <unk> and the separator: two of three tokens are special.
    assert description.dropped["blocks_of_special_tokens"] == 600 * 3 // 30
    assert teacher.vocabulary.special_ids.size
    unknown = teacher.hugging_face.unk_token_id
    assert not (all_blocks(tmp_path / "out") == unknown).any()


def test_text_that_fills_no_block_is_refused_and_says_how_much_there_was(tmp_path):
    text = write_lines(tmp_path / "a.txt", ["10 11 12", "13 14"])
    with pytest.raises(DataError, match="2 documents with 5 tokens fill no block of 32 tokens"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=32)
    with pytest.raises(DataError, match=r"smaller seq_len\. 1 documents are shorter than min_characters"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=32, min_characters=6)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


@pytest.mark.parametrize("seq_len", [-5, 0, 2, 7])
def test_blocks_of_fewer_than_eight_tokens_are_refused(tmp_path, seq_len):
    text = write_lines(tmp_path / "a.txt", ["10 11 12"])
    with pytest.raises(ConfigError, match=f"seq_len={seq_len} tokens: a block needs 8 or more"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=seq_len)


@pytest.mark.parametrize(
    ("name", "part_bytes"),
    [("a.txt", 1 << 23), ("a.txt", 10_000), ("a.jsonl", 1 << 20), ("a.parquet", 1 << 23), ("hub", 10_000)],
)
def test_the_sample_that_judges_a_faster_tokenizer_is_from_all_over_the_text(tmp_path, monkeypatch, name, part_bytes):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    lines = [f"{number} " + "mot " * (number % 50) for number in range(40_000)]
    folder = tmp_path / "wiki"
    folder.mkdir()
    if name == "a.txt":
        write_lines(folder / name, lines)
    elif name == "a.jsonl":
        write_lines(folder / name, [json.dumps({"text": line}) for line in lines])
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": lines}), folder / "train.parquet", row_group_size=2000)
    named = f"hub:{folder}" if name == "hub" else str(folder)
    plan = plan_of([named], How(Numerals(), 16, "text", part_bytes=part_bytes))
    sample = list(_sample(plan, "text", skip_damaged=False))
    numbers = {int(document.split()[0]) for document in sample}
    assert {number // 2000 for number in numbers} == set(range(20))
    assert len(sample) <= 33 * 20
    assert sample == list(_sample(plan, "text", skip_damaged=False))


def test_the_sample_has_the_beginning_of_each_file_whatever_its_size(tmp_path):
    write_lines(tmp_path / "a.txt", ["mot"] * 100_000)
    for number in range(5):
        write_lines(tmp_path / f"b{number}.txt", [f"petit {number}"])
        (tmp_path / f"c{number}.txt.gz").write_bytes(gzip.compress(b"court %d" % number))
    (tmp_path / "d.txt").touch()
    plan = plan_of([str(tmp_path)], How(Numerals(), 16, "text", part_bytes=1000))
    sample = set(_sample(plan, "text", skip_damaged=False))
    assert sample == {"mot", *(f"{word} {number}" for word in ("petit", "court") for number in range(5))}


def test_a_compressed_table_is_opened_once_for_the_sample(tmp_path, monkeypatch):
    """It is unpacked whole each time."""
    table = pyarrow.table({"text": [f"{number} mot" for number in range(5000)]})
    with gzip.open(tmp_path / "a.parquet.gz", "wb") as stream:
        pyarrow.parquet.write_table(table, stream, row_group_size=100)
    plan = plan_of([str(tmp_path)], How(Numerals(), 16, "text", part_bytes=1000))
    opened, open_table = [], tables.open_table
    monkeypatch.setattr(tables, "open_table", lambda path: opened.append(path) or open_table(path))
    assert list(_sample(plan, "text", skip_damaged=False)) == [f"{number} mot" for number in range(20)]
    assert len(opened) == 1


def test_a_damaged_file_is_told_by_who_packs_it_and_not_by_who_looks_at_a_little(tmp_path, caplog):
    write_lines(tmp_path / "a.txt", random_numerals(50))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"20\n" * 9)[:-9])
    plan = plan_of([str(tmp_path)], How(Numerals(), 16, "text", part_bytes=1000, skip_damaged=True))
    list(_sample(plan, "text", skip_damaged=True))
    assert "damaged" not in caplog.text
    prepare([str(tmp_path)], tokenizer=Numerals(), output=tmp_path / "out", seq_len=8, skip_damaged=True)
    assert caplog.text.count("b.txt.gz is damaged") == 1


def test_a_line_of_five_megabytes_is_packed_whole(teacher, tmp_path):
    words = sorted((p[1:] for p in teacher.hugging_face.get_vocab() if p[:1] == "▁" and p[1:].isalpha()), key=len)[
        -100:
    ]
    line = " ".join(words * (5_000_000 // len(" ".join(words)) + 1))
    assert len(line.encode()) > 5_000_000
    text = write_lines(tmp_path / "a.txt", [line])
    description = prepare([text], tokenizer=teacher, output=tmp_path / "out", seq_len=512)
    assert description.documents == 1
    (ids,) = teacher.encode([" ".join(words)])
    inner = all_blocks(tmp_path / "out")[:, 1:-1].ravel()
    assert np.array_equal(inner, np.resize(ids, inner.size))


def test_dirty_text_is_survived_and_its_damage_described(teacher, tmp_path):
    lines = (TEXT / "lettres.txt").read_bytes().splitlines()
    spelled = "il écrit </s> puis <mask>, <s>, <pad> et ＜mask＞".encode()
    dirty = [
        b"\xef\xbb\xbf" + lines[0],
        b"",
        lines[1] + b"\x00\x00",
        b"caf\xe9",
        b" \t ",
        b"\xff\xfe\x00",
        spelled,
        *lines,
    ]
    (tmp_path / "a.txt").write_bytes(b"\n".join(dirty))
    (tmp_path / "0.jsonl").write_text('{"text": "coup\\u00e9 \\ud83d net"}\n{"text": null}\n')
    description = prepare([str(tmp_path)], tokenizer=teacher, output=tmp_path / "out", seq_len=64)
    assert description.damage == {"empty_documents": 3, "undecodable_documents": 3, "control_characters": 3}
    # The line of bytes that mean nothing holds no token, so it is no document.
    assert sum(source["documents"] for source in description.sources) == 5 + len(lines) + 1
    assert description.documents == 4 + len(lines) + 1
    inner = all_blocks(tmp_path / "out")[:, 1:-1]
    special = set(teacher.vocabulary.special_ids.tolist())
    found = special & set(inner.ravel().tolist())
    assert found <= {teacher.vocabulary.eos_id, teacher.hugging_face.unk_token_id}
    stream = inner.ravel()
    ends = np.flatnonzero(stream == teacher.vocabulary.eos_id)
    assert ends.size in (description.documents, description.documents - 1)  # the last one may be cut
    (first,) = teacher.encode([lines[0].decode()])
    assert stream[ends[0] + 1 : ends[1]].tolist() == first  # the byte order mark left no token


# The description and the files


def test_the_description_says_what_was_read_and_how(tmp_path):
    (tmp_path / "été").mkdir()
    one = write_lines(tmp_path / "été/a.txt", ["10 11 12", "", "13 14 15 16"])
    two = write_lines(tmp_path / "été/b.jsonl", ['{"contenu": "20 21 22"}'])
    output = tmp_path / "out"
    made = prepare([str(tmp_path / "été")], tokenizer=Numerals(), output=output, seq_len=8, text_field="contenu")
    assert made == read_description(output)
    assert made.sources == [
        {"path": one, "bytes": os.path.getsize(one), "documents": 2, "characters": 8 + 11},
        {"path": two, "bytes": os.path.getsize(two), "documents": 1, "characters": 8},
    ]
    assert (made.blocks, made.seq_len, made.vocab_size) == (2, 8, 100)
    assert (made.tokenizer, made.tokenizer_fingerprint) == ("numerals", "numerals")
    assert made.options == {"text_field": "contenu"}
    assert made.files == [ARROW]
    assert made.versions["distilcb"] == distilcb.__version__
    assert "été" in (output / "description.json").read_text(encoding="utf-8")
    assert json.loads((output / "description.json").read_text(encoding="utf-8")) == asdict(made)


def test_sources_are_read_in_the_order_of_their_names_on_the_command_line(tmp_path):
    names = [write_lines(tmp_path / name, [f"{i} {i} {i} {i} {i}"] * 2) for i, name in [(10, "b.txt"), (20, "a.txt")]]
    prepare(names, tokenizer=Numerals(), output=tmp_path / "out", seq_len=8)
    assert all_blocks(tmp_path / "out")[:, 1:6].tolist() == [[10] * 5, [10] * 5, [20] * 5, [20] * 5]


def test_the_folder_is_as_open_to_others_as_any_new_one(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(20))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=8)
    (tmp_path / "any").mkdir()
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == stat.S_IMODE((tmp_path / "any").stat().st_mode)


def test_any_tool_that_reads_arrow_reads_the_blocks(prepared, tmp_path):
    import datasets

    files = str(prepared / "*.arrow")
    rows = datasets.load_dataset("arrow", data_files=files, split="train", cache_dir=str(tmp_path))
    assert rows[:]["input_ids"] == all_blocks(prepared).tolist()


def test_rows_are_read_in_the_order_asked_for(prepared):
    blocks, whole = Blocks(prepared), all_blocks(prepared)
    rows = np.array([5, 0, len(blocks) - 1, 5, 17])
    found = blocks.read(rows)
    assert found.dtype == np.int64
    assert np.array_equal(found, whole[rows])
    assert np.array_equal(blocks.read(np.array([3])), whole[3:4])


# Whole or not at all


def test_the_same_text_gives_the_same_files(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    for name in ("one", "two"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / name, seq_len=16)
    one, two = (files_of(tmp_path / name) for name in ("one", "two"))
    assert one == two
    assert set(one) == {"description.json", "token_counts.npy", ARROW}
    assert {"report.json", "report.md"} <= {path.name for path in (tmp_path / "one").iterdir()}


def test_preparing_the_same_again_leaves_the_output_as_it_is(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    first = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    before, again = snapshot(tmp_path / "out"), Numerals()
    assert prepare([text], tokenizer=again, output=tmp_path / "out", seq_len=16) == first
    assert snapshot(tmp_path / "out") == before
    assert again.calls == 0


@pytest.mark.parametrize("change", ["text", "length", "tokenizer", "field"])
def test_an_output_that_holds_other_blocks_is_refused_and_untouched(tmp_path, change):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    before = snapshot(tmp_path / "out")
    if change == "text":
        write_lines(tmp_path / "a.txt", random_numerals(200, seed=1))
    with pytest.raises(DataError, match=r"out is there and holds something else: \d+ blocks of 16 tokens of 200 doc"):
        prepare(
            [text],
            tokenizer=Numerals(fingerprint="other" if change == "tokenizer" else "numerals"),
            output=tmp_path / "out",
            seq_len=17 if change == "length" else 16,
            text_field="contenu" if change == "field" else "text",
        )
    assert snapshot(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


@pytest.mark.parametrize("damage", ["gone", "short", "description", "empty description"])
def test_an_output_that_is_damaged_is_not_taken_for_done(tmp_path, damage):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    content = read_description(tmp_path / "out").content
    parts = tmp_path / f".out.{content[:16]}.tmp"  # as a start leaves that is killed when it has named the output
    parts.mkdir()
    write_lines(parts / "part.arrow", ["kept"])
    if damage == "gone":
        (tmp_path / "out" / ARROW).unlink()
    else:
        os.truncate(
            tmp_path / "out" / ("description.json" if "description" in damage else ARROW),
            0 if damage == "empty description" else 500,
        )
    with pytest.raises(DataError, match=r"out.*Move the folder aside or delete it, and prepare the text again"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    assert (parts / "part.arrow").exists()


@pytest.mark.parametrize("late", [False, True])
def test_what_another_start_makes_of_the_same_text_meanwhile_is_taken(tmp_path, monkeypatch, late):
    """On a file system whose locks do not lock; late: when all but the name is done."""
    text = write_lines(tmp_path / "a.txt", random_numerals(200, seed=7))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "first", seq_len=16)
    inode = (tmp_path / "first" / ARROW).stat().st_ino

    class Overtaken(Numerals):
        def encode(self, documents):
            if not self.calls and not late:
                (tmp_path / "first").rename(tmp_path / "out")
            return super().encode(documents)

    def overtaken(*values):
        (tmp_path / "first").rename(tmp_path / "out")
        write_report(*values)

    if late:
        monkeypatch.setattr("distilcb.data.assembly.write_report", overtaken)
    made = prepare([text], tokenizer=Overtaken(), output=tmp_path / "out", seq_len=16)
    assert made == read_description(tmp_path / "out")
    assert (tmp_path / "out" / ARROW).stat().st_ino == inode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_full_disk_is_no_reason_to_stop_waiting(tmp_path, monkeypatch):
    for code, message in ((errno.ENOSPC, "No space"), (errno.EDQUOT, "Quota")):
        monkeypatch.setattr("tempfile.TemporaryFile", raising(OSError(code, message)))
        _try_to_make_a_file(tmp_path)
    monkeypatch.setattr("tempfile.TemporaryFile", raising(OSError(errno.EACCES, "closed")))
    with pytest.raises(OSError, match="closed"):
        _try_to_make_a_file(tmp_path)


def raising(error):
    def refuse(**_):
        raise error

    return refuse


def test_blocks_on_a_file_system_that_is_ill_are_not_to_be_deleted(tmp_path, monkeypatch):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    monkeypatch.setattr("datasets.Dataset.from_file", lambda _: raising(OSError(errno.EIO, "I/O error"))())
    with pytest.raises(DataError, match="Once it can be read again the same command goes on") as told:
        Blocks(tmp_path / "out")
    assert "delete" not in str(told.value)


def test_parts_stay_where_what_the_cache_made_of_them_is_damaged(tmp_path):
    names = [write_lines(tmp_path / "a.txt", random_numerals(200))]
    how = {"tokenizer": Numerals(), "cache": tmp_path, "seq_len": 16, "text_field": "text"}
    output = prepare_cached(names, **how)
    parts = output.parent / f".{output.name}.{read_description(output).content[:16]}.tmp"
    parts.mkdir()
    (output / ARROW).unlink()
    with pytest.raises(DataError, match="Move the folder aside or delete it"):
        prepare_cached(names, **how)
    assert parts.exists()


def test_a_lock_that_is_held_is_waited_for_and_left_as_it_is(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "first", seq_len=16)
    content = read_description(tmp_path / "first").content
    held = tmp_path / f".out.{content[:16]}.lock"
    held.touch()  # as where the file system has no locks: that it is there is the lock
    waited = []

    class Lock(SoftFileLock):
        def acquire(self, timeout):
            try:
                return super().acquire(timeout=0.1)
            except Timeout:
                assert not waited, "the lock has been made again"
                waited.append(timeout)
                held.unlink()  # its holder ends just now
                raise

    monkeypatch.setattr("distilcb.data.working_folder.FileLock", Lock)
    assert prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16).blocks
    assert waited
    assert caplog.text.count("another process prepares the same text") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "first", "out"]


def test_an_output_that_another_start_has_taken_meanwhile_is_told_as_that(tmp_path):
    text, other = (write_lines(tmp_path / name, random_numerals(200, seed=7)) for name in ("a.txt", "b.txt"))
    write_lines(tmp_path / "b.txt", random_numerals(300))

    class Overtaken(Numerals):
        def encode(self, documents):
            if not self.calls:
                prepare([other], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
            return super().encode(documents)

    with pytest.raises(DataError, match=r"out is there and holds something else.*of other text or with other options"):
        prepare([text], tokenizer=Overtaken(), output=tmp_path / "out", seq_len=16)
    assert read_description(tmp_path / "out").documents == 300


def test_a_folder_in_which_nothing_can_be_made_is_told_and_not_waited_for(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    with pytest.raises(DataError, match=r"/proc/.* cannot be written .*Name a folder in which files can be made"):
        prepare([text], tokenizer=Numerals(), output=Path("/proc/out"), seq_len=16)


def test_an_output_that_holds_other_files_or_is_a_file_is_refused_and_untouched(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    (tmp_path / "out").mkdir()
    write_lines(tmp_path / "out/thesis.tex", ["three years of work"])
    before = snapshot(tmp_path)
    for output in (tmp_path / "out", tmp_path / "a.txt"):
        with pytest.raises(DataError, match="is there and holds something else"):
            prepare([text], tokenizer=Numerals(), output=output, seq_len=16)
    assert snapshot(tmp_path) == before


def test_an_empty_output_folder_and_missing_parents_are_filled(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(20))
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "not/there/yet"):
        prepare([text], tokenizer=Numerals(), output=output, seq_len=8)
        assert len(Blocks(output)) > 0


@pytest.mark.parametrize("is_there", [True, False])
def test_an_output_that_is_a_link_stays_one_and_what_it_points_to_is_filled(tmp_path, is_there):
    text = write_lines(tmp_path / "a.txt", random_numerals(20))
    (tmp_path / "disk").mkdir()
    if is_there:
        (tmp_path / "disk/out").mkdir()
    (tmp_path / "link").symlink_to("disk/out")
    made = prepare([text], tokenizer=Numerals(), output=tmp_path / "link", seq_len=8)
    assert (tmp_path / "link").is_symlink()
    assert read_description(tmp_path / "disk/out") == made
    again = Numerals()
    assert prepare([text], tokenizer=again, output=tmp_path / "link", seq_len=8) == made
    assert again.calls == 0
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]


def test_an_output_that_is_a_mount_point_is_refused_before_the_work(tmp_path, monkeypatch):
    text, tokenizer = write_lines(tmp_path / "a.txt", random_numerals(20)), Numerals()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "out")
    with pytest.raises(DataError, match=r"out is a mount point and cannot be replaced: name .*out/blocks\."):
        prepare([text], tokenizer=tokenizer, output=tmp_path / "out", seq_len=8)
    assert tokenizer.calls == 0
    assert list((tmp_path / "out").iterdir()) == []
    assert len(prepare([text], tokenizer=tokenizer, output=tmp_path / "out/blocks", seq_len=8).files) == 1


def open_files(folder):
    """Files below the folder that this process holds open (and no memory map: those close with the last array)."""
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [target for link in links if link.exists() and str(target := os.readlink(link)).startswith(str(folder))]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(28, "No space left on device"), SystemExit(143)])
def test_an_interrupted_preparation_leaves_nothing_and_can_be_repeated(tmp_path, monkeypatch, interruption):
    class Interrupted(Numerals):
        def encode(self, documents):
            encoded = super().encode(documents)
            if self.calls == 5:
                assert any(path.suffix == ".tmp" for path in (tmp_path / "store").iterdir())
                raise interruption
            return encoded

    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 10)
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    output = tmp_path / "store/out"
    expected = interruption if isinstance(interruption, type) else type(interruption)
    with pytest.raises(expected):
        prepare([text], tokenizer=Interrupted(), output=output, seq_len=16)
    assert list((tmp_path / "store").iterdir()) == []
    if Path("/proc/self/fd").exists():
        assert open_files(tmp_path / "store") == []  # NFS cannot remove a file that is open
    assert prepare([text], tokenizer=Numerals(), output=output, seq_len=16).blocks == len(Blocks(output))


def test_a_fault_in_the_last_file_leaves_nothing(tmp_path):
    write_lines(tmp_path / "a.txt", random_numerals(2000))
    write_lines(tmp_path / "b.jsonl", ['{"text": "10"}', "{"])
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: not JSON"):
        prepare([str(tmp_path)], tokenizer=Numerals(), output=tmp_path / "store/out", seq_len=16)
    assert list((tmp_path / "store").iterdir()) == []


def test_text_that_is_touched_while_it_is_read_is_the_same(tmp_path, caplog):
    """As scripts do that keep files from being purged."""
    text = tmp_path / "a.txt"

    class Toucher(Numerals):
        def encode(self, documents):
            os.utime(text, ns=(0, 0))
            return super().encode(documents)

    write_lines(text, random_numerals(200))
    with caplog.at_level("INFO"):
        made = prepare([str(text)], tokenizer=Toucher(), output=tmp_path / "out", seq_len=16)
    assert made.documents == 200
    assert "a.txt was touched or written to meanwhile: hashing the text once more" in caplog.text


def test_parts_are_kept_where_it_cannot_be_told_whether_text_has_changed(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    write_lines(text, random_numerals(200))
    how = {"tokenizer": Numerals(), "output": tmp_path / "store/out", "seq_len": 16}

    def stale(source):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(source))

    with monkeypatch.context() as patched:
        plan_of_all = request.plan_of

        def plan_then_fail(*asked):
            plan = plan_of_all(*asked)
            patched.setattr(request, "_state_of", stale)
            return plan

        patched.setattr("distilcb.data.prepare.plan_of", plan_then_fail)
        with pytest.raises(
            DataError, match=r"Stale file handle: .*a\.txt.* The same command goes on once it can be read"
        ):
            prepare([str(text)], **how)
    monkeypatch.setattr(packing.PartMaker, "_make", lambda *_: pytest.fail("made again"))
    assert prepare([str(text)], **how).documents == 200


@pytest.mark.parametrize("change", ["longer", "same size", "gone"])
def test_text_that_changes_while_it_is_read_is_refused_by_name(tmp_path, monkeypatch, change):
    text = tmp_path / "a.txt"
    lines = random_numerals(200)

    class Meddler(Numerals):
        def encode(self, documents):
            if change == "gone":
                text.unlink(missing_ok=True)
            else:
                write_lines(text, [*lines, "10"] if change == "longer" else lines[::-1])
                os.utime(text, ns=(0, 0))
            return super().encode(documents)

    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 1000)
    write_lines(text, lines)
    with pytest.raises(DataError, match=r"a\.txt was written to or moved while it was read.*Start again when nothing"):
        prepare([str(text)], tokenizer=Meddler(), output=tmp_path / "store/out", seq_len=16)
    assert list((tmp_path / "store").iterdir()) == []
    write_lines(text, lines)
    assert prepare([str(text)], tokenizer=Numerals(), output=tmp_path / "store/out", seq_len=16).documents == 200


PACKED = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": lambda text: zstandard.compress(text, level=1)}


@pytest.mark.parametrize("part_bytes", [1 << 22, 20_000], ids=["one part", "chunks of a stream"])
@pytest.mark.parametrize("packing", PACKED)
def test_a_file_that_ends_in_the_middle_is_refused_or_gives_what_comes_before(tmp_path, packing, part_bytes):
    lines = random_numerals(60_000, seed=1)
    whole = PACKED[packing]("".join(f"{line}\n" for line in lines).encode())
    damaged = tmp_path / f"damaged.txt{packing}"
    damaged.write_bytes(whole[: len(whole) * 2 // 3])
    good = write_lines(tmp_path / "good.txt", random_numerals(500, seed=2))
    how = {"tokenizer": Numerals(), "seq_len": 16, "part_bytes": part_bytes}
    with pytest.raises(DataError, match=rf"damaged\.txt\{packing}: .*--skip_damaged"):
        prepare([good, str(damaged)], output=tmp_path / "refused", **how)
    made = prepare([good, str(damaged)], output=tmp_path / "out", skip_damaged=True, **how)
    assert made.damage["damaged_files"] == 1
    assert "damaged_records" not in made.damage
    assert 500 + 0.3 * len(lines) < made.documents < 500 + 0.7 * len(lines)
    assert made.options["skip_damaged"] is True


def test_a_broken_stream_of_nothing_is_counted(tmp_path):
    (tmp_path / "broken.txt.xz").write_bytes(b"\xfd7zXZ\x00 no more")
    good = write_lines(tmp_path / "good.txt", random_numerals(500))
    how = {"tokenizer": Numerals(), "seq_len": 16, "part_bytes": 2, "skip_damaged": True}
    made = prepare([good, str(tmp_path / "broken.txt.xz")], output=tmp_path / "out", **how)
    assert (made.documents, made.damage["damaged_files"]) == (500, 1)


@pytest.mark.parametrize("part_bytes", [1 << 22, 3000], ids=["one part", "many parts"])
@pytest.mark.parametrize("damage", ["no end", "pages", "no parquet"])
def test_a_damaged_table_is_refused_or_skipped_and_counted_once(tmp_path, damage, part_bytes):
    table = pyarrow.table({"text": random_numerals(6000, seed=1)})
    path = tmp_path / "damaged.parquet"
    pyarrow.parquet.write_table(table, path, row_group_size=3000, use_dictionary=False, data_page_size=1000)
    whole = path.read_bytes()
    later = len(whole) * 3 // 4
    path.write_bytes(
        {
            "no end": whole[:later],
            "pages": whole[:later] + b"\xff" * 5000 + whole[later + 5000 :],
            "no parquet": b"no parquet at all",
        }[damage]
    )
    good = write_lines(tmp_path / "good.txt", random_numerals(500, seed=2))
    how = {"tokenizer": Numerals(), "seq_len": 16, "part_bytes": part_bytes}
    with pytest.raises(DataError, match=r"damaged\.parquet: .*--skip_damaged"):
        prepare([good, str(path)], output=tmp_path / "refused", **how)
    made = prepare([good, str(path)], output=tmp_path / "out", skip_damaged=True, **how)
    assert made.damage["damaged_files"] == 1
    first_group = 3000 if damage == "pages" else 0
    assert 500 + first_group <= made.documents < 6500


def test_records_that_are_no_json_are_left_out_and_counted(tmp_path):
    lines = [json.dumps({"text": line}) for line in random_numerals(300)]
    text = write_lines(tmp_path / "a.jsonl", [*lines[:100], '{"text": "1 2', *lines[100:], '{"te'])
    made = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16, skip_damaged=True)
    assert (made.documents, made.damage["damaged_records"]) == (300, 2)
    with pytest.raises(DataError, match="line 101: not JSON"):
        prepare([text], tokenizer=Numerals(), output=tmp_path / "refused", seq_len=16)


@pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="needs Linux's /proc/self/mem, a file that reads as EIO"
)
def test_a_source_that_cannot_be_read_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Input/output error"):
        prepare([str(tmp_path / "a.txt")], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)


# The cache


def cached(names, cache, *, tokenizer=None, seq_len=16, text_field="text"):
    return prepare_cached(
        [str(name) for name in names],
        tokenizer=tokenizer or Numerals(),
        cache=cache,
        seq_len=seq_len,
        text_field=text_field,
    )


def test_the_cache_goes_by_what_decides_the_blocks(tmp_path):
    text, cache = tmp_path / "a.txt", tmp_path / "cache"
    write_lines(text, random_numerals(50))
    first = cached([text], cache)
    assert first.is_relative_to(cache)
    assert len(Blocks(first)) > 0
    folders = [
        first,
        cached([text], cache, seq_len=17),
        cached([text], cache, tokenizer=Numerals(fingerprint="other")),
        cached([text], cache, text_field="contenu"),
        cached([text], tmp_path / "cache2"),
    ]
    write_lines(text, random_numerals(50, seed=1))
    assert len({*folders, cached([text], cache)}) == 6
    write_lines(text, random_numerals(50))
    assert cached([text], cache) == first


@pytest.mark.parametrize("name", ["b.txt", "deep/a.txt", "a.v2.txt", "2024.01.15.txt", "a b.txt"])
def test_the_cache_knows_the_same_text_under_another_name(tmp_path, name):
    lines, again = random_numerals(50), Numerals()
    first = cached([write_lines(tmp_path / "a.txt", lines)], tmp_path / "cache")
    (tmp_path / "other/deep").mkdir(parents=True)
    second = cached([write_lines(tmp_path / "other" / name, lines)], tmp_path / "cache", tokenizer=again)
    assert second == first
    assert again.calls == 0


def test_the_cache_tells_apart_one_content_in_two_formats(tmp_path):
    line = '{"text": "10 11 12 13 14 15 16"}'

    class Lengths(Numerals):
        def encode(self, documents):
            return [[4 + len(document)] * 30 for document in documents]

    one, two = (write_lines(tmp_path / name, [line]) for name in ("a.txt", "a.jsonl"))
    folders = [cached([name], tmp_path / "cache", tokenizer=Lengths()) for name in (one, two)]
    assert folders[0] != folders[1]
    assert [all_blocks(folder)[0, 1] for folder in folders] == [4 + len(line), 4 + 20]


def test_the_cache_tells_apart_one_text_cut_into_files_elsewhere(tmp_path):
    lines = random_numerals(60)
    whole = cached([write_lines(tmp_path / "a.txt", lines)], tmp_path / "cache")
    parts = [write_lines(tmp_path / f"{i}.txt", lines[i * 20 : i * 20 + 20]) for i in range(3)]
    assert cached(parts, tmp_path / "cache") != whole
    assert cached(parts, tmp_path / "cache") != cached(parts[::-1], tmp_path / "cache")


def test_a_prepared_folder_is_taken_as_it_is(prepared, tmp_path, monkeypatch):
    assert cached([prepared], tmp_path) == prepared
    monkeypatch.setenv("HOME", str(prepared.parent))
    assert cached([f"~/{prepared.name}"], tmp_path) == prepared
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_ask_together_get_one_folder_that_one_of_them_made(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(2000))
    tokenizers = [Numerals() for _ in range(6)]
    with ThreadPoolExecutor(6) as ranks:
        folders = set(ranks.map(lambda tokenizer: cached([text], tmp_path / "cache", tokenizer=tokenizer), tokenizers))
    assert len(folders) == 1
    assert sum(tokenizer.calls > 0 for tokenizer in tokenizers) == 1
    assert not list(tmp_path.rglob("*.tmp"))


# Opening blocks


@pytest.fixture
def store(tmp_path):
    """A small prepared folder to spoil."""
    text = write_lines(tmp_path / "a.txt", random_numerals(200))
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    return tmp_path / "out"


def rewrite_description(folder, **changes):
    facts = json.loads((folder / "description.json").read_text())
    (folder / "description.json").write_text(json.dumps(facts | changes))


def test_a_folder_is_prepared_when_it_holds_a_description(store, tmp_path):
    assert is_prepared(store)
    assert not is_prepared(tmp_path)
    assert not is_prepared(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("name", [ARROW, "token_counts.npy", "description.json"])
def test_a_file_that_ends_in_the_middle_is_refused(store, name, share):
    data = (store / name).read_bytes()
    (store / name).write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"(?s)out.*prepare the text again"):
        Blocks(store)


@pytest.mark.parametrize("name", [ARROW, "token_counts.npy", "description.json"])
def test_a_missing_file_is_refused(store, name):
    (store / name).unlink()
    with pytest.raises(DataError, match=r"(?s)out.*prepare the text again"):
        Blocks(store)


@pytest.mark.parametrize("content", ["", "[]", "null", "{}", '{"format_version": 1}', '{"format_version": 1, "x": 2}'])
def test_a_description_of_something_else_is_refused(store, content):
    (store / "description.json").write_text(content)
    with pytest.raises(DataError, match=r"description\.json cannot be read"):
        Blocks(store)


def test_blocks_of_another_format_version_are_refused(store):
    rewrite_description(store, format_version=99)
    with pytest.raises(DataError, match="blocks of format 99, this version reads 1"):
        Blocks(store)


def test_a_number_of_blocks_that_the_description_does_not_give_is_refused(store):
    there = read_description(store).blocks
    rewrite_description(store, blocks=there + 1)
    with pytest.raises(DataError, match=rf"{there} blocks on disk, {there + 1} in description\.json"):
        Blocks(store)


def test_blocks_fit_a_run_with_their_length_and_tokenizer_only(store):
    blocks = Blocks(store)
    check_fits(blocks, seq_len=16, fingerprint="numerals", tokenizer="elsewhere")
    with pytest.raises(DataError, match=r"holds blocks of 16 tokens, data\.seq_len is 512\. Give --data\.seq_len 16"):
        check_fits(blocks, seq_len=512, fingerprint="numerals", tokenizer="numerals")
    with pytest.raises(DataError, match=r"another tokenizer \(numerals\) than camembert-base"):
        check_fits(blocks, seq_len=16, fingerprint="other", tokenizer="camembert-base")


def test_random_blocks_are_ordinary_words_between_separators_and_the_same_for_the_same_row():
    vocabulary = Numerals().vocabulary
    blocks = RandomBlocks(vocabulary, seq_len=32, blocks=500)
    rows = np.arange(500)
    whole = blocks.read(rows)
    assert len(blocks) == 500
    assert whole.shape == (500, 32)
    assert set(whole[:, 0]) == {BOS}
    assert set(whole[:, -1]) == {EOS}
    assert set(whole[:, 1:-1].ravel().tolist()) == set(range(4, 100))
    lot = np.random.default_rng(0).permutation(rows)[:50]
    assert np.array_equal(blocks.read(lot), whole[lot])
    assert np.unique(whole, axis=0).shape == whole.shape
    assert blocks.token_counts.shape == (100,)


# Real corpora


@pytest.mark.skipif(not (CORPUS / "fr_valid.txt.xz").exists(), reason=f"needs {CORPUS}/fr_valid.txt.xz")
def test_a_real_french_corpus_is_packed_without_loss(teacher, tmp_path):
    made = prepare([str(CORPUS / "fr_valid.txt.xz")], tokenizer=teacher, output=tmp_path / "out", seq_len=128)
    assert made.documents == 616  # as its own description says
    assert set(made.damage.values()) == {0}
    assert made.dropped["blocks_of_special_tokens"] == 0
    counts = Blocks(tmp_path / "out").token_counts
    assert counts[teacher.vocabulary.bos_id] == made.blocks
    assert abs(counts[teacher.vocabulary.eos_id] - made.blocks - made.documents) <= 1
    assert counts[teacher.hugging_face.unk_token_id] < 0.01 * made.tokens


@pytest.mark.skipif(
    not (CORPUS / "en_wikitext2_valid.txt.gz").exists(), reason=f"needs {CORPUS}/en_wikitext2_valid.txt.gz"
)
def test_a_real_corpus_that_spells_unk_and_holds_empty_lines_is_survived(teacher, tmp_path):
    name = str(CORPUS / "en_wikitext2_valid.txt.gz")
    made = prepare([name], tokenizer=teacher, output=tmp_path / "out", seq_len=128)
    assert made.documents + made.damage["empty_documents"] == 3760  # lines, as its own description says
    assert made.damage["empty_documents"] > 1000
    with gzip.open(name, "rt", encoding="utf-8") as stream:
        lines = [line for line in itertools.islice(stream, 1000) if "<unk>" in line]
    spelled, unknown = sum(line.count("<unk>") for line in lines), teacher.hugging_face.unk_token_id
    as_special = sum(ids.count(unknown) for ids in teacher.hugging_face(lines, add_special_tokens=False)["input_ids"])
    as_text = sum(ids.count(unknown) for ids in teacher.encode(lines))
    assert as_special - as_text == spelled > 1000
