"""Seeds of two arms as a table."""

import math

import pytest

from distilcb.finetune.report import as_table, summary

COLUMNS = ("f1", "exact_match")
RESULTS = {
    "teacher": {0: {"figures": {"f1": 50.0, "exact_match": 40.0}}},
    "without": {
        0: {"figures": {"f1": 10.0, "exact_match": 5.0}},
        1: {"figures": {"f1": 14.0, "exact_match": 7.0}},
        2: {"figures": {"f1": 12.0, "exact_match": 6.0}},
    },
    "with": {
        0: {"figures": {"f1": 13.0, "exact_match": 5.0}},
        1: {"figures": {"f1": 15.0, "exact_match": 8.0}},
        2: {"diverged_at_step": 40, "steps": 40},
    },
}


def test_means_and_deviations_are_those_of_finished_seeds():
    found = summary(RESULTS, COLUMNS)
    assert found["without"]["mean"] == {"f1": 12.0, "exact_match": 6.0}
    assert found["without"]["deviation"] == pytest.approx({"f1": 2.0, "exact_match": 1.0})
    assert found["with"]["mean"]["f1"] == 14.0
    assert found["with"]["deviation"]["f1"] == pytest.approx(math.sqrt(2))
    assert (found["with"]["seeds"], found["with"]["diverged"]) == ([0, 1], [2])


def test_the_difference_is_taken_seed_by_seed():
    found = summary(RESULTS, COLUMNS)["difference"]
    assert found["seeds"] == [0, 1]
    assert found["mean"]["f1"] == pytest.approx((3 + 1) / 2)
    assert found["deviation"]["f1"] == pytest.approx(math.sqrt(2))


def test_the_table_names_what_diverged_and_leaves_it_out():
    table = as_table(summary(RESULTS, COLUMNS), COLUMNS).splitlines()
    assert table[0] == "|  | f1 | exact match | seeds |"
    assert table[2] == "| teacher | 50.00 | 40.00 | 1 |"
    assert table[3] == "| student, labels alone | 12.00 ± 2.00 | 6.00 ± 1.00 | 3 |"
    assert table[4].endswith("| 2 |")
    assert table[5].startswith("| difference, seed by seed | +2.00 ± 1.41 |")
    assert table[-1] == "student, soft targets too: seed 2 ended with a loss that was no number."


def test_an_arm_of_which_nothing_is_left_has_no_mean():
    results = {"without": {0: {"diverged_at_step": 1}}}
    found = summary(results, COLUMNS)
    assert found["without"]["seeds"] == []
    assert "| student, labels alone | – | – | 0 |" in as_table(found, COLUMNS)
