"""The text that a run opens: one text or languages, prepared or raw; and what is told of those that cannot be."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pyarrow
import pytest
from transformers import BertTokenizer

from distilcb.config import DEFAULT_RECIPE, DataConfig, MaskingConfig
from distilcb.data.blocks import Blocks
from distilcb.data.languages import LanguageBlocks, order_of
from distilcb.data.loader import Cut, MicroBatches, task_of
from distilcb.data.prepare import prepare
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import DataError
from distilcb.train.run_folder import _difference
from distilcb.train.text import check_names, open_text, open_training_text

TEXT = DEFAULT_RECIPE.parent / "mini" / "text"
WORLD = SimpleNamespace(is_main=False)
NAMES = [str(TEXT / "train" / f"{name}.txt") for name in ("lettres", "debats", "recettes")]


@pytest.fixture(scope="module")
def teacher():
    return TextTokenizer(str(DEFAULT_RECIPE.parent / "mini" / "teacher"))


@pytest.fixture
def settings(tmp_path):
    """A data section for these names: settings(names, language_exponent=0.5)."""

    def make(names, **others):
        return DataConfig(**({"train": names, "seq_len": 32, "cache": str(tmp_path / "cache")} | others))

    return make


def test_each_name_is_a_language_prepared_for_itself(teacher, settings, caplog):
    caplog.set_level(logging.INFO, "distilcb")
    text = open_text(settings(NAMES, language_exponent=0.5, heldout=[str(TEXT / "heldout")]), teacher, WORLD)
    assert isinstance(text.train, LanguageBlocks)
    assert [part.description.sources[0]["path"] for part in text.train.parts] == NAMES
    whole = open_training_text(settings(NAMES), teacher, WORLD)
    assert isinstance(whole, Blocks)
    assert abs(len(whole) - len(text.train)) <= len(NAMES)  # what fills no block is lost once a language
    assert text.contents == {"train": [part.content for part in text.train.parts], "heldout": text.heldout.content}
    for name, share in zip(NAMES, text.train.shares, strict=True):
        assert f"{name}: " in caplog.text
        assert f"{100 * share:.2f}% of the samples" in caplog.text


def test_a_language_may_be_a_prepared_folder(teacher, settings, tmp_path):
    prepare([NAMES[0]], tokenizer=teacher, output=tmp_path / "letters", seq_len=32)
    mixed = open_training_text(settings([str(tmp_path / "letters"), NAMES[1]], language_exponent=1), teacher, WORLD)
    raw = open_training_text(settings(NAMES[:2], language_exponent=1), teacher, WORLD)
    assert mixed.content == raw.content
    rows = np.arange(len(raw))
    assert np.array_equal(mixed.read(rows), raw.read(rows))


def test_the_same_text_under_two_names_is_refused(teacher, settings, tmp_path):
    copy = shutil.copy(NAMES[0], tmp_path / "copy.txt")
    with pytest.raises(DataError, match=r"lettres\.txt and .*copy\.txt hold the same text"):
        open_training_text(settings([*NAMES, str(copy)], language_exponent=0.5), teacher, WORLD)


def test_a_language_that_fills_no_block_is_named(teacher, settings, tmp_path):
    short = tmp_path / "islandais.txt"
    short.write_text("Jæja\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"islandais\.txt: 1 documents .* fill no block of 32 tokens"):
        open_training_text(settings([*NAMES, str(short)], language_exponent=0.5), teacher, WORLD)


def test_blocks_of_another_length_are_refused_as_those_of_one_text_are(teacher, settings, tmp_path):
    prepare([NAMES[0]], tokenizer=teacher, output=tmp_path / "letters", seq_len=64)
    with pytest.raises(DataError, match=r"letters holds blocks of 64 tokens, data\.seq_len is 32"):
        open_training_text(settings([NAMES[1], str(tmp_path / "letters")], language_exponent=0.5), teacher, WORLD)


@pytest.mark.parametrize("exponent", [None, 0.7])
def test_names_that_stand_for_nothing_are_told_without_a_tokenizer(settings, exponent):
    with pytest.raises(DataError, match="no_text does not exist"):
        check_names(settings([*NAMES, "no_text"], language_exponent=exponent))
    heldout = settings(NAMES, language_exponent=exponent, heldout=["no_heldout"])
    with pytest.raises(DataError, match="no_heldout does not exist"):
        check_names(heldout)
    check_names(heldout, heldout=False)


def test_a_resumed_run_is_told_whether_its_text_or_the_order_of_its_languages_is_another():
    begun, names = {"train": ["a", "b"], "heldout": None}, "data.train: "
    assert _difference("text", begun, {"train": ["a", "b"], "heldout": None}) == []
    assert _difference("text", begun, {"train": ["b", "a"]}) == [
        f"{names}the languages are in another order than it was begun with"
    ]
    for other in (["a", "c"], ["a"], "a"):
        assert _difference("text", begun, {"train": other}) == [f"{names}other text than it was begun with"]


# A vocabulary of multilingual BERT's size


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory):
    """A WordPiece tokenizer of 119,547 words, of which the last ones are those that texts use."""
    folder = tmp_path_factory.mktemp("multilingual") / "tokenizer"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [f"mot{number}" for number in range(119_547 - len(special))]
    BertTokenizer(
        vocab={word: index for index, word in enumerate(special + words)}, do_lower_case=False
    ).save_pretrained(folder)
    return TextTokenizer(str(folder))


def test_tokens_of_a_vocabulary_of_119547_words_come_whole_from_text_to_batches(multilingual, settings, tmp_path):
    assert multilingual.vocabulary.size == 119_547
    random, lines, names = np.random.default_rng(0), {}, []
    for language, (low, high) in {"a": (0, 40_000), "b": (65_000, 119_542)}.items():
        lines[language] = [" ".join(f"mot{i}" for i in random.integers(low, high, 30)) for _ in range(40)]
        lines[language].append(f"mot{high - 1} " * 12)
        names.append(str(tmp_path / f"{language}.txt"))
        (tmp_path / f"{language}.txt").write_text("\n".join(lines[language]) + "\n", encoding="utf-8")
    found = open_training_text(settings(names, seq_len=16, language_exponent=0.7), multilingual, WORLD)
    for part, language in zip(found.parts, lines, strict=True):
        (path,) = part.folder.glob("*.arrow")
        with pyarrow.ipc.open_stream(path) as reader:
            assert str(reader.schema.field("input_ids").type.value_type) == "int32"
        expected = [
            id_
            for ids in multilingual.hugging_face(lines[language], add_special_tokens=False)["input_ids"]
            for id_ in [*ids, multilingual.vocabulary.eos_id]
        ]
        inner = part.read(np.arange(len(part)))[:, 1:-1].ravel().tolist()
        assert inner == expected[: len(inner)]
        assert len(expected) - len(inner) < 14
    assert found.parts[1].read(np.arange(len(found.parts[1]))).max() == 119_546
    assert found.token_counts.shape == (119_547,)
    order = order_of(found, seed=0, fraction=1.0)
    task = task_of(MaskingConfig(), multilingual.vocabulary, found, seed=0)
    batch = MicroBatches(found, order, task, Cut(64, 64, 0, 1))[0]
    tokens = batch.input_ids.clone().view(-1)
    tokens[batch.labelled_rows] = batch.labels
    assert np.array_equal(tokens.view(64, 16).numpy(), found.read(order.row(np.arange(64))))
    assert batch.labels.max() > 65_536
