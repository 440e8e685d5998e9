"""Rows of tasks: what is read, and what a faulty row is told."""

import gzip
import json
from dataclasses import replace

import pytest

from distilcb.errors import DataError
from distilcb.tasks.declarations import TASKS
from distilcb.tasks.rows import TaskRows

REVIEW = {"text": "Très bon film.", "label": 1}
INFERENCE = {"premise": "Il pleut.", "hypothesis": "Il fait beau.", "label": "contradiction"}
NAMES = {"tokens": ["Marie", "Curie"], "tags": ["B-PER", "I-PER"]}
SIMILAR = {"sentence1": "a", "sentence2": "b", "score": 3}
QUESTION = {
    "question": "Où ?",
    "context": "Il vit à Lyon.",
    "answers": {"text": ["Lyon"], "answer_start": [9]},
    "title": "left out",
}


def write(folder, split, rows, *, suffix=".jsonl"):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
    opener = gzip.open if suffix.endswith(".gz") else open
    with opener(folder / f"{split}{suffix}", "wt", encoding="utf-8") as stream:
        stream.write(text)
    return TaskRows(str(folder))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_labels_become_their_numbers_whether_named_or_numbered(tmp_path, suffix):
    rows = write(tmp_path, "train", [INFERENCE, INFERENCE | {"label": 1}], suffix=suffix)
    assert [row["label"] for row in rows.read(TASKS["xnli_fr"], "train")] == [2, 1]


def test_tags_scores_and_answers_are_read(tmp_path):
    assert write(tmp_path, "train", [NAMES]).read(TASKS["ner_fr"], "train")[0]["tags"] == [1, 2]
    assert write(tmp_path, "train", [SIMILAR]).read(TASKS["stsb_fr"], "train")[0]["score"] == 3.0
    found = write(tmp_path, "train", [QUESTION]).read(TASKS["piaf_qa"], "train")[0]
    assert found == {name: QUESTION[name] for name in ("question", "context", "answers")}


def test_a_limit_takes_the_first_rows(tmp_path):
    rows = write(tmp_path, "train", [REVIEW | {"label": number} for number in (0, 1, 1)])
    assert [row["label"] for row in rows.read(TASKS["allocine_fr"], "train", limit=2)] == [0, 1]


def test_rows_are_held_out_on_test_where_there_is_one(tmp_path):
    assert write(tmp_path, "dev", [REVIEW]).heldout_split() == "dev"
    assert write(tmp_path, "test", [REVIEW]).heldout_split() == "test"


