"""What rows alone teach."""

import pytest
from sklearn.metrics import accuracy_score

from distilcb.config import REPOSITORY
from distilcb.tasks.declarations import TASKS, Task
from distilcb.tasks.floors import floor, floor_of_other
from distilcb.tasks.rows import TaskRows

REVIEWS = TASKS["allocine_fr"]
FOLDER = REPOSITORY.parent / "shared" / "data" / "tasks"


def tags(name, *words):
    task = TASKS[name]
    return {"tokens": [word for word, _ in words], task.target: [task.labels.index(tag) for _, tag in words]}


def test_words_tell_a_label():
    rows = [{"text": text, "label": label} for text, label in (("un ennui", 0), ("un chef d'œuvre", 1)) * 4]
    heldout = [{"text": "quel ennui", "label": 0}, {"text": "quel chef", "label": 1}]
    assert floor(REVIEWS, rows, heldout)["accuracy"] == 100


def test_two_words_together_tell_what_neither_does_alone():
    rows = [
        {"text": text, "label": label} for text, label in (("a b", 1), ("b a", 0), ("c b a c", 0), ("c a b c", 1)) * 3
    ]
    assert floor(REVIEWS, rows, [{"text": "a b", "label": 1}, {"text": "b a", "label": 0}])["accuracy"] == 100


def test_training_rows_of_one_label_give_that_one():
    rows = [{"text": "bien", "label": 1}] * 3
    heldout = [{"text": "bien", "label": 1}, {"text": "mal", "label": 0}]
    assert floor(REVIEWS, rows, heldout)["accuracy"] == 50


def test_texts_without_a_word_give_the_most_frequent_label():
    rows = [{"text": text, "label": label} for text, label in (("!!!", 0), ("???", 1), ("…", 1))]
    assert floor(REVIEWS, rows, rows)["accuracy"] == pytest.approx(200 / 3)


def test_a_word_has_its_most_frequent_tag_and_an_unknown_one_that_of_rare_words():
    rows = [tags("pos_fr_gsd", ("la", "DET"), ("chatte", "NOUN")), tags("pos_fr_gsd", ("la", "DET"), ("ville", "NOUN"))]
    rows += [tags("pos_fr_gsd", ("la", "PRON"))]
    heldout = [tags("pos_fr_gsd", ("la", "DET"), ("maison", "NOUN"), ("chatte", "VERB"))]
    assert floor(TASKS["pos_fr_gsd"], rows, heldout)["accuracy"] == pytest.approx(200 / 3)


def test_what_rows_teach_of_another_task_whose_fields_have_other_names():
    other = Task("avis", "classification", ("avis",), "note", ("accuracy",), REVIEWS.labels)
    rows = [{"text": text, "label": label} for text, label in (("un ennui", 0), ("un chef d'œuvre", 1)) * 4]
    heldout = [{"avis": "quel ennui", "note": 0, "nom": "x"}, {"avis": "quel chef", "note": 0}]
    assert floor_of_other(REVIEWS, rows, other, heldout)["accuracy"] == 50  # learnt from the other rows


def test_answers_of_another_language_are_compared_as_that_is():
    row = {"question": "Qui ?", "context": "le chat dort", "answers": {"text": ["chat"], "answer_start": [3]}}
    english = [{"question": "Who?", "context": "a b c", "answers": {"text": ["a b"], "answer_start": [0]}}]
    # The first two words are "le chat"; of French answers the article does not count.
    assert floor_of_other(TASKS["squad"], english, TASKS["fquad"], [row])["exact_match"] == 100
    assert floor_of_other(TASKS["fquad"], english, TASKS["squad"], [row])["exact_match"] == 0


def test_words_in_common_tell_likeness():
    rows = [
        {"sentence1": "le chat dort", "sentence2": other, "score": score}
        for other, score in (("le chat dort", 5.0), ("le chat mange", 3.0), ("il pleut", 0.0))
    ]
    assert floor(TASKS["stsb_fr"], [], rows)["spearman"] == pytest.approx(100)


def test_an_answer_is_guessed_at_the_contexts_beginning_as_long_as_answers_are():
    def row(answer):
        context = "Lyon Paris Brest"
        return {"question": "Où ?", "context": context, "answers": {"text": [answer], "answer_start": [0]}}

    assert floor(TASKS["piaf_qa"], [row("Lyon")], [row("Lyon"), row("Brest")])["exact_match"] == 50
    assert floor(TASKS["piaf_qa"], [row("Lyon Paris")], [row("Lyon Paris")])["exact_match"] == 100


def test_a_task_of_ones_own_has_a_floor_by_its_kind():
    task = Task("themes", "classification", ("title", "body"), "topic", ("accuracy",), ("sport", "droit"))
    rows = [{"title": title, "body": "x", "topic": topic} for title, topic in (("un match", 0), ("un procès", 1)) * 3]
    found = floor(task, rows, rows)
    assert found == {"accuracy": 100 * accuracy_score([row["topic"] for row in rows], [0, 1] * 3)}


@pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data, which holds the tasks")
@pytest.mark.parametrize(
    ("name", "metric", "least"),
    [("allocine_fr", "accuracy", 85), ("pos_fr_sequoia", "accuracy", 90), ("stsb_fr", "pearson", 50)],
)
def test_the_floor_of_real_rows_is_no_straw_man(name, metric, least):
    task, rows = TASKS[name], TaskRows(str(FOLDER / name))
    assert floor(task, rows.read(task, "train"), rows.read(task, "test"))[metric] > least
