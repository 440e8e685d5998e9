"""A replay's findings as text and as JSON."""

import json
import math

import pytest

from distilcb.data.marked_text import MaskedWord
from distilcb.train.replay_report import Comparison, ReplayReport, Sample, worst_first

LONG = "mot " * 100
HIDDEN = MaskedWord((3, 4), "fille", "<mask><mask>", "hidden")


def sample(number, grad_norm, text="Un texte."):
    return Sample(number, 0, {"grad_norm": grad_norm, "loss": 1.5, "loss/mlm": 1.5}, text, [HIDDEN])


def report(samples, **known):
    together = {"grad_norm": 1.0, "loss": 1.5, "loss/mlm": 1.5}
    return ReplayReport("runs/x", 7, 4, known.pop("dropout", 0.0), samples, together, dict(together), **known)


def test_the_largest_gradient_comes_first_and_what_is_not_finite_before_it():
    samples = [sample(0, 1.0), sample(1, math.nan), sample(2, 9.0), sample(3, math.inf)]
    assert [each.sample for each in worst_first(samples)] == [1, 3, 2, 0]


def test_a_sample_is_a_line_and_its_text_is_cut_unless_it_is_asked_for():
    found = report([sample(11, 9.0, LONG), sample(12, 1.0)])
    short, full = found.as_table(), found.as_table(full=True)
    assert LONG not in short
    assert "…" in short
    assert LONG in full
    for table in (short, full):
        assert [line.split()[3] for line in table.splitlines() if "Un texte." in line or "mot" in line] == ["11", "12"]


def test_only_the_worst_are_shown_where_so_many_are_asked_for():
    found = report([sample(number, 20.0 - number) for number in range(10)])
    table = found.as_table(worst=3)
    assert "the 3 of 10 samples of step 7" in table
    assert table.count("Un texte.") == 3


def test_dropout_of_the_step_is_told_as_the_samples_are_without():
    assert "without the step's dropout of 0.1" in report([sample(0, 1.0)], dropout=0.1).as_table()
    assert "dropout" not in report([sample(0, 1.0)]).as_table()


def test_figures_that_are_not_finite_are_null_in_json_and_shown_in_the_table():
    found = report([sample(1, math.nan), sample(2, math.inf)], fault="step 7: loss term kl is not finite")
    document = json.loads(found.as_json())
    assert [each["figures"]["grad_norm"] for each in document["samples"]] == [None, None]
    assert document["fault"] == "step 7: loss term kl is not finite"
    assert document["samples"][0]["masked"] == [
        {"columns": [3, 4], "word": "fille", "read_as": "<mask><mask>", "treatment": "hidden"}
    ]
    assert "nan" in found.as_table()
    assert "inf" in found.as_table()


def test_a_step_that_fp16_skipped_has_no_gradient_norm():
    found = report([sample(1, 1.0)])
    found.taken = found.taken | {"grad_norm": None}
    assert found.verdict().splitlines()[0].split()[0] == "-"


@pytest.mark.parametrize(
    ("replayed", "differing"),
    [
        ({"loss": 1.5, "grad_norm": 2.0}, []),
        ({"loss": math.nextafter(1.5, 2), "grad_norm": 2.0}, ["loss"]),
        ({"loss": 1.5, "grad_norm": None}, ["grad_norm"]),
        ({"loss": 1.5, "grad_norm": 2.0, "loss/kl": 0.5}, ["loss/kl"]),
    ],
)
def test_figures_differ_by_their_last_bit(replayed, differing):
    logged = {"loss": 1.5, "grad_norm": 2.0, "loss/kl": None}
    comparison = Comparison(5, 8, logged, replayed)
    assert comparison.differing == differing
    found = report([sample(1, 1.0)], comparison=comparison)
    said = found.verdict()
    assert ("all equal to the last bit" in said) == (not differing)
    assert all(name in said.splitlines()[-1] for name in differing)
    assert json.loads(found.as_json())["comparison"]["differing"] == differing


def test_what_was_compared_is_told():
    figures = {"loss": 1.5, "lr": 0.1, "grad_norm": 2.0, "skipped_steps": 0}
    of_several = report([], comparison=Comparison(5, 8, figures, figures)).verdict()
    assert "steps 5 to 8 have one line: loss, skipped_steps of all of them, lr, grad_norm of step 8" in of_several
    alone = report([], comparison=Comparison(7, 7, figures, figures)).verdict()
    assert "step 7 has its own line: loss, lr, grad_norm, skipped_steps" in alone
    assert "nothing could be compared" in report([]).verdict()
