"""What an evaluation is asked for."""

import json
from dataclasses import replace

import pytest

from distilcb.config import REPOSITORY
from distilcb.errors import ConfigError
from distilcb.finetune.evaluation import AskedTask, Evaluation, gave_one_label
from distilcb.finetune.models import content_of
from distilcb.finetune.subjects import LabelledTask
from distilcb.finetune.training import Recipe
from distilcb.tasks.declarations import TASKS
from distilcb.tasks.scores import subword_f1

MINI_TEACHER = REPOSITORY / "recipes" / "mini" / "teacher"
ENGLISH, FRENCH = TASKS["ner_en"], TASKS["ner_fr"]


@pytest.mark.parametrize(
    ("others", "told"),
    [
        ([AskedTask(replace(FRENCH, metrics=("accuracy",)), "a")], "scored by"),
        ([AskedTask(replace(FRENCH, labels=("O", "B-X", "I-X")), "a")], "has the labels"),
        ([AskedTask(FRENCH, "a"), AskedTask(FRENCH, "b")], "one task twice"),
    ],
)
def test_what_a_model_cannot_be_measured_on_too_is_refused(others, told):
    with pytest.raises(ConfigError, match=told):
        AskedTask(ENGLISH, "here", tuple(others))


def test_who_has_learnt_texts_is_not_measured_on_pairs():
    films = TASKS["allocine_fr"]
    pairs = replace(films, name="films_en", texts=("one", "other"))
    with pytest.raises(ConfigError, match=r"one reads text, the other one, other\. They must be as many"):
        AskedTask(films, "here", (AskedTask(pairs, "there"),))


def evaluation(**models):
    return Evaluation(models=models, tasks=(), recipe=Recipe(), max_lengths={}, stride=1)


def test_models_have_folders_by_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = Evaluation(
        models={name: name for name in ("runs/mini/student", "camembert-base", ".")},
        tasks=(),
        recipe=Recipe(),
        max_lengths={},
        stride=1,
    ).folders
    assert list(found.values()) == ["runs_mini_student", "camembert-base", tmp_path.name]


def test_models_that_would_share_a_folder_are_refused():
    with pytest.raises(ConfigError, match="would share the folder a_b"):
        evaluation(**{"a/b": "a/b", "a_b": "a_b"})


def test_another_tokenizer_is_another_model(tiny_model, tmp_path):
    tiny_model(layers=1).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "README.md").write_text("one")
    before = content_of(str(tmp_path))
    (tmp_path / "README.md").write_text("another")
    assert content_of(str(tmp_path)) == before
    (tmp_path / "tokenizer.json").write_text('{"lower": true}')
    assert content_of(str(tmp_path)) != before


def test_subwords_carry_their_words_tags():
    """By hand: PER has 3 of its 4 sub-words right and one of O's taken for it, O 5 of 6."""
    right = [["B-PER", "I-PER", "O"], ["O"]]
    said = [["B-PER", "O", "O"], ["B-PER"]]
    person = 2 * 3 / (4 + 4)
    other = 2 * 5 / (6 + 6)
    wanted = 100 * (4 * person + 6 * other) / 10
    assert subword_f1(right, said, [[3, 1, 5], [1]]) == pytest.approx(wanted)


def test_types_are_told_apart_by_their_whole_names_and_no_subword_at_all_is_no_error():
    assert subword_f1([["B-a-x"]], [["B-b-x"]], [[1]]) == 0
    assert subword_f1([["B-a-x"]], [["I-a-x"]], [[1]]) == 100
    assert subword_f1([["O"]], [["O"]], [[0]]) == 0


@pytest.mark.parametrize(
    ("limit", "rows", "first_only"), [(None, 3, False), (2, 2, True), (3, 3, False), (4, 3, False)]
)
def test_a_limit_that_leaves_no_row_out_is_no_try(tmp_path, limit, rows, first_only):
    for split in ("train", "dev"):
        lines = (json.dumps({"text": f"texte {number}", "label": number % 2}) for number in range(3))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    lengths = {"max_length": 32, "stride": 8, "split": None, "train_rows": limit}
    subject = LabelledTask(TASKS["allocine_fr"], str(tmp_path), str(MINI_TEACHER), **lengths)
    assert (len(subject.training_rows), subject.facts["first_rows_only"]) == (rows, first_only)
    whole = LabelledTask(TASKS["allocine_fr"], str(tmp_path), str(MINI_TEACHER), **lengths | {"train_rows": None})
    assert (subject.content == whole.content) is not first_only


@pytest.mark.parametrize(
    ("lines", "one"),
    [
        ('{"predicted": "a", "right": "b"}\n{"predicted": "a", "right": "a"}\n', True),
        ('{"predicted": "a", "right": "a"}\n{"predicted": "b", "right": "a"}\n', False),
        ("\0\0\0", False),
        (None, False),
    ],
    ids=["one", "two", "torn", "deleted"],
)
def test_a_training_that_gives_every_row_one_label_is_told_from_others(tmp_path, lines, one):
    file = tmp_path / "predictions.jsonl"
    if lines is not None:
        file.write_text(lines, encoding="utf-8")
    assert gave_one_label(file) is one