FAULTS = {
    "no such field": ("allocine_fr", {"review": "x", "label": 1}, "no text; came review, label"),
    "not labelled": (
        "allocine_fr",
        {"text": "x"},
        "no label; came text, task allocine_fr needs text, label. Rows without answers cannot",
    ),
    "labelled by nobody": ("allocine_fr", REVIEW | {"label": -1}, "-1, which stands for no label"),
    "null": ("xnli_fr", INFERENCE | {"premise": None}, "no premise; came premise: null, hypothesis, label"),
    "an unknown label": ("xnli_fr", INFERENCE | {"label": "maybe"}, "'maybe'; task xnli_fr has entailment, neutral"),
    "a number too high": ("allocine_fr", REVIEW | {"label": 2}, "is 2"),
    "a truth for a label": ("allocine_fr", REVIEW | {"label": True}, "is True"),
    "a number for text": ("allocine_fr", REVIEW | {"text": 5}, "'text' holds int, needed text"),
    "text for words": ("ner_fr", NAMES | {"tokens": "Marie Curie"}, "'tokens' holds str, needed a list of words"),
    "a tag too few": ("ner_fr", NAMES | {"tags": ["O"]}, "holds 1 tags, needed a list of 2"),
    "a score in words": ("stsb_fr", SIMILAR | {"score": "high"}, "'high', needed a number"),
    "an answer elsewhere": (
        "piaf_qa",
        QUESTION | {"answers": {"text": ["Lyon"], "answer_start": [8]}},
        "the answer 'Lyon' is not at character 8 of the context, but ' Lyo'",
    ),
    "no answer": ("piaf_qa", QUESTION | {"answers": {"text": [], "answer_start": []}}, "as in SQuAD 2"),
    "answers in a list": ("piaf_qa", QUESTION | {"answers": ["Lyon"]}, "needed {'text': [...]"),
    "no object": ("allocine_fr", ["x", 1], "came list, needed an object with text, label"),
    "no JSON": ("allocine_fr", '{"text": ', "not JSON"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_row_is_named_by_file_and_line(tmp_path, fault):
    name, row, told = FAULTS[fault]
    good = {"piaf_qa": QUESTION, "xnli_fr": INFERENCE, "ner_fr": NAMES, "stsb_fr": SIMILAR, "allocine_fr": REVIEW}
    rows = write(tmp_path, "test", [good[name], "", row])
    with pytest.raises(DataError) as refused:
        rows.read(TASKS[name], "test")
    assert f"{tmp_path / 'test.jsonl'}, line 3: " in str(refused.value)
    assert told in str(refused.value)


def test_half_a_character_is_no_text(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "abc \\ud83d", "label": 0}\n')
    with pytest.raises(DataError, match=r"line 1: 'text' holds half a character"):
        TaskRows(str(tmp_path)).read(TASKS["allocine_fr"], "test")


def test_a_row_without_words_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"line 1: 'tokens' holds no word"):
        write(tmp_path, "test", [{"tokens": [], "tags": []}]).read(TASKS["ner_fr"], "test")


def on_the_hub(folder, rows, *, split="validation", **columns):
    """A data set in a local folder, which stands for one of the hub: text but for what `columns` says."""
    import datasets

    features = {name: columns.get(name, datasets.Value("string")) for name in rows[0]}
    made = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    folder.mkdir(exist_ok=True)
    made.to_parquet(folder / f"{split}.parquet")
    return TaskRows(f"hub:{folder}")


NOT_DUPLICATE = ("not_duplicate", "duplicate")
# As nyu-mll/glue and facebook/xnli have them on the hub: names of the numbers, the fields of a row, its number.
PUBLISHED = {
    "mnli": (("entailment", "neutral", "contradiction"), ("premise", "hypothesis"), 2),
    "qnli": (("entailment", "not_entailment"), ("question", "sentence"), 1),
    "qqp": (NOT_DUPLICATE, ("question1", "question2"), 1),
    "rte": (("entailment", "not_entailment"), ("sentence1", "sentence2"), 0),
    "wnli": (("not_entailment", "entailment"), ("sentence1", "sentence2"), 1),
    "mrpc": (("not_equivalent", "equivalent"), ("sentence1", "sentence2"), 1),
    "sst2": (("negative", "positive"), ("sentence",), 1),
    "cola": (("unacceptable", "acceptable"), ("sentence",), 0),
    "xnli_en": (("entailment", "neutral", "contradiction"), ("premise", "hypothesis"), 0),
    "xnli_de": (("entailment", "neutral", "contradiction"), ("premise", "hypothesis"), 1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_of_the_hub_are_read_as_they_are(tmp_path, name):
    import datasets

    labels, texts, number = PUBLISHED[name]
    split = "validation_matched" if name == "mnli" else "validation"
    row = {text: f"{text}, un texte" for text in texts} | {"idx": "7", "label": number}
    rows = on_the_hub(tmp_path / "set", [row] * 2, split=split, label=datasets.ClassLabel(names=list(labels)))
    found = rows.read(TASKS[name], "dev")
    assert found == [{text: row[text] for text in texts} | {"label": number}] * 2
    assert TASKS[name].labels == labels


def test_a_split_that_the_hub_calls_dev_is_read_too(tmp_path):
    """As PhilipMay/stsb_multi_mt does, whose card names its splits."""
    import datasets

    row = {"sentence1": "a", "sentence2": "b", "similarity_score": 3.8}
    rows = on_the_hub(tmp_path / "set", [row], split="part", similarity_score=datasets.Value("float64"))
    split = "configs:\n- config_name: fr\n  data_files:\n  - split: dev\n    path: part.parquet\n"
    (tmp_path / "set" / "README.md").write_text(f"---\n{split}---\n")
    assert rows.read(TASKS["stsb_fr"], "dev") == [{"sentence1": "a", "sentence2": "b", "score": 3.8}]


@pytest.mark.parametrize("field", ["label", "similarity_score", "score"])
def test_likeness_is_read_under_the_names_that_the_hub_has_for_it(tmp_path, field):
    """nyu-mll/glue says label, PhilipMay/stsb_multi_mt similarity_score."""
    import datasets

    row = {"sentence1": "a", "sentence2": "b", field: 3.8}
    rows = on_the_hub(tmp_path / "set", [row], **{field: datasets.Value("float64")})
    assert rows.read(TASKS["stsb_fr"], "dev") == [{"sentence1": "a", "sentence2": "b", "score": 3.8}]


def test_names_and_reviews_are_read_under_the_names_that_the_hub_has_for_them(tmp_path):
    """unimelb-nlp/wikiann says ner_tags, tblard/allocine review."""
    import datasets

    tags = datasets.Sequence(datasets.ClassLabel(names=["O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC"]))
    row = {"tokens": ["Marie", "vit", "à", "Lyon"], "ner_tags": [1, 0, 0, 5], "langs": "fr"}
    rows = on_the_hub(tmp_path / "names", [row], tokens=datasets.Sequence(datasets.Value("string")), ner_tags=tags)
    assert rows.read(TASKS["wikiann_fr"], "dev") == [{"tokens": row["tokens"], "tags": [1, 0, 0, 5]}]
    review = {"review": "Très bon.", "label": 1}
    rows = on_the_hub(tmp_path / "set", [review], label=datasets.ClassLabel(names=["neg", "pos"]))
    assert rows.read(TASKS["allocine_fr"], "dev") == [{"text": "Très bon.", "label": 1}]


def test_a_split_that_the_hub_does_not_have_is_named(tmp_path):
    rows = on_the_hub(tmp_path / "set", [{"sentence": "a", "label": "positive"}], split="train")
    assert len(rows.read(TASKS["sst2"], "train")) == 1
    with pytest.raises(DataError, match=r"set::validation cannot be loaded.*choose another --split\.$"):
        rows.read(TASKS["sst2"], "dev")
    with pytest.raises(DataError, match=r"needed hub:NAME or hub:NAME:CONFIG"):
        TaskRows(f"{rows.source}::train").read(TASKS["sst2"], "train")


@pytest.mark.parametrize("kind", ["int64", "digits"])
def test_tags_that_are_numbers_of_nobody_knows_what_are_refused(tmp_path, kind):
    """Data sets of names count them in different orders."""
    import datasets

    feature = datasets.Value("int64") if kind == "int64" else datasets.ClassLabel(names=list("0123"))
    row = {"tokens": ["Marie", "Curie"], "ner_tags": [2, 2]}
    columns = {"tokens": datasets.Sequence(datasets.Value("string")), "ner_tags": datasets.Sequence(feature)}
    with pytest.raises(DataError, match=r"row 1: 'tags' holds numbers, and the data set does not say"):
        on_the_hub(tmp_path / "set", [row], **columns).read(TASKS["wikiner_fr"], "dev")


def test_labels_of_ones_own_keep_their_names(tmp_path):
    """neg and pos are read as negative and positive only where the task calls them so."""
    import datasets

    own = replace(TASKS["allocine_fr"], name="own", labels=("neg", "pos"))
    rows = on_the_hub(tmp_path / "set", [{"text": "a", "label": 1}], label=datasets.ClassLabel(names=["neg", "pos"]))
    assert rows.read(own, "dev") == [{"text": "a", "label": 1}]


def test_likeness_without_its_answers_is_refused(tmp_path):
    """As the test rows of nyu-mll/glue have it."""
    import datasets

    rows = [{"sentence1": "a", "sentence2": each, "label": -1.0} for each in "bc"]
    there = on_the_hub(tmp_path / "set", rows, split="test", label=datasets.Value("float64"))
    with pytest.raises(DataError, match=r"test: 'score' is -1 in every row.*--split"):
        there.read(TASKS["stsb"], "test")


@pytest.mark.parametrize(
    ("name", "row", "wanted"),
    [
        ("cls_fr", {"text": "Un livre.", "label": "positive"}, {"text": "Un livre.", "label": 1}),
        ("wikiner_fr", NAMES, {"tokens": ["Marie", "Curie"], "tags": [1, 2]}),
        ("squad", QUESTION, {name: QUESTION[name] for name in ("question", "context", "answers")}),
        ("fquad", QUESTION, {name: QUESTION[name] for name in ("question", "context", "answers")}),
    ],
)
def test_rows_of_ones_own_files_are_read_for_what_the_hub_does_not_hold(tmp_path, name, row, wanted):
    assert write(tmp_path, "test", [row]).read(TASKS[name], "test") == [wanted]


def test_labels_of_the_hub_that_are_digits_are_numbers(tmp_path):
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["0", "1"])})
    made = datasets.Dataset.from_list([{"text": "a", "label": number} for number in (1, 0)], features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "validation.parquet")
    rows = TaskRows(f"hub:{tmp_path / 'set'}").read(TASKS["allocine_fr"], "dev")
    assert [row["label"] for row in rows] == [1, 0]


