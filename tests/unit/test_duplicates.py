"""Documents that were there before are left out, the first one stays, whatever the cut and whoever works."""

import gzip
import resource

import numpy as np
import pytest
import zstandard
from test_prepare import Numerals, all_blocks, files_of, random_numerals

from distilcb.data import duplicates, working_folder
from distilcb.data.blocks import read_description
from distilcb.data.packing import PartReader
from distilcb.data.parts import cut
from distilcb.data.prepare import prepare
from distilcb.errors import DataError

EOS = 1


def corpus(folder):
    """Four files of documents of which about half were there before, one file twice; all documents in their order."""
    generator = np.random.default_rng(3)
    different = random_numerals(700, longest=12)
    documents = []
    for number, suffix in enumerate(("txt", "txt.gz", "txt", "txt.zst")):
        chosen = [different[place] for place in generator.integers(len(different), size=500)]
        text = "".join(f"{document}\n" for document in chosen).encode()
        packed = {"txt": text, "txt.gz": gzip.compress(text), "txt.zst": zstandard.compress(text)}[suffix]
        (folder / f"{number}.{suffix}").write_bytes(packed)
        documents += chosen
    return documents


def tokens_of(documents):
    return [int(word) for document in documents for word in [*document.split(), EOS]]


def stream(folder):
    return all_blocks(folder)[:, 1:-1].ravel()


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    return folder, corpus(folder)


def test_what_stays_are_the_first_of_each_in_their_order(text, tmp_path):
    folder, documents = text
    made = prepare([str(folder)], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16, drop_duplicates=True)
    kept = list(dict.fromkeys(documents))
    assert len(kept) < 0.5 * len(documents)
    assert (made.documents, made.dropped["duplicate_documents"]) == (len(kept), len(documents) - len(kept))
    found = stream(tmp_path / "out")
    assert found.tolist() == tokens_of(kept)[: found.size]
    assert made.options["drop_duplicates"] is True


@pytest.mark.parametrize("compared_at_once", [1 << 24, 100])
@pytest.mark.parametrize("processes", [1, 2])
def test_however_it_is_cut_and_whoever_works_as_many_stay(text, tmp_path, monkeypatch, processes, compared_at_once):
    monkeypatch.setattr(duplicates, "_COMPARED_AT_ONCE", compared_at_once)
    folder, documents = text
    how = {"tokenizer": Numerals(), "seq_len": 8, "part_bytes": 1500, "drop_duplicates": True}
    made = prepare([str(folder)], output=tmp_path / "out", processes=processes, **how)
    assert made.documents == len(set(documents))
    prepare([str(folder)], output=tmp_path / "again", **how)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "again")


def test_without_the_option_all_stay_and_nothing_is_said_of_duplicates(text, tmp_path):
    folder, documents = text
    made = prepare([str(folder)], tokenizer=Numerals(), output=tmp_path / "out", seq_len=16)
    assert made.documents == len(documents)
    assert "duplicate_documents" not in made.dropped
    assert "drop_duplicates" not in made.options


def test_documents_that_are_too_short_are_counted_as_such_and_not_as_duplicates(text, tmp_path):
    folder, documents = text
    how = {"tokenizer": Numerals(), "seq_len": 16, "min_characters": 12, "drop_duplicates": True}
    made = prepare([str(folder)], output=tmp_path / "out", **how)
    long = [document for document in documents if len(document) >= 12]
    assert made.documents == len(set(long))
    assert made.dropped["short_documents"] == len(documents) - len(long)
    assert made.dropped["duplicate_documents"] == len(long) - len(set(long))


def test_a_stopped_start_goes_on_from_the_hashes_that_are_there(text, tmp_path, monkeypatch):
    folder, documents = text
    how = {"tokenizer": Numerals(), "seq_len": 16, "drop_duplicates": True, "part_bytes": 1500}

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distilcb.data.prepare.find_duplicates", die)
        with pytest.raises(KeyboardInterrupt):
            prepare([str(folder)], output=tmp_path / "out", **how)
    (left,) = tmp_path.glob(".out.*.tmp")
    before = {path.name: path.stat().st_mtime_ns for path in left.glob("*.places")}
    assert len(before) > 4
    seen = []
    real = duplicates.HashMaker._make
    monkeypatch.setattr(duplicates.HashMaker, "_make", lambda *words: seen.append(words) or real(*words))
    prepare([str(folder)], output=tmp_path / "out", **how)
    assert not seen
    assert read_description(tmp_path / "out").documents == len(set(documents))


def test_text_that_grows_between_its_two_readings_is_told(tmp_path, monkeypatch):
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{document}\n" for document in random_numerals(100)))
    look = duplicates.find_duplicates

    def grow(*words, **more):
        text.write_text("10 11\n" * 200 + text.read_text())
        return look(*words, **more)

    monkeypatch.setattr("distilcb.data.prepare.find_duplicates", grow)
    with pytest.raises(DataError, match="more documents than when they were looked through for duplicates"):
        prepare([str(text)], tokenizer=Numerals(), output=tmp_path / "out", seq_len=8, drop_duplicates=True)


def test_hashes_that_another_node_has_written_and_nobody_sees_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(working_folder, "_FILES_ARE_SEEN_WITHIN_SECONDS", 0.1)
    with pytest.raises(DataError, match="is not seen here: is it one file system on all nodes"):
        duplicates.find_duplicates(tmp_path, ["00000.00000"])


@pytest.fixture
def hashed(tmp_path):
    """A folder, a maker that has hashed one part into it, and the part."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"{document}\n" for document in random_numerals(100)))
    (part,) = cut([text], text_field="text")
    maker = duplicates.HashMaker(PartReader((text,), "text"), tmp_path)
    maker(part)
    return tmp_path, maker, part


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("suffixes", [(".hashes",), (".places",), (".hashes", ".places")])
def test_hashes_that_a_full_disk_has_cut_are_made_again(hashed, suffixes, share):
    folder, maker, part = hashed
    paths = [folder / f"{part.name}{suffix}" for suffix in suffixes]
    whole = [path.read_bytes() for path in paths]
    for path, data in zip(paths, whole, strict=True):
        path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match="does not hold all that was written"):
        duplicates.find_duplicates(folder, [part.name])
    maker(part)
    assert [path.read_bytes() for path in paths] == whole
    assert duplicates.find_duplicates(folder, [part.name]) == 100 - len(set(random_numerals(100)))


def test_a_part_without_documents_is_hashed_once(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("\n" * 10)
    (part,) = cut([tmp_path / "a.txt"], text_field="text")
    maker = duplicates.HashMaker(PartReader((tmp_path / "a.txt",), "text"), tmp_path)
    maker(part)
    monkeypatch.setattr(duplicates.HashMaker, "_make", None)
    maker(part)
    assert duplicates.find_duplicates(tmp_path, [part.name]) == 0
    assert duplicates.duplicates_of(tmp_path, part.name).shape == (0,)


def test_a_disk_that_is_full_is_told_and_leaves_no_hashes(hashed):
    folder, maker, part = hashed
    for path in folder.glob("*s"):
        path.unlink()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    try:
        with pytest.raises(DataError, match="cannot be written"):
            maker(part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert duplicates._HashedPart.find(folder, part.name) is None


def test_marks_of_duplicates_that_are_cut_are_told(hashed):
    folder, _, part = hashed
    duplicates.find_duplicates(folder, [part.name])
    bits = folder / "duplicates.bits"
    bits.write_bytes(bits.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"duplicates\.bits does not hold all that was written"):
        duplicates.duplicates_of(folder, part.name)
