"""Several models on several tasks as tables."""

import math

import numpy as np
import pytest
from scipy import stats

from distilcb.finetune.evaluation_report import as_markdown, measured_on, retained, summary_of_task


def seeds(*values, others=None):
    made = {}
    for seed, value in enumerate(values):
        made[seed] = (
            {"diverged_at_step": 7} if value is None else {"figures": {"accuracy": value, "macro_f1": value - 1}}
        )
        if others and value is not None:
            made[seed]["others"] = {name: {"accuracy": each, "macro_f1": each} for name, each in others.items()}
    return made


RESULTS = {"teacher": seeds(80.0, 82.0, 84.0), "runs/student": seeds(70.0, 74.0, None), "lost": seeds(None)}
COLUMNS = ("accuracy", "macro_f1")
FLOOR = {"accuracy": 50.0, "macro_f1": 40.0}


@pytest.fixture
def found():
    return summary_of_task(RESULTS, COLUMNS, FLOOR, teacher="teacher")


def made_of(**tasks):
    counted = {"heldout": {"rows": 9, "cut_rows": 2}, "train": {"rows": 30, "cut_rows": 1}}
    read = {"teacher": {"split": "test", "max_length": 128} | counted}
    return {
        "models": dict.fromkeys(RESULTS, "folder"),
        "tasks": {name: each | {"floor_is": "words", "read": read} for name, each in tasks.items()},
    }


def test_a_seed_that_diverged_is_named_and_counts_nowhere(found):
    student = found["models"]["runs/student"]
    assert (sorted(student["seeds"]), student["diverged"]) == ([0, 1], [2])
    assert student["mean"] == {"accuracy": 72.0, "macro_f1": 71.0}
    assert student["deviation"]["accuracy"] == pytest.approx(math.sqrt(8))
    assert found["models"]["lost"]["mean"] == {}
    page = as_markdown(made_of(films=found))
    assert "runs/student: seed 2 ended with a loss that was no number" in page
    assert "lost: seed 0 ended with a loss that was no number" in page


def test_the_share_retained_is_of_the_tasks_own_metric(found):
    share = found["models"]["runs/student"]["retained"]
    assert share["share"] == pytest.approx(72 / 82)
    assert share["above_floor"] == pytest.approx(22 / 32)
    assert share["low"] < share["share"] < share["high"]
    assert "retained" not in found["models"]["teacher"]
    assert "retained" not in found["models"]["lost"]


def test_nine_intervals_of_ten_and_a_half_hold_the_true_share():
    """Of 2,000 draws with a known ratio; few seeds, unequal spread."""
    generator = np.random.default_rng(3)
    held = 0
    for _ in range(2000):
        share = retained(generator.normal(70, 2, 5), generator.normal(80, 1, 3), None)
        held += share["low"] <= 70 / 80 <= share["high"]
    assert abs(held / 2000 - 0.95) < 0.02


def test_a_large_samples_interval_is_the_normal_one():
    generator = np.random.default_rng(4)
    ours, theirs = generator.normal(70, 2, 4000), generator.normal(80, 1, 4000)
    share = retained(ours, theirs, None)  # so many seeds that any interval is the normal one of the logarithm
    error = math.sqrt(ours.var(ddof=1) / 4000 / ours.mean() ** 2 + theirs.var(ddof=1) / 4000 / theirs.mean() ** 2)
    assert math.log(share["high"] / share["share"]) == pytest.approx(stats.norm.ppf(0.975) * error, rel=1e-3)


@pytest.mark.parametrize(
    ("ours", "theirs", "share"),
    [
        ([50.0], [80.0, 82.0], 50 / 81),
        ([0.0, 0.0], [80.0, 82.0], 0.0),
        ([50.0, 50.0], [-1.0, 0.5], None),
        ([1.0, 2.0], [0.1, 8.0], 1.5 / 4.05),
    ],
)
def test_no_interval_where_there_can_be_none(ours, theirs, share):
    found = retained(ours, theirs, None)
    assert found["share"] == (None if share is None else pytest.approx(share))
    assert (found["low"], found["high"], found["above_floor"]) == (None, None, None)


def test_scores_about_zero_have_an_interval_that_holds_zero():
    """Fieller's, by its definition: at its ends t² times the difference's variance is the difference squared."""
    ours, theirs = [-2.0, 1.0, 3.0, 0.0, 1.0], [4.0, 5.0, 6.0, 5.0, 4.0]
    found = retained(ours, theirs, None)
    assert found["share"] == pytest.approx(0.6 / 4.8)
    assert -0.7 < found["low"] < 0 < found["share"] < found["high"] < 0.9
    parts = np.var(ours, ddof=1) / 5, 0.125**2 * np.var(theirs, ddof=1) / 5
    t = stats.t.ppf(0.975, sum(parts) ** 2 / sum(part**2 / 4 for part in parts))
    for end in (found["low"], found["high"]):
        variance = np.var(ours, ddof=1) / 5 + end**2 * np.var(theirs, ddof=1) / 5
        assert (0.6 - end * 4.8) ** 2 == pytest.approx(t**2 * variance)


