"""Text as it runs: nothing cleaned, nothing lost, cut into blocks."""

import gzip
import json

import numpy as np
import pytest
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2TokenizerFast

from distilcb.data import corpus
from distilcb.data.corpus import read_as_it_runs
from distilcb.data.running_text import RunningText
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import DataError

TEXT = " \n = Titre = \n \n Une ligne ,  deux  espaces\t. \n L\u2019autre\u00a0: oui \x07 \n" * 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=280, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    return folder


def written(folder, *, parts=1):
    """The text in files whose names sort as it runs."""
    cut = [len(TEXT) * number // parts for number in range(parts + 1)]
    for number in range(parts):
        part = TEXT[cut[number] : cut[number + 1]].encode()
        (folder / f"{number}.txt.gz").write_bytes(gzip.compress(part))
    return [str(folder)]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("characters", [1, 50, 1 << 20])
def test_pieces_make_up_the_text_to_the_last_sign(tmp_path, monkeypatch, parts, characters):
    monkeypatch.setattr(corpus, "_PIECE_CHARACTERS", characters)
    pieces = list(read_as_it_runs(written(tmp_path, parts=parts)))
    assert "".join(pieces) == TEXT
    assert (len(pieces) > 1) == (characters < len(TEXT))


def test_records_run_on_as_they_are(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f" l\n{n} "}) + "\n" for n in range(3)))
    assert "".join(read_as_it_runs([str(tmp_path / "a.jsonl")])) == " l\n0  l\n1  l\n2 "


def test_blocks_are_the_texts_tokens_one_after_another(tmp_path, tokenizer):
    blocks = RunningText(written(tmp_path), TextTokenizer(str(tokenizer)), seq_len=7)
    ids = AutoTokenizer.from_pretrained(tokenizer)(TEXT)["input_ids"]
    assert len(blocks) == len(ids) // 7
    read = blocks.read(np.arange(len(blocks)))
    assert read.dtype == np.int64
    assert read.ravel().tolist() == ids[: len(blocks) * 7]
    assert blocks.token_counts.tolist() == np.bincount(read.ravel(), minlength=280).tolist()
    assert 0 not in read  # no end of a text


def test_text_for_no_block_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("oui")
    with pytest.raises(DataError, match=r"a block needs 1000\. Give more text"):
        RunningText([str(tmp_path / "a.txt")], TextTokenizer(str(tokenizer)), seq_len=1000)


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("\u00e9t\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8"):
        list(read_as_it_runs([str(tmp_path / "a.txt")]))
    for line in (b'{"text": "caf\xe9"}', b'{"text": "x \\ud83d y"}'):
        (tmp_path / "b.jsonl").write_bytes(line)
        with pytest.raises(DataError, match=r"b\.jsonl is not UTF-8"):
            list(read_as_it_runs([str(tmp_path / "b.jsonl")]))
