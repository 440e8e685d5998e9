"""Tasks as they are declared: by name, and in files of one's own."""

import pytest

from distilcb.errors import ConfigError
from distilcb.tasks.declarations import METRICS, TASKS, task_named

OWN = """
kind: classification
texts: [title, body]
target: topic
labels: [sport, law]
metrics: [accuracy]
"""


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_declared_task_is_scored_by_metrics_of_its_kind(task):
    assert set(task.metrics) <= set(METRICS[task.kind])


def test_entities_begin_and_go_on():
    assert TASKS["wikiann_fr"].labels == ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC")


def test_a_file_declares_a_task(tmp_path):
    (tmp_path / "topics.yaml").write_text(OWN)
    task = task_named(str(tmp_path / "topics.yaml"))
    assert (task.name, task.texts, task.labels) == ("topics", ("title", "body"), ("sport", "law"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "kind: classification\ntexts: [text]\n",
            "target is missing, metrics is missing. Needed: kind, texts, target, metrics; for classification and",
        ),
        ("- kind\n", "names and values were to stand there"),
        ("kind: [", "cannot be read"),
        (OWN + "target: body\n", "['target'] written twice"),
        (OWN + "colour: red\n", "colour is not known. Needed: kind"),
        (OWN.replace("classification", "sorting"), "kind=sorting"),
        (OWN.replace("accuracy", "bleu"), "metrics=['bleu'], needed some of accuracy"),
        (OWN.replace("[title, body]", "[a, b, c]"), "classification reads 1 or 2"),
        (OWN.replace("labels: [sport, law]\n", ""), "labels=[]"),
        (OWN.replace("law]", "sport]"), "one stands there twice"),
        (OWN.replace("[title, body]", "null"), "texts=None, needed a list of texts"),
        (OWN.replace("[title, body]", "title"), "texts='title', needed a list of texts"),
        (OWN.replace("[accuracy]", "3"), "metrics=3, needed a list of texts"),
        (OWN.replace("classification", "[classification]"), "kind=['classification'], needed a text"),
        (OWN.replace("topic", "[topic]", 1), "target=['topic'], needed a text"),
        (OWN.replace("[sport, law]", "[yes, no]"), "put quotes around numbers, yes, no"),
        (
            OWN.replace("[accuracy]", "[binary_f1]").replace("law]", "law, art]"),
            "binary_f1 is of two labels, there are 3",
        ),
    ],
)
def test_a_file_that_declares_none_says_what_is_needed(tmp_path, text, told):
    (tmp_path / "topics.yaml").write_text(text)
    with pytest.raises(ConfigError, match="topics") as refused:
        task_named(str(tmp_path / "topics.yaml"))
    assert told in str(refused.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ConfigError, match="--task piaf: needed one of piaf_qa, fquad"):
        task_named("piaf")


def test_a_name_that_is_nearly_one_says_which():
    with pytest.raises(ConfigError, match=r"Did you mean xnli_fr\?$"):
        task_named("xnli-fr")


def test_every_classification_is_scored_by_accuracy_and_macro_f1():
    kinds = [task for task in TASKS.values() if task.kind == "classification"]
    assert len(kinds) > 10
    assert [task.name for task in kinds if not {"accuracy", "macro_f1"} <= set(task.metrics)] == []
