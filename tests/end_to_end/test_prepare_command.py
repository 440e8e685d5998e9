"""launch/prepare.py as users start it: dirty text, OSCAR's files, data sets of the hub."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from refusal import assert_refused
from transformers import GPT2Tokenizer

from distilcb.config import DEFAULT_RECIPE
from distilcb.data.blocks import Blocks
from distilcb.data.tokenizer import TextTokenizer

pytestmark = pytest.mark.launch

TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"
SEQ_LEN = 32
SENTENCE = "Le fromage est sur la table, et la pluie tombe depuis ce matin sur les toits du village."


@pytest.fixture
def prepare(commands, tmp_path):
    """Runs the command on some input; gives the blocks that it made."""

    def run(*words: object, environ: dict[str, str] | None = None) -> Any:
        output = tmp_path / "blocks"
        options = ["--tokenizer", TEACHER, "--output", output, "--seq_len", str(SEQ_LEN)]
        ended = commands.python("prepare", *options, "--input", *words, environ=environ)
        if ended.returncode:
            return ended
        assert f"blocks: {output}" in ended.stdout
        return Blocks(output)

    return run


@pytest.mark.parametrize("causal", [False, True])
def test_blocks_for_causal_models_are_said_to_be_such(commands, tmp_path, causal):
    folder = TEACHER
    if causal:
        folder = tmp_path / "gpt2"
        GPT2Tokenizer(vocab={"<|endoftext|>": 0, "a": 1, "b": 2}, merges=[]).save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("a b a b b a bb aa " * 100)
    words = ["--tokenizer", folder, "--output", tmp_path / "blocks", "--seq_len", "16", "--input", text]
    ended = commands.python("prepare", *words)
    assert ended.returncode == 0, ended.stderr
    said = [line for line in ended.stderr.splitlines() if "no mask token" in line]
    assert said == [f"tokenizer {folder} has no mask token: blocks for causal models such as GPT-2"] * causal


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(str(TEACHER))


def text_of(blocks: Blocks, tokenizer: TextTokenizer) -> str:
    """The words of all blocks, one document after another."""
    rows = blocks.read(np.arange(len(blocks)))[:, 1:-1].ravel()
    return tokenizer.hugging_face.decode(rows[rows != tokenizer.vocabulary.eos_id])


def test_dirty_text_is_counted_reported_and_survived(prepare, tokenizer, tmp_path):
    """Invalid UTF-8, NUL bytes, empty lines, special tokens spelled out, and a line of 50 MB."""
    long_line = (SENTENCE + " ").encode() * 600_000
    assert len(long_line) > 50_000_000
    lines = [SENTENCE.encode(), b"", b"caf\xe9 " + SENTENCE.encode(), b"\x00\x00" + SENTENCE.encode(), b"   "]
    lines += [b"<mask> " * 20 + SENTENCE.encode() + b" </s><s><pad><unk>", long_line]
    text = tmp_path / "dirty.txt"
    text.write_bytes(b"\n".join(lines) + b"\n")
    blocks = prepare(text)
    made = blocks.description
    assert made.damage == {"empty_documents": 2, "undecodable_documents": 1, "control_characters": 2}
    assert made.documents == 5
    ids = blocks.read(np.arange(100))  # the dirty lines and the beginning of the long one
    vocabulary = tokenizer.vocabulary
    inner = ids[:, 1:-1]
    assert (ids[:, 0] == vocabulary.bos_id).all()
    assert (ids[:, -1] == vocabulary.eos_id).all()
    assert (inner == vocabulary.eos_id).sum() == 4  # the ends of documents and nothing else
    others = set(vocabulary.special_ids.tolist()) - {vocabulary.eos_id, tokenizer.hugging_face.unk_token_id}
    assert not np.isin(inner, sorted(others)).any()
    assert blocks.token_counts[vocabulary.mask_id] == 0
    assert made.tokens > 10_000_000


def test_oscars_files_become_blocks(prepare, tokenizer, tmp_path):
    """Records as OSCAR 23.01 publishes them, a document each with line ends inside, in several .jsonl.zst files."""
    documents = [f"Document numéro {number}.\n{SENTENCE}\n{SENTENCE}" for number in range(40)]
    folder = tmp_path / "fr_meta"
    folder.mkdir()
    for part in (1, 2):
        records = [oscar_record(text) for text in documents[20 * (part - 1) : 20 * part]]
        raw = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with pyarrow.output_stream(str(folder / f"fr_meta_part_{part}.jsonl.zst"), compression="zstd") as stream:
            stream.write(raw.encode())
    (folder / "fr_sha256.txt.asc").write_text("not text to train on")
    blocks = prepare(f"{folder}/fr_meta_part_*.jsonl.zst", "--text_field", "content")
    assert blocks.description.documents == 40
    assert [Path(source["path"]).name for source in blocks.description.sources] == [
        "fr_meta_part_1.jsonl.zst",
        "fr_meta_part_2.jsonl.zst",
    ]
    text = text_of(blocks, tokenizer)
    assert text.startswith(documents[0].replace("\n", " "))
    assert documents[30].replace("\n", " ") in text
    assert "warc" not in text


def oscar_record(text: str) -> dict[str, Any]:
    sentences = len(text.splitlines())
    return {
        "content": text,
        "warc_headers": {"warc-type": "conversion", "content-length": str(len(text)), "content-type": "text/plain"},
        "metadata": {
            "identification": {"label": "fr", "prob": 0.97},
            "harmful_pp": 912.5,
            "tlsh": None,
            "quality_warnings": ["short_sentences"],
            "categories": None,
            "sentence_identifications": [{"label": "fr", "prob": 0.98}] * sentences,
        },
    }


def test_a_record_of_oscar_without_its_field_named_says_what_is_there(prepare, tmp_path):
    path = tmp_path / "part.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(oscar_record(SENTENCE)) + "\n").encode()))
    assert_refused(prepare(path), "part.jsonl.gz, line 1", "['content', 'metadata', 'warc_headers']", "--text_field")


@pytest.fixture
def data_set(tmp_path):
    """A folder that the `datasets` library loads by name: two splits of Parquet files."""
    folder = tmp_path / "wiki"
    for split, word in (("train", "village"), ("test", "marché")):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        texts = [SENTENCE.replace("village", f"{word} {number}") for number in range(30)]
        table = pyarrow.table({"id": list(range(30)), "text": [*texts[:-1], None]})
        pyarrow.parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.mark.parametrize(("split", "word"), [("", "village"), ("::test", "marché")])
def test_a_data_set_that_datasets_loads_becomes_blocks(prepare, tokenizer, data_set, tmp_path, split, word):
    environ = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    blocks = prepare(f"hub:{data_set}{split}", environ=environ)
    assert blocks.description.documents == 29
    assert blocks.description.damage["empty_documents"] == 1
    assert f"{word} 7." in text_of(blocks, tokenizer)
    assert blocks.description.sources[0]["path"] == f"hub:{data_set}::{split.strip(':') or 'train'}"


def test_a_data_set_without_the_column_names_those_that_are_there(prepare, data_set, tmp_path):
    ended = prepare(f"hub:{data_set}", "--text_field", "content", environ={"HF_HOME": str(tmp_path / "hub")})
    assert_refused(ended, "columns ['id', 'text']", "--text_field")


def test_a_data_set_made_by_a_script_is_refused_with_the_way_round(prepare, tmp_path):
    folder = tmp_path / "oscar"
    folder.mkdir()
    (folder / "oscar.py").write_text("raise SystemExit('a loading script ran')\n")
    ended = prepare(f"hub:{folder}/oscar.py", environ={"HF_HOME": str(tmp_path / "hub")})
    assert_refused(ended, "loading script", "docs/distilcamembert.md")


def test_a_name_of_the_hub_that_is_none_is_refused(prepare):
    assert_refused(prepare("hub:"), "needed hub:NAME, hub:NAME:CONFIG or hub:NAME:CONFIG:SPLIT")
