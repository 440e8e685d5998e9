"""Sources of text: the same documents from every format, and faults that are named or survived, never passed over."""

import errno
import gc
import gzip
import json
import lzma
import os
import random
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from distilcb.data.corpus import find_sources, read_documents
from distilcb.data.damage import Damage, clean
from distilcb.errors import DataError

DOCUMENTS = ["Le chat dort.", "Noël à Ærø : 12 € — « ça »", "une ligne", "漢字 et 😀", "fin"]
FORMATS = [".txt", ".jsonl", ".parquet"]
COMPRESSIONS = ["", ".gz", ".xz", ".zst"]


def compress(data, compression):
    if compression == ".gz":
        return gzip.compress(data)
    if compression == ".xz":
        return lzma.compress(data)
    if compression == ".zst":
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def contents(documents, format_, field="text"):
    """The bytes of a file of documents."""
    if format_ == ".txt":
        return "".join(document + "\n" for document in documents).encode()
    if format_ == ".jsonl":
        return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(documents)).encode()
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), field: documents}), sink)
    return sink.getvalue().to_pybytes()


def write(path, documents=DOCUMENTS, field="text"):
    """Write documents as the file's name asks."""
    compression = path.suffix if path.suffix in COMPRESSIONS else ""
    format_ = path.with_suffix("").suffix if compression else path.suffix
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(compress(contents(documents, format_, field), compression))
    return path


def read(path, text_field="text"):
    """The documents of a file, and what was survived."""
    damage = Damage()
    documents = list(read_documents(path, text_field=text_field, damage=damage))
    return documents, {name: count for name, count in asdict(damage).items() if count}


def fault(path, text_field="text"):
    """The message of the fault that reading the file meets; it names the file."""
    with pytest.raises(DataError) as caught:
        read(path, text_field)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("format_", FORMATS)
def test_every_format_and_compression_reads_the_same_documents(tmp_path, format_, compression):
    assert read(write(tmp_path / f"texte{format_}{compression}")) == (DOCUMENTS, {})


@pytest.mark.parametrize("format_", [".jsonl", ".parquet"])
def test_the_text_is_the_field_that_was_named(tmp_path, format_):
    assert read(write(tmp_path / f"a{format_}", field="contenu"), "contenu") == (DOCUMENTS, {})


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_files_that_were_compressed_in_parts_are_read_to_the_end(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(b"".join(compress(f"document {i}\n".encode(), compression) for i in range(3)))
    assert read(path)[0] == ["document 0", "document 1", "document 2"]


@pytest.mark.parametrize("padding", [4, 8, 4 * 5000])
@pytest.mark.parametrize(
    "after",
    [b"", lzma.compress(b"deux\n"), lzma.compress(b"") * 3000 + lzma.compress(b"deux\n")],
    ids=["nothing", "a stream", "many streams"],
)
def test_zero_bytes_in_fours_between_xz_streams_are_no_end(tmp_path, padding, after):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"un\n") + bytes(padding) + after)
    assert read(path) == (["un", "deux"] if after else ["un"], {})


def test_a_file_in_the_format_before_xz_is_read(tmp_path):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"un\ndeux\n", lzma.FORMAT_ALONE))
    assert read(path) == (["un", "deux"], {})


