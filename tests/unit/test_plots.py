"""The page with plots."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest

from distilcb.finetune.evaluation_report import summary_of_task
from distilcb.finetune.plots import as_page


def seeds(*values):
    return {seed: {"figures": {"accuracy": value}} for seed, value in enumerate(values)}


@pytest.fixture
def made():
    """As tasks/results.json holds it; one model's only seed diverged."""
    results = {"teacher": seeds(80.0, 82.0), "a <b>": seeds(70.0, 74.0), "lost": {0: {"diverged_at_step": 3}}}
    found = summary_of_task(results, ("accuracy",), {"accuracy": 50.0}, teacher="teacher")
    return {"made": "today", "models": dict.fromkeys(results, ""), "tasks": {"films": found, "books": found}}


def drawings(page):
    """The SVG elements of a page, parsed."""
    return [ElementTree.fromstring(f"<svg{part.partition('</svg>')[0]}</svg>") for part in page.split("<svg")[1:]]


def test_bars_are_drawn_and_names_escaped(made):
    page = as_page(made, "| films | <b> |", None)
    assert len(drawings(page)) == 1
    assert "| films | &lt;b&gt; |" in page
    assert "<b>" not in page


def test_what_was_measured_without_being_learnt_has_bars_too(made):
    def black(page):
        return page.count("stroke: #000000; stroke-width: 1.5; stroke-linecap: square")

    before = as_page(made, "", None)
    made["tasks"]["films"]["others"] = {"films_en": {"floor": {"accuracy": 40.0}, "read": {}}}
    for model in made["tasks"]["films"]["models"].values():
        model["others"] = {"films_en": {"mean": {"accuracy": 60.0}, "deviation": {}}}
    page = as_page(made, "", None)
    assert len(drawings(page)) == 1
    for name in ("films", "→ films_en", "books"):  # beside the outlines of its letters
        assert f"<!-- {name}" in page
    assert (black(before), black(page)) == (2, 4)  # lines of floors: films and books are the same here


def test_quality_beside_time_has_a_point_a_model_that_was_timed(made):
    timed = {"teacher": {"1 x 128": 0.02}, "a <b>": {"1 x 128": 0.01}, "lost": {"1 x 128": 0.01}}
    assert len(drawings(as_page(made, "", timed))) == 2
    assert len(drawings(as_page(made, "", {"teacher": {"1 x 16": 0.02}}))) == 1


def test_without_matplotlib_there_is_no_page_and_it_is_told(made, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    caplog.set_level("INFO")
    assert as_page(made, "", None) is None
    assert "distilcb[plots]" in caplog.text
