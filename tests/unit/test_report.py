"""Held-out figures as tables."""

import math

import pytest

from distilcb.eval.report import as_console, as_markdown, heldout_rows

STUDENT = {
    "mlm_loss": 2.34567,
    "perplexity": 10.4449,
    "mlm_accuracy": 0.54321,
    "kl": 0.12345,
    "agreement": 0.75,
    "standard_error": {
        "mlm_loss": 0.0123,
        "perplexity": 0.16,
        "mlm_accuracy": 0.0049,
        "kl": 0.0006,
        "agreement": 0.01,
    },
}
TEACHER = {
    "mlm_loss": 2.0,
    "perplexity": 7.389,
    "mlm_accuracy": 0.6,
    "standard_error": {"mlm_loss": math.nan, "perplexity": math.nan, "mlm_accuracy": math.nan},
}
HELDOUT = {"student": STUDENT, "teacher": TEACHER, "student_start": STUDENT}


def row(name, heldout=HELDOUT):
    found = [cells for cells in heldout_rows(heldout) if cells[0] == name]
    assert len(found) == 1
    return found[0][1:]


def test_each_cell_is_a_figure_and_its_error_in_the_figures_own_precision():
    assert row("student, end") == ["2.346 ± 0.012", "10.4 ± 0.2", "54.3% ± 0.5", "0.123 ± 0.001", "75.0% ± 1.0"]


def test_a_figure_whose_error_is_not_known_stands_alone():
    assert row("teacher")[:3] == ["2.000", "7.4", "60.0%"]
    without = {key: value for key, value in STUDENT.items() if key != "standard_error"} | {"standard_error": {}}
    assert row("student, end", {"student": without})[0] == "2.346"


def test_figures_that_a_model_does_not_have_are_dashes():
    assert row("teacher")[3:] == ["–", "–"]


def test_rows_go_from_teacher_to_end_whatever_the_order_of_the_figures():
    assert [cells[0] for cells in heldout_rows(HELDOUT)] == [
        "held-out text",
        "teacher",
        "student, start",
        "student, end",
    ]


def test_a_model_without_figures_has_no_row():
    assert [cells[0] for cells in heldout_rows({"student": STUDENT})] == ["held-out text", "student, end"]
    assert len(heldout_rows({})) == 1


def test_every_row_has_as_many_cells_as_the_header():
    assert {len(cells) for cells in heldout_rows(HELDOUT)} == {6}


@pytest.mark.parametrize("heldout", [HELDOUT, {"teacher": TEACHER}, {}])
def test_console_lines_are_of_one_width_with_a_rule_below_the_header(heldout):
    lines = as_console(heldout_rows(heldout)).split("\n")
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == {"-"}
    assert len(lines) == len(heldout) + 2


def test_console_names_stand_left_and_figures_right():
    lines = as_console([["name", "value"], ["a", "1"], ["long name", "1000"]]).split("\n")
    assert lines == ["name       value", "----------------", "a              1", "long name   1000"]


def test_markdown_has_a_rule_below_the_header_that_sets_figures_right():
    assert as_markdown([["name", "value"], ["a", "1"]]).split("\n") == [
        "| name | value |",
        "| --- | ---: |",
        "| a | 1 |",
    ]


def test_markdown_of_held_out_figures_has_the_same_number_of_bars_in_every_line():
    lines = as_markdown(heldout_rows(HELDOUT)).split("\n")
    assert {line.count("|") for line in lines} == {7}
