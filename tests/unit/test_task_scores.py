"""Scores beside values that were worked out by hand."""

import math

import pytest

from distilcb.tasks.declarations import TASKS, Task
from distilcb.tasks.scores import answer_f1, exact_match, normalised, scores

LABELS = Task("t", "classification", ("text",), "label", ("accuracy", "macro_f1", "binary_f1", "mcc"), ("no", "yes"))


def test_labels_are_scored_as_by_hand():
    # yes right twice, missed once, given wrongly once; no right twice: tp 2, fn 1, fp 1, tn 2.
    found = scores(LABELS, ["yes", "yes", "yes", "no", "no", "no"], ["yes", "yes", "no", "yes", "no", "no"])
    assert found == pytest.approx(
        {
            "accuracy": 100 * 4 / 6,
            "macro_f1": 100 * (4 / 6 + 4 / 6) / 2,
            "binary_f1": 100 * 2 * 2 / (2 * 2 + 1 + 1),
            "mcc": 100 * (2 * 2 - 1 * 1) / math.sqrt(3 * 3 * 3 * 3),
        }
    )


def test_one_label_for_everything_has_no_correlation_with_the_truth():
    found = scores(LABELS, ["yes", "no", "no", "no"], ["no"] * 4)
    assert (found["accuracy"], found["mcc"], found["binary_f1"]) == (75.0, 0.0, 0.0)
    assert found["macro_f1"] == pytest.approx(100 * (0 + 6 / 7) / 2)


def test_scores_of_similarity_are_correlations():
    found = scores(TASKS["stsb_fr"], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 4.0, 9.0])
    # Means 1.5 and 3.5: products of deviations 5.25 + 1.25 + 0.25 + 8.25 = 15, squares 5 and 49.
    assert found == pytest.approx({"pearson": 100 * 15 / math.sqrt(5 * 49), "spearman": 100.0})


def test_a_constant_has_no_correlation():
    assert scores(TASKS["stsb_fr"], [0.0, 1.0], [2.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}


def test_an_entity_counts_as_a_whole():
    gold = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-ORG"]]
    given = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-ORG"]]
    # Right: Lyon and the firm. Given: four entities; there are three.
    found = scores(TASKS["ner_fr"], gold, given)
    assert found == pytest.approx(
        {"entity_f1": 100 * 2 * 2 / (3 + 4), "entity_precision": 100 * 2 / 4, "entity_recall": 100 * 2 / 3}
    )


def test_words_count_alike_in_sentences_of_any_length():
    gold, given = [["NOUN"], ["NOUN", "VERB", "DET"]], [["VERB"], ["NOUN", "VERB", "O"]]
    found = scores(TASKS["pos_fr_gsd"], gold, given)
    assert found["accuracy"] == pytest.approx(100 * 2 / 4)
    assert found["macro_f1"] == pytest.approx(100 * (2 / 3 + 2 / 3 + 0) / 3)


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("La Tour Eiffel.", "tour eiffel"),
        ("l'eau d’Évian", "eau dévian"),
        ("L’École", "école"),
        ("« aux États-Unis »", "étatsunis"),
        ("un  peu, les autres", "peu autres"),
        ("là où", "là où"),
        ("1 234,5 %", "1 2345"),
        ("une", ""),
    ],
)
def test_a_french_answer_is_compared_without_articles_and_marks(answer, left):
    assert normalised(answer, language="fr") == left


@pytest.mark.parametrize(
    ("answer", "left"),
    [("The U.S.A.", "usa"), ("an Apple, a day", "apple day"), ("la vie — theory", "la vie — theory"), ("", "")],
)
def test_an_english_answer_is_compared_as_by_squads_script(answer, left):
    assert normalised(answer, language="en") == left


def test_the_f1_of_an_answer_is_that_of_its_words():
    # Words dans, parties, plante against toutes, parties, plante, verte: two in common of three and four.
    given, right = "dans les parties de plante", "toutes les parties plante verte"
    assert answer_f1(given, right, language="fr") == pytest.approx(2 * 2 / (4 + 4))
    assert answer_f1("Lyon", "Paris", language="fr") == 0.0
    assert answer_f1("paris paris", "Paris", language="fr") == pytest.approx(2 / 3)
    assert answer_f1("", "Paris", language="fr") == 0.0
    assert answer_f1("les", "la", language="fr") == 1.0
    assert exact_match("La Seine", "« Seine »", language="fr") == 1.0


def test_the_best_of_several_right_answers_counts():
    gold = [["Paris", "à Paris"], ["en 1999"]]
    found = scores(TASKS["piaf_qa"], gold, ["à Paris", "1999"])
    assert found == pytest.approx({"f1": 100 * (1 + 2 / 3) / 2, "exact_match": 50.0})