def test_the_last_line_needs_no_line_end_and_any_line_end_will_do(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("un\r\ndeux\n\ttrois  \u00a0 quatre\u2028cinq ".encode())
    assert read(path) == (["un", "deux", "trois quatre cinq"], {})


def test_a_file_of_thousands_of_rows_is_read_in_order(tmp_path):
    documents = [f"document {i}" for i in range(5000)]
    for format_ in FORMATS:
        assert read(write(tmp_path / f"a{format_}", documents))[0] == documents


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format_", [".txt", ".jsonl"])
def test_an_empty_file_holds_no_documents(tmp_path, format_, compression):
    path = tmp_path / f"a{format_}{compression}"
    path.write_bytes(compress(b"", compression))
    assert read(path) == ([], {})


# Finding files


def names(found, folder):
    return [str(path.relative_to(folder)) for path in found]


def test_a_folder_stands_for_its_readable_files_sorted(tmp_path):
    for name in ["b.txt", "a.jsonl.gz", "deep/er/c.parquet", "d.v2.txt.xz"]:
        write(tmp_path / name)
    for name in ["LISEZMOI.md", ".hidden.txt", "a.txt.bak", "txt", "a.csv", "archive.txt.zip", ".gz"]:
        (tmp_path / name).write_text("not for reading")
    (tmp_path / "folder.txt").mkdir()
    assert names(find_sources([str(tmp_path)]), tmp_path) == ["a.jsonl.gz", "b.txt", "d.v2.txt.xz", "deep/er/c.parquet"]


def test_links_to_folders_are_followed_each_folder_once(tmp_path):
    for name in ["text/a.txt", "text/deep/c.txt", "elsewhere/b.txt", "elsewhere/more/d.txt"]:
        write(tmp_path / name)
    (tmp_path / "text/b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text/loop").symlink_to(tmp_path / "text")
    (tmp_path / "text/twice").symlink_to(tmp_path / "elsewhere/more")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "text/deep")
    (tmp_path / "text/gone").symlink_to(tmp_path / "nowhere")
    found = names(find_sources([str(tmp_path / "text")]), tmp_path / "text")
    assert found == ["a.txt", "b/b.txt", "b/back/c.txt", "b/more/d.txt"]


def close(name, monkeypatch):
    """Folders of that name, as for a user who may not look into them; tests may run as root, who may."""
    look = os.scandir

    def look_as_somebody_else(path):
        if Path(path).name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return look(path)

    monkeypatch.setattr(os, "scandir", look_as_somebody_else)


