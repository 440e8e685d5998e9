"""SentencePiece's own library in the place of the Hugging Face tokenizer: only where its ids are the same."""

import json
import logging
import lzma
import pickle
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken

from distilcb.config import REPOSITORY
from distilcb.data import sentence_pieces
from distilcb.data.damage import Damage, clean
from distilcb.data.sentence_pieces import SentencePieceEncoder, cut_only_at_spaces, faster_encoder, first_difference
from distilcb.data.tokenizer import TextTokenizer, cut_at_spaces

TEACHER = REPOSITORY / "recipes/mini/teacher"
MODEL = TEACHER / "sentencepiece.bpe.model"
FRENCH = (REPOSITORY / "recipes/mini/text/heldout/lettres.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def teacher():
    return TextTokenizer(str(TEACHER))


@pytest.fixture(scope="module")
def encoder(teacher):
    return SentencePieceEncoder(MODEL, teacher)


def by_library_alone(encoder, document):
    """The ids without the detour through the Hugging Face tokenizer."""
    return encoder._ids[encoder._library.encode(document)].tolist()


def encoded(encoder, documents):
    ids, counts = encoder.encode_flat(documents)
    return [row.tolist() for row in np.split(ids, np.cumsum(counts)[:-1])]


def test_ids_are_those_of_the_hugging_face_tokenizer_remapped(teacher, encoder):
    assert encoded(encoder, FRENCH) == teacher.encode(FRENCH)
    # SentencePiece counts from <unk>, the tokenizer from four words of fairseq's.
    piece = encoder._library.piece_to_id("▁de")
    assert encoder._ids[piece] == teacher.hugging_face.get_vocab()["▁de"] == piece + 4


@pytest.mark.parametrize("text", sentence_pieces._ODD)
def test_odd_text_has_the_same_ids(teacher, encoder, text):
    document = clean(text, Damage())
    assert encoded(encoder, [document]) == teacher.encode([document])


@pytest.mark.parametrize("text", ["Fin....", "une nuit.....", "6,000 francs", "hmm...... mllll", "quelqu'un…. Oui"])
def test_ties_are_decided_as_the_hugging_face_tokenizer_does(teacher, encoder, text):
    (expected,) = teacher.encode([text])
    assert encoded(encoder, [f"Avant {text}", text, "sans"])[1] == expected


def test_the_two_libraries_do_decide_ties_differently(teacher, encoder):
    """Else the detour above would be for nothing."""
    assert by_library_alone(encoder, "bonasse....") != teacher.encode(["bonasse...."])[0]


@pytest.mark.parametrize("token", ["＜mask＞", "<ma\u200bsk>", "＜/s＞", "﹤pad﹥"])
def test_special_tokens_that_the_normaliser_spells_are_left_out_as_before(teacher, encoder, token):
    text = f"bonjour {token} demain"
    assert encoded(encoder, [text]) == teacher.encode([text])
    assert teacher.vocabulary.mask_id not in encoded(encoder, [text])[0]


@pytest.mark.parametrize(
    "text",
    [
        "ⁿ\u034a est",
        "²\ufe0f et ½\u0301",
        "e\u0301te\u0301 e\u0301\u0323",
        "👩\u200d👧",
        unicodedata.normalize("NFD", "한국어 avant 한국어"),
    ],
)
def test_joined_characters_have_the_same_ids(teacher, encoder, text):
    assert encoded(encoder, [text]) == teacher.encode([text])


def test_the_two_libraries_do_treat_joined_characters_differently(teacher, encoder):
    assert by_library_alone(encoder, "ⁿ\u034a") != teacher.encode(["ⁿ\u034a"])[0]


@pytest.mark.parametrize("text", [unicodedata.normalize("NFD", "한"), "ㄱㅏ", "\uffa1\uffc2", "\u1100\uffc2\u11a8"])
def test_hangul_in_parts_that_the_two_libraries_normalise_differently_is_not_for_the_library(teacher, encoder, text):
    by_hugging_face = teacher.hugging_face.backend_tokenizer.normalizer.normalize_str(text)
    assert encoder._library.normalize(text).removeprefix("▁") != by_hugging_face
    assert encoder._not_for_library(["ordinaire", text]) == {1}


def test_whatever_unicode_composes_with_the_character_before_joins_it():
    every = list(map(chr, range(sys.maxunicode + 1)))
    decomposed = [unicodedata.normalize("NFD", sign) for sign in every]
    seconds = {parts[1] for parts in decomposed if len(parts) > 1}
    alike = {sign for sign in every if unicodedata.normalize("NFKD", sign) in seconds}
    assert len(seconds) > 50
    assert seconds | alike <= sentence_pieces._joining_characters()
    assert all(sentence_pieces._joins(f"a{sign}") for sign in seconds | alike)
    assert min(map(ord, sentence_pieces._joining_characters())) >= sentence_pieces._FIRST_JOINING
    assert not sentence_pieces._joins("l'été, ŒUVRE – 5 € …")


def test_random_text_has_the_same_ids(teacher, encoder):
    generator = random.Random(0)
    letters = "aeilnorst.,'-0123 éà"
    signs = [chr(code) for code in range(0x21, 0x3000) if chr(code).isprintable()]
    texts = ["".join(generator.choices(letters, k=generator.randint(1, 200))) for _ in range(2000)]
    texts += ["".join(generator.choices(signs, k=generator.randint(1, 60))) for _ in range(2000)]
    documents = [clean(text, Damage()) for text in texts]
    assert first_difference(encoder, documents) is None


def test_a_long_document_is_one_row(teacher, encoder):
    document = " ".join(FRENCH * 40)
    assert len(document) > 80_000
    assert encoded(encoder, ["un", document, "", "deux"]) == teacher.encode(["un", document, "", "deux"])


def joined(lines, *, characters):
    return [text.strip() for text in cut_at_spaces(" ".join(lines), longest=characters)]


def shipped_lines():
    files = sorted((REPOSITORY / "recipes/mini/text").rglob("*.txt"))
    return [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]


def test_shipped_text_in_long_documents_has_the_same_ids(encoder):
    documents = joined(shipped_lines(), characters=49_000)
    assert len(documents) > 5
    assert first_difference(encoder, documents) is None


@pytest.mark.parametrize("name", ["fr_valid", "fr_test"])
def test_real_text_in_long_documents_has_the_same_ids(encoder, name, monkeypatch):
    path = REPOSITORY.parent / f"shared/data/corpus/{name}.txt.xz"
    if not path.is_file():
        pytest.skip(f"needs real text: {path}")
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        documents = joined(lines.read().splitlines(), characters=49_000)
    assert first_difference(encoder, documents) is None
    monkeypatch.setattr(sentence_pieces, "_SHORT_CHARACTERS", 50_000)
    assert first_difference(encoder, documents) is not None  # else the cutting would be for nothing


@pytest.mark.parametrize("longest", [1, 7, 10, 1000])
@pytest.mark.parametrize(
    "text", ["", "a", "un deux trois quatre", "x" * 25, "deux mots " + "y" * 30 + " et une fin", " a"]
)
def test_short_pieces_join_to_the_text_and_are_cut_before_spaces_only(text, longest):
    pieces = list(cut_only_at_spaces(text, longest=longest))
    assert "".join(pieces) == text
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert all(len(piece) <= longest or " " not in piece[1:] for piece in pieces)


def test_a_word_too_long_for_the_library_goes_to_the_hugging_face_tokenizer(teacher, encoder):
    words = joined(["".join(shipped_lines()).replace(" ", "").replace("...", "")], characters=49_000)
    assert any(by_library_alone(encoder, word) != ids for word, ids in zip(words, teacher.encode(words), strict=True))
    assert encoded(encoder, words) == teacher.encode(words)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_pickling_change_nothing(teacher, threads):
    encoder = SentencePieceEncoder(MODEL, teacher, threads=threads)
    again = pickle.loads(pickle.dumps(encoder))
    assert encoded(again, [*FRENCH, "Fin...."]) == teacher.encode([*FRENCH, "Fin...."])


def test_the_faster_encoder_is_taken_where_it_is_proven(teacher, caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(faster_encoder(teacher, FRENCH), SentencePieceEncoder)
    assert "tokenizing with sentencepiece's library" in caplog.text


def copy_of_teacher(folder):
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", MODEL.name):
        shutil.copy(TEACHER / name, folder)
    return folder


def test_without_a_model_there_is_none(tmp_path):
    folder = copy_of_teacher(tmp_path / "t")
    (folder / MODEL.name).unlink()
    assert faster_encoder(TextTokenizer(str(folder)), FRENCH) is None


def test_a_model_that_cannot_be_read_is_not_used_and_that_is_said(tmp_path, caplog):
    folder = copy_of_teacher(tmp_path / "t")
    (folder / MODEL.name).write_bytes(b"no model")
    with caplog.at_level(logging.INFO):
        assert faster_encoder(TextTokenizer(str(folder)), FRENCH) is None
    assert "is of no use" in caplog.text


@pytest.mark.parametrize(
    "word",
    [
        "camembert",
        AddedToken("<PERSONNE>", normalized=False, lstrip=True, rstrip=True),
        AddedToken("New York", single_word=True),
        AddedToken("[ENT]", special=True, normalized=False),
        "§",
    ],
    ids=str,
)
def test_words_added_to_the_tokenizer_are_left_to_it_and_that_is_said(tmp_path, caplog, word):
    folder = copy_of_teacher(tmp_path / "t")
    tokenizer = TextTokenizer(str(folder)).hugging_face
    assert tokenizer.add_tokens([word]) == 1
    tokenizer.save_pretrained(folder)
    added = TextTokenizer(str(folder))
    with caplog.at_level(logging.INFO):
        assert faster_encoder(added, FRENCH) is None
    assert f"words that were added to the tokenizer, such as {str(word)!r}" in caplog.text
    assert added.encode([f"un {word} demain"])[0].count(len(added.hugging_face) - 1) == 1


def test_tokens_that_are_broken_up_in_the_text_are_no_words_of_it(tmp_path):
    folder = copy_of_teacher(tmp_path / "t")
    tokenizer = TextTokenizer(str(folder)).hugging_face
    tokenizer.add_special_tokens({"additional_special_tokens": ["<ENTITÉ>"]})
    tokenizer.add_tokens([AddedToken("<s>AUTRE", normalized=False)])
    tokenizer.save_pretrained(folder)
    assert faster_encoder(TextTokenizer(str(folder)), [*FRENCH, "un <ENTITÉ> et <s>AUTRE"]) is not None


def test_a_model_whose_ids_differ_is_not_used_and_that_is_said(tmp_path, caplog):
    folder = copy_of_teacher(tmp_path / "t")
    make_rare(folder / "tokenizer.json", "▁de")
    tokenizer = TextTokenizer(str(folder))
    with caplog.at_level(logging.INFO):
        assert faster_encoder(tokenizer, FRENCH) is None
    assert "sentencepiece gives other ids for" in caplog.text


def make_rare(path: Path, piece: str) -> None:
    """Give a piece of a saved tokenizer the score of one that is hardly ever seen."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = facts["model"]["vocab"]
    vocabulary[[entry[0] for entry in vocabulary].index(piece)][1] = -100.0
    path.write_text(json.dumps(facts), encoding="utf-8")


def test_the_sample_of_the_corpus_is_what_decides(teacher, tmp_path, monkeypatch):
    """A difference that none of the odd cases shows, and that the corpus does."""
    by_library = SentencePieceEncoder.encode_flat

    def wrong_about_cheese(self, documents):
        ids, counts = by_library(self, documents)
        return (ids[::-1], counts) if any("fromage" in document for document in documents) else (ids, counts)

    monkeypatch.setattr(SentencePieceEncoder, "encode_flat", wrong_about_cheese)
    assert faster_encoder(teacher, ["Le pain est sur la table."]) is not None
    assert faster_encoder(teacher, ["Le fromage est sur la table."]) is None


def test_a_model_with_pieces_that_the_tokenizer_lacks_is_refused(tmp_path):
    folder = copy_of_teacher(tmp_path / "t")
    facts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = facts["model"]["vocab"]
    for entry in vocabulary:
        if entry[0] == "▁de":
            entry[0] = "▁de▁"
    (folder / "tokenizer.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(ValueError, match="no piece '▁de'"):
        SentencePieceEncoder(folder / MODEL.name, TextTokenizer(str(folder)))