def test_a_split_that_is_not_there_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(
        DataError, match=r"no rows of 'dev'. Needed: a folder with dev.jsonl, dev.jsonl.gz, or hub:NAME"
    ):
        TaskRows(str(tmp_path)).read(TASKS["allocine_fr"], "dev")


def test_a_folder_of_tasks_in_place_of_a_tasks_own_is_told(tmp_path):
    (tmp_path / "allocine_fr").mkdir()
    with pytest.raises(DataError, match=r"no rows of 'dev'.* There is .*/allocine_fr: is it meant\?"):
        TaskRows(str(tmp_path)).read(TASKS["allocine_fr"], "dev")


def test_an_empty_split_has_no_rows(tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl, train: no rows. Needed: a line of JSON for each\."):
        write(tmp_path, "train", [""]).read(TASKS["allocine_fr"], "train")


def test_a_damaged_file_is_named(tmp_path):
    rows = write(tmp_path, "train", [REVIEW] * 200, suffix=".jsonl.gz")
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"train.jsonl.gz, after line \d+: cannot be read"):
        rows.read(TASKS["allocine_fr"], "train")


def test_a_data_set_of_the_hub_gives_its_labels_by_name(tmp_path):
    import datasets

    # A local folder stands for one of the hub; its labels are in another order than the task's.
    features = datasets.Features(
        {
            "premise": datasets.Value("string"),
            "hypothesis": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["contradiction", "entailment", "neutral"]),
        }
    )
    made = datasets.Dataset.from_list([INFERENCE | {"label": number} for number in (0, 1, 2)], features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set" / "validation.parquet")
    rows = TaskRows(f"hub:{tmp_path / 'set'}")
    assert rows.heldout_split() == "dev"
    assert [row["label"] for row in rows.read(TASKS["xnli_fr"], "dev")] == [2, 0, 1]