def test_seeds_that_agree_have_an_interval_of_no_width():
    found = retained([50.0, 50.0], [80.0, 80.0], 90.0)
    assert (found["low"], found["high"]) == (50 / 80, 50 / 80)
    assert found["above_floor"] is None  # the teacher itself is below it


def test_tables_name_every_task_metric_and_model(found):
    other = summary_of_task({name: RESULTS[name] for name in RESULTS}, COLUMNS, FLOOR, teacher="teacher")
    page = as_markdown(made_of(films=found, books=other))
    assert "|  | films: accuracy | books: accuracy |" in page
    assert "| without pre-training | 50.00 | 50.00 |" in page
    assert "| runs/student | 72.00 ± 2.83 | 72.00 ± 2.83 |" in page
    assert "| runs/student, above the floor | 68.8% | 68.8% |" in page
    assert "| lost | – | – |" in page
    assert "| runs/student | 72.00 ± 2.83 | 71.00 ± 2.83 | 2 |" in page
    assert "\n\nTrained on 30 rows, 1 cut rows; measured on test: 9 rows, 2 cut rows; 128 tokens at most." in page


def test_models_that_cut_otherwise_are_told_one_by_one(found):
    made = made_of(films=found)
    read = made["tasks"]["films"]["read"]
    read |= {"runs/student": read["teacher"], "lost": read["teacher"] | {"heldout": {"rows": 9, "cut_rows": 7}}}
    page = as_markdown(made)
    measured = "trained on 30 rows, 1 cut rows; measured on test: 9 rows, {} cut rows; 128 tokens at most."
    assert f"\n\nteacher, runs/student: {measured.format(2)}\n\nlost: {measured.format(7)}" in page


def test_zero_shot_figures_are_told_apart():
    results = {
        "teacher": seeds(80.0, 82.0, others={"films_en": 60.0}),
        "student": seeds(70.0, 71.0, others={"films_en": 45.0}),
    }
    read = {"split": "test", "max_length": 64, "heldout": {"rows": 5, "cut_rows": 1}}
    others = {"films_en": {"floor": {"accuracy": 30.0, "macro_f1": 20.0}, "read": dict.fromkeys(results, read)}}
    found = summary_of_task(results, COLUMNS, FLOOR, teacher="teacher", others=others)
    made = made_of(films=found) | {"models": dict.fromkeys(results, "")}
    there = measured_on(made["tasks"])["films → films_en"]["models"]["student"]
    assert there["seeds"][1] == {"accuracy": 45.0, "macro_f1": 45.0}  # and not what it has where it learnt
    there["one_label"] = [0]
    page = as_markdown(made)
    assert "student: seed 0 gave every row the same label, and counts." in page
    for row in (
        "|  | films: accuracy | films → films_en: accuracy |",
        "| without pre-training | 50.00 | 30.00 |",
        "| student | 70.50 ± 0.71 | 45.00 ± 0.00 |",
        "| student, above the floor | 66.1% | 50.0% |",
        "| films → films_en | accuracy | macro f1 | seeds |",
        "| without pre-training | 30.00 | 20.00 |  |",
        "| teacher | 60.00 ± 0.00 | 60.00 ± 0.00 | 2 |",
    ):
        assert row in page
    assert "75.0% (75.0% to 75.0%) |" in page
    assert "\n\nMeasured on test: 5 rows, 1 cut rows; 64 tokens at most." in page
    assert "One → other: learnt from the rows of the first" in page


def test_zero_shot_tasks_stand_as_they_were_asked_for_also_where_every_seed_diverged():
    others = {name: {"floor": {"accuracy": 30.0}, "read": {}} for name in ("films_en", "films_de")}
    found = summary_of_task({"lost": seeds(None)}, COLUMNS, FLOOR, teacher="teacher", others=others)
    page = as_markdown(made_of(films=found) | {"models": {"lost": ""}})
    assert "|  | films: accuracy | films → films_en: accuracy | films → films_de: accuracy |" in page
    assert "| without pre-training | 50.00 | 30.00 | 30.00 |" in page
    assert "| lost | – | – | – |" in page
    assert page.count("lost: seed 0 ended with a loss that was no number") == 3


def test_without_a_teacher_nothing_is_said_of_shares():
    page = as_markdown(
        made_of(films=summary_of_task({"one": seeds(70.0)}, COLUMNS, FLOOR, teacher="teacher"))
        | {"models": {"one": ""}}
    )
    assert "of the teacher" not in page
    assert "| one | 70.00 |" in page
