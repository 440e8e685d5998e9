"""Tokenizers: what the data needs to know of them, and text that cannot pass for special tokens."""

import itertools
import json
import shutil
import unicodedata

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distilcb.config import REPOSITORY
from distilcb.data import tokenizer as tokenizer_module
from distilcb.data.tokenizer import TextTokenizer, cut_at_spaces, load_tokenizer
from distilcb.errors import ModelError

TEACHER = REPOSITORY / "recipes/mini/teacher"
FRENCH = (REPOSITORY / "recipes/mini/text/heldout/lettres.txt").read_text(encoding="utf-8").splitlines()


@pytest.fixture(scope="module")
def teacher():
    return TextTokenizer(str(TEACHER))


def save(folder, tokenizer, **special):
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return TextTokenizer(str(folder))


def wordpiece(folder, pieces, **special):
    """A BERT-like tokenizer with these pieces; ids are their places."""
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces) if p}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"} | special
    return save(folder, tokenizer, **{name: token for name, token in names.items() if token})


def byte_level(folder):
    """A RoBERTa-like tokenizer, trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        FRENCH[:5],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return save(
        folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>", pad_token="<pad>"
    )


def test_the_facts_of_the_teachers_tokenizer(teacher):
    vocabulary, pieces = teacher.vocabulary, teacher.hugging_face.get_vocab()
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.mask_id) == (
        pieces["<s>"],
        pieces["</s>"],
        pieces["<mask>"],
    )
    assert vocabulary.size == len(pieces) == json.loads((TEACHER / "config.json").read_text())["vocab_size"]
    named = ["<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED", "<s>", "</s>", "<mask>"]
    assert vocabulary.special_ids.tolist() == sorted(pieces[piece] for piece in named)


def test_words_begin_where_sentencepiece_marks_them(teacher):
    starts, pieces = teacher.vocabulary.word_start, teacher.hugging_face.get_vocab()
    assert starts.sum() == sum(piece.startswith("▁") for piece in pieces)
    (ids,) = teacher.encode(["Les fromageries réouvrent lundi"])
    assert starts[ids].sum() == 4 < len(ids)
    assert starts[ids[0]]


def test_text_is_encoded_as_the_tokenizer_does_without_separators(teacher):
    plain = teacher.hugging_face
    assert teacher.encode(FRENCH) == [plain.encode(line, add_special_tokens=False) for line in FRENCH]
    assert not set(np.concatenate(teacher.encode(FRENCH)).tolist()) & set(teacher.vocabulary.special_ids.tolist()) - {
        plain.unk_token_id
    }


@pytest.mark.parametrize("text", ["", "a", " ", "un deux trois quatre", "x" * 25, "deux mots" + "y" * 30 + " fin"])
@pytest.mark.parametrize("longest", [1, 7, 10, 1000])
def test_parts_of_a_text_join_to_it_and_are_cut_at_spaces(text, longest):
    parts = list(cut_at_spaces(text, longest=longest))
    assert "".join(parts) == text
    assert all(len(part) <= longest for part in parts)
    for part, following in itertools.pairwise(parts):
        assert following.startswith(" ") or " " not in part[1:], (part, following)


@pytest.mark.parametrize("kind", ["sentencepiece", "byte level", "wordpiece"])
def test_a_long_document_gives_the_ids_that_it_would_give_uncut(teacher, tmp_path, monkeypatch, kind):
    if kind == "byte level":
        teacher = byte_level(tmp_path)
    elif kind == "wordpiece":
        teacher = wordpiece(tmp_path, ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "Un", "autre", ".", "1", "234", ",", "50"])
    document = " ".join(["L'été, à Noël : « Où va-t-il ? » 1 234,50 €."] * 400)
    whole = teacher.encode([document, "Un autre."])
    monkeypatch.setattr(tokenizer_module, "_PIECE_CHARACTERS", 100)
    monkeypatch.setattr(tokenizer_module, "_BATCH_PIECES", 3)
    assert teacher.encode([document, "Un autre."]) == whole


def test_decoding_gives_back_the_text(teacher):
    known = [
        (line, ids)
        for line, ids in zip(FRENCH, teacher.encode(FRENCH), strict=True)
        if teacher.hugging_face.unk_token_id not in ids
    ]
    assert known
    for line, ids in known:
        assert teacher.hugging_face.decode(ids).strip() == unicodedata.normalize("NFKC", line)


@pytest.mark.parametrize("token", ["<s>", "</s>", "<pad>", "<mask>", "<unk>", "<s>NOTUSED", "<unk>NOTUSED"])
@pytest.mark.parametrize("frame", ["{}", "un {} deux", "un{}deux", "{0}{0}", "<{}>", "▁{}", "  {}  "])
def test_special_tokens_spelled_in_text_stay_text(teacher, token, frame):
    (ids,) = teacher.encode([frame.format(token)])
    assert not np.isin(ids, teacher.vocabulary.special_ids).any()
    letters = token.strip("</>").replace(">", "")
    assert letters in teacher.hugging_face.decode(ids).replace(" ", "").replace(">", "")


@pytest.mark.parametrize(
    "token",
    ["＜mask＞", "＜s＞", "＜/s＞", "＜pad＞", "＜s＞NOTUSED", "﹤mask﹥", "＜mask>", "<ma\u200bsk>", "<ma\ufeffsk>"],
)
def test_special_tokens_that_the_normaliser_spells_are_not_taken_for_special(teacher, token):
    vocabulary = teacher.vocabulary
    special = set(vocabulary.special_ids.tolist()) - {teacher.hugging_face.unk_token_id}
    before, ids, after = teacher.encode(["bonjour", f"bonjour {token} demain", "demain"])
    assert not special & set(ids)
    assert ids[: len(before)] == before
    assert ids[-len(after) :] == after


def test_the_fingerprint_is_equal_for_the_same_tokenizer_elsewhere(teacher, tmp_path):
    again = TextTokenizer(str(TEACHER))
    assert again.vocabulary.fingerprint == teacher.vocabulary.fingerprint
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(TEACHER / name, tmp_path)
    assert TextTokenizer(str(tmp_path)).vocabulary.fingerprint == teacher.vocabulary.fingerprint


def test_the_fingerprint_is_equal_after_the_tokenizer_is_saved_by_transformers(teacher, tmp_path):
    teacher.hugging_face.save_pretrained(tmp_path)
    saved = TextTokenizer(str(tmp_path))
    assert saved.vocabulary.fingerprint == teacher.vocabulary.fingerprint
    assert saved.encode(FRENCH) == teacher.encode(FRENCH)


PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdenotéà", *(f"##{letter}" for letter in "abcdenotéà")]


def test_the_fingerprint_tells_vocabularies_apart(teacher, tmp_path):
    prints = [
        wordpiece(tmp_path / "one", PIECES).vocabulary.fingerprint,
        wordpiece(tmp_path / "longer", [*PIECES, "eau"]).vocabulary.fingerprint,
        wordpiece(tmp_path / "in another order", [*PIECES[:5], *PIECES[:4:-1]]).vocabulary.fingerprint,
        teacher.vocabulary.fingerprint,
    ]
    assert len(set(prints)) == 4


def test_the_fingerprint_tells_apart_rules_over_one_vocabulary(tmp_path):
    plain, lower = wordpiece(tmp_path / "plain", PIECES), wordpiece(tmp_path / "lower", PIECES)
    lower.hugging_face.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert plain.hugging_face.get_vocab() == lower.hugging_face.get_vocab()
    assert plain.vocabulary.fingerprint != lower.vocabulary.fingerprint


def test_wordpiece_words_begin_where_nothing_is_marked(tmp_path):
    tokenizer = wordpiece(tmp_path, [*PIECES, "été"])
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.bos_id, vocabulary.eos_id, vocabulary.mask_id) == (2, 3, 4)  # [CLS] and [SEP]
    (ids,) = tokenizer.encode(["été bon eau"])
    pieces = tokenizer.hugging_face.convert_ids_to_tokens(ids)
    assert [piece for piece, id_ in zip(pieces, ids, strict=True) if vocabulary.word_start[id_]] == [
        "été",
        "b",
        "[UNK]",
    ]
    (ids,) = tokenizer.encode(["on [MASK] a [SEP]"])
    assert not np.isin(ids, [0, 2, 3, 4]).any()


def test_byte_level_words_begin_where_the_space_is_marked(tmp_path):
    tokenizer = byte_level(tmp_path)
    vocabulary = tokenizer.vocabulary
    (ids,) = tokenizer.encode(["un été à Noël 漢 <mask> fin"])
    pieces = tokenizer.hugging_face.convert_ids_to_tokens(ids)
    assert [bool(vocabulary.word_start[id_]) for id_ in ids] == [piece.startswith("Ġ") for piece in pieces]
    assert vocabulary.word_start[ids].sum() == 7  # the broken-up "< mask>" is two; the first word has no space before
    assert not np.isin(ids, vocabulary.special_ids).any()
    assert tokenizer.hugging_face.decode(ids) == "un été à Noël 漢 < mask> fin"


def test_places_that_no_text_fills_count_as_special(tmp_path):
    pieces = [*PIECES, "[unused1]", "[unused99]", "madeupword0002", "x</s>NOTUSED", None, "unused", "z"]
    vocabulary = wordpiece(tmp_path, pieces).vocabulary
    assert vocabulary.size == len(pieces)
    gap = pieces.index(None)
    unused = [pieces.index(piece) for piece in pieces[gap - 4 : gap]]
    assert vocabulary.special_ids.tolist() == [1, 2, 3, 4, *unused, gap]


def test_a_tokenizer_without_a_mask_token_is_a_causal_models(tmp_path):
    assert wordpiece(tmp_path, PIECES, mask_token=None).vocabulary.is_causal
    assert not wordpiece(tmp_path, PIECES).vocabulary.is_causal


def test_a_tokenizer_without_separators_is_refused_naming_both(tmp_path):
    tokenizer = wordpiece(tmp_path, PIECES, cls_token=None, sep_token=None)
    with pytest.raises(ModelError, match="has no bos, eos token"):
        _ = tokenizer.vocabulary


def test_words_added_to_a_tokenizer_are_ordinary(tmp_path):
    tokenizer = wordpiece(tmp_path / "base", PIECES).hugging_face
    tokenizer.add_tokens([AddedToken("camembert", normalized=False)])
    tokenizer.save_pretrained(tmp_path / "added")
    added = TextTokenizer(str(tmp_path / "added"))
    assert added.vocabulary.size == len(PIECES) + 1
    (ids,) = added.encode(["bon camembert"])
    assert ids[-1] == len(PIECES)
    assert ids[-1] not in added.vocabulary.special_ids


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"nowhere does not exist\. Give the folder of a tokenizer"):
        load_tokenizer(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "content", ["", "{", "{}", "[]", '{"version": "1.0", "model": {"type": "X"}, "added_tokens": []}']
)
def test_an_unreadable_tokenizer_is_refused_by_name(tmp_path, content):
    shutil.copy(TEACHER / "config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=f"tokenizer {tmp_path} cannot be read"):
        load_tokenizer(str(tmp_path))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"needed one of tokenizer\.json, sentencepiece"):
        load_tokenizer(str(tmp_path))


def test_code_in_a_tokenizers_folder_never_runs(tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Mine: pass\n")
    settings = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    with pytest.raises(ModelError):
        load_tokenizer(str(tmp_path))
    assert not trace.exists()