def test_what_a_disk_keeps_for_itself_may_be_closed(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    (tmp_path / "lost+found").mkdir()
    close("lost+found", monkeypatch)
    assert names(find_sources([str(tmp_path)]), tmp_path) == ["a.txt"]


def test_a_file_that_is_left_out_as_it_comes_again_is_told(tmp_path, caplog):
    write(tmp_path / "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    with caplog.at_level("INFO"):
        assert names(find_sources([str(tmp_path)]), tmp_path) == ["a.txt"]
    assert "a.txt is read once: " in caplog.text
    assert "b.txt is the same file (1 such)" in caplog.text


def test_a_closed_folder_within_a_folder_is_refused_by_name(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    write(tmp_path / "closed/b.txt")
    close("closed", monkeypatch)
    with pytest.raises(DataError, match=r"cannot be read: .*Permission denied: .*/closed"):
        find_sources([str(tmp_path)])


def test_a_glob_stands_for_the_readable_files_that_match(tmp_path):
    for name in ["b1.txt", "b2.txt.gz", "c.txt", "deep/b3.txt"]:
        write(tmp_path / name)
    (tmp_path / "b4.md").write_text("no")
    assert names(find_sources([f"{tmp_path}/b*"]), tmp_path) == ["b1.txt", "b2.txt.gz"]
    assert names(find_sources([f"{tmp_path}/**/b?.txt"]), tmp_path) == ["b1.txt", "deep/b3.txt"]


def test_sources_keep_the_order_of_the_names_and_are_read_once(tmp_path):
    for name in ["a.txt", "b.txt", "deep/c.txt"]:
        write(tmp_path / name)
    given = [f"{tmp_path}/b.txt", str(tmp_path), f"{tmp_path}/*.txt", f"{tmp_path}/./a.txt"]
    assert names(find_sources(given), tmp_path) == ["b.txt", "a.txt", "deep/c.txt"]


def test_one_file_by_several_paths_is_read_once_by_the_first(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    write(tmp_path / "deep/b.txt")
    (tmp_path / "link.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    given = ["a.txt", str(tmp_path / "a.txt"), "deep/../a.txt", "link.txt", f"{tmp_path}/deep", "deep/*.txt"]
    assert find_sources(given) == [Path("a.txt"), tmp_path / "deep/b.txt"]


def test_a_file_name_with_the_signs_of_a_glob_is_a_file(tmp_path):
    path = write(tmp_path / "a[1]*.txt")
    write(tmp_path / "a1.txt")
    assert find_sources([str(path)]) == [path]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "texte/a.txt")
    assert names(find_sources(["~/texte", "~/texte/*.txt"]), tmp_path) == ["texte/a.txt"]


def test_names_with_commas_between_them_are_told_apart_from_files_that_are_gone(tmp_path):
    names = [str(write(tmp_path / name)) for name in ("a.txt", "b.txt")]
    with pytest.raises(DataError, match="does not exist: these are several names"):
        find_sources([",".join(names)])


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere/", "nowhere/*.txt"])
def test_a_name_that_stands_for_nothing_is_refused(tmp_path, name):
    write(tmp_path / "there.txt")
    with pytest.raises(DataError, match=r"nowhere.* does not exist\. Needed: a file, folder or glob of \.txt, \.jsonl"):
        find_sources([str(tmp_path / "there.txt"), f"{tmp_path}/{name}"])


def test_the_home_of_nobody_is_refused():
    with pytest.raises(DataError, match="~nobody_of_this_name/text cannot be read"):
        find_sources(["~nobody_of_this_name/text"])


def test_a_folder_without_readable_files_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_text("no")
    with pytest.raises(DataError, match="has no readable file"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("name", ["a.pdf", "a.zip", "a", "a.gz", "a.txt.bak", "a.TXT"])
def test_a_file_of_another_format_is_refused_and_the_formats_named(tmp_path, name):
    (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=r"not a format .* Needed: a name that ends in \.txt, \.jsonl, \.parquet"):
        find_sources([str(tmp_path / name)])


# Faults


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a"', "Expecting ',' delimiter at column 13"),
        ("pas du JSON", "Expecting value at column 1"),
        ('{"text": "a"}{"text": "b"}', "Extra data at column 14"),
        ('{"text": "a", "n": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[" * 100_000, "recursion"),
    ],
)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_line_that_is_not_json_is_named_by_number(tmp_path, line, reason, compression):
    path = tmp_path / f"a.jsonl{compression}"
    path.write_bytes(compress(f'{{"text": "a"}}\n\n{{"text": "b"}}\n{line}\n'.encode(), compression))
    message = fault(path)
    assert "line 4: not JSON" in message
    assert reason in message


@pytest.mark.parametrize("collects", [True, False])
def test_what_the_collector_ends_beside_a_line_of_many_brackets_ends_whole(tmp_path, monkeypatch, collects):
    ended, failed = [], []

    class Garbage:
        def __del__(self):
            ended.append(depth(100))

    def depth(left):
        return 1 + (depth(left - 1) if left else 0)

    monkeypatch.setattr("sys.unraisablehook", failed.append)
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000)
    thresholds = gc.get_threshold()
    try:
        if not collects:
            gc.disable()
        for often in range(300, 1000, 50):  # so many lists are made before the collector looks
            garbage = Garbage()
            garbage.itself = garbage
            del garbage
            gc.set_threshold(often)
            assert "not JSON" in fault(path)
            assert gc.isenabled() == collects
    finally:
        gc.set_threshold(*thresholds)
        gc.enable()
    gc.collect()
    assert not failed
    assert ended == [101] * 14


@pytest.mark.parametrize(
    ("line", "came"),
    [
        ('{"texte": "b", "id": 1}', "came ['id', 'texte']"),
        ('{"text": 3}', "came 'text' as int"),
        ('{"text": ["a"]}', "came 'text' as list"),
        ('["a"]', "came list"),
        ('"a"', "came str"),
        ("null", "came NoneType"),
    ],
)
def test_a_record_without_the_text_names_its_line_and_the_fields_that_are_there(tmp_path, line, came):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' + line)
    message = fault(path)
    assert f"line 2: {came}, needed a text named 'text'" in message
    assert "--data.text_field" in message


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_parquet_file_without_the_column_names_the_columns_that_are_there(tmp_path, compression):
    message = fault(write(tmp_path / f"a.parquet{compression}", field="contenu"))
    assert "columns ['id', 'contenu'], needed one named 'text'" in message
    assert "--data.text_field" in message


def test_a_parquet_column_of_something_else_than_text_is_refused(tmp_path):
    assert "column 'id' holds int, needed text" in fault(write(tmp_path / "a.parquet"), "id")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"no parquet at all", contents(DOCUMENTS, ".parquet")[:-20]])
def test_a_file_that_is_not_parquet_is_refused(tmp_path, data):
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    assert "not parquet" in fault(path)


LONG = [f"document {i}: {i * 7919 % 10_007} {i * 104_729 % 99_991}" for i in range(4000)]


@pytest.mark.parametrize("cut", ["half", "last byte"])
@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
@pytest.mark.parametrize("format_", FORMATS)
def test_a_compressed_file_that_ends_in_the_middle_is_refused(tmp_path, format_, compression, cut):
    path = write(tmp_path / f"a{format_}{compression}", LONG)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if cut == "half" else data[:-1])
    assert "Fetch or make the file again" in fault(path)


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_a_compressed_file_with_damaged_bytes_is_refused(tmp_path, compression):
    path = write(tmp_path / f"a.txt{compression}", LONG)
    data = bytearray(path.read_bytes())
    for start in range(100, len(data) - 100, len(data) // 10):
        damaged = data.copy()
        damaged[start : start + 60] = b"\xff" * 60
        path.write_bytes(damaged)
        assert "Fetch or make the file again" in fault(path)


SECOND = lzma.compress("\n".join(LONG).encode())


@pytest.mark.parametrize(
    "after",
    [
        SECOND[:60] + b"\xff" * 60 + SECOND[120:],
        b"\xff" * 60 + SECOND[60:],
        SECOND[: len(SECOND) // 2],
        SECOND[:-1],
        SECOND[:5],
        b"plain text",
        bytes(3),
        bytes(5) + SECOND,
        bytes(8192) + b"x",
    ],
    ids=["damaged", "damaged at once", "half", "all but a byte", "five bytes", "text", "3", "5 and more", "far"],
)
def test_what_follows_an_xz_stream_and_is_no_whole_one_is_refused_or_counted(tmp_path, after):
    path = tmp_path / "a.txt.xz"
    path.write_bytes(lzma.compress(b"un\ndeux\n") + after)
    assert "Fetch or make the file again" in fault(path)
    damage = Damage(skips=True)
    documents = list(read_documents(path, text_field="text", damage=damage))
    assert documents[:2] == ["un", "deux"]
    assert damage.damaged == [str(path)]


@pytest.mark.parametrize("compression", COMPRESSIONS[1:])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path, compression):
    path = tmp_path / f"a.txt{compression}"
    path.write_text("plain text")
    assert "Fetch or make the file again" in fault(path)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path):
    assert "No such file" in fault(tmp_path / "gone.txt")


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user other than root, whom file permissions do not stop")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    path = write(tmp_path / "a.txt")
    path.chmod(0)
    assert "Permission denied" in fault(path)


# Dirty text


def test_invalid_utf8_is_replaced_and_the_documents_counted(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 noir\nbon\n\xff\xfe\xff\n" + "dé".encode()[:-1] + b"\n\xef\xbf\xbd et \xff\n")
    documents, damage = read(path)
    assert documents[:2] == ["caf\ufffd noir", "bon"]
    assert [document.count("\ufffd") for document in documents] == [1, 0, 3, 1, 2]
    assert damage == {"undecodable_documents": 4}


def test_invalid_utf8_in_json_is_replaced_and_the_documents_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "caf\xe9 noir"}\n{"text": "bon", "note": "\xe9"}\n')
    assert read(path) == (["caf\ufffd noir", "bon"], {"undecodable_documents": 1})


def test_half_a_character_spelled_in_json_is_replaced_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n')
    assert read(path) == (["a \ufffd b", "😀"], {"undecodable_documents": 1})


def test_a_replacement_character_that_stands_in_the_text_is_no_damage(tmp_path):
    assert read(write(tmp_path / "a.txt", ["déjà \ufffd là"])) == (["déjà \ufffd là"], {})


@pytest.mark.parametrize("format_", FORMATS)
def test_control_characters_become_spaces_and_are_counted(tmp_path, format_):
    path = write(tmp_path / f"a{format_}", ["a\x00b\x00\x00c", "\x1b[31mrouge\x07", "tab\tet\x7f", "\x80\x9f", "net"])
    documents, damage = read(path)
    assert documents == ["a b c", "[31mrouge", "tab et", "net"]
    assert damage == {"control_characters": 8, "empty_documents": 1}


def test_cleaning_is_splitting_and_joining_whatever_the_characters():
    """Every sign that Unicode or Python calls a space or a control character, alone and in runs, between words."""
    odd = [
        chr(code) for code in range(0x11000) if chr(code).isspace() or unicodedata.category(chr(code)) in ("Cc", "Cs")
    ]
    generator = random.Random(0)
    blanks = [sign for sign in odd if not "\ud800" <= sign <= "\udfff"]
    texts = ["".join(generator.choices([*blanks, "\ud83d", *"  aé" * 20], k=16)) for _ in range(3000)]
    texts += [f"x{sign}y" for sign in odd] + [f"{sign}x{sign}" for sign in odd]
    for text in texts:
        plain = re.sub("[\ud800-\udfff]", "\ufffd", text)
        plain = re.sub("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]", " ", plain)
        assert clean(text, Damage()) == " ".join(plain.split()), repr(text)


def test_a_file_of_zero_bytes_in_place_of_text_is_survived(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(10_000) + b"\nbon\n")
    assert read(path) == (["bon"], {"control_characters": 10_000, "empty_documents": 1})


@pytest.mark.parametrize("format_", [".txt", ".jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, format_):
    path = tmp_path / f"a{format_}"
    path.write_bytes(b"\xef\xbb\xbf" + contents(DOCUMENTS, format_))
    assert read(path) == (DOCUMENTS, {})


def test_empty_lines_are_left_out_and_counted(tmp_path):
    path = write(tmp_path / "a.txt", ["", "un", "   ", "\t\u00a0\r", "deux", ""])
    assert read(path) == (["un", "deux"], {"empty_documents": 4})


@pytest.mark.parametrize("format_", [".jsonl", ".parquet"])
def test_records_without_text_are_left_out_and_counted(tmp_path, format_):
    assert read(write(tmp_path / f"a{format_}", ["", "un", None, " \n "])) == (["un"], {"empty_documents": 3})


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string()])
def test_a_parquet_column_that_says_it_is_text_and_is_not_utf8_is_decoded_all_the_same(tmp_path, kind):
    path = tmp_path / "a.parquet"
    of_bytes = pyarrow.array(["été".encode(), b"\xe9t\xe9"], pyarrow.binary()).cast(pyarrow.large_binary())
    column = of_bytes.view(pyarrow.large_string()).cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert read(path) == (["été", "\ufffdt\ufffd"], {"undecodable_documents": 1})


def test_bytes_in_a_parquet_column_are_decoded(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["été".encode(), b"\xe9t\xe9", None]}), path)
    assert read(path) == (["été", "\ufffdt\ufffd"], {"undecodable_documents": 1, "empty_documents": 1})


def test_spaces_of_every_kind_become_one(tmp_path):
    document = "un\u00a0\u202f deux\u3000\n\n trois\u2009quatre "
    assert read(write(tmp_path / "a.jsonl", [document])) == (["un deux trois quatre"], {})


def test_unusual_characters_stay(tmp_path):
    document = "co\u00adœuvre ﬁn x² e\u0301 \u200bن 𝄞 👨\u200d👩\u200d👧"
    assert read(write(tmp_path / "a.txt", [document])) == ([document], {})


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("compression", ["", ".zst"])
def test_a_line_of_five_megabytes_is_one_document(tmp_path, format_, compression):
    document = "mot " * 1_250_000
    documents, damage = read(write(tmp_path / f"a{format_}{compression}", [document, "bref"]))
    assert documents == [document.strip(), "bref"]
    assert damage == {}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux's /proc/self/mem, which reads as EIO")
def test_what_the_file_system_refuses_is_not_skipped_as_damage(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")
    with pytest.raises(DataError, match="Input/output error"):
        list(read_documents(tmp_path / "a.txt", text_field="text", damage=Damage(skips=True)))
