"""Several models in one table: each with a row of its own, under a name that says which it is."""

import pytest

from distilcb.errors import ConfigError
from distilcb.eval.models import names_in_results
from distilcb.eval.report import heldout_rows

FIGURES = {"mlm_loss": 2.0, "perplexity": 7.4, "mlm_accuracy": 0.5, "standard_error": {}}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for name in ("a/student", "b/student", "student", "teacher"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(names):
    return [cells[0] for cells in heldout_rows(dict.fromkeys(names, FIGURES))[1:]]


def test_folders_with_one_last_name_have_a_row_each(folders):
    models = [str(folders / "a/student"), "b/student", "student"]
    names = names_in_results(models)
    assert rows(names.values()) == [str(folders / "a/student"), "b/student", "./student"]


def test_a_folder_called_teacher_or_student_is_not_taken_for_a_runs(folders):
    names = names_in_results(["student", "teacher"])
    assert rows(["teacher", *names.values()]) == ["teacher", "./student", "./teacher"]


@pytest.mark.parametrize("again", ["student", "./student", "student/", "a/../student", "link"])
def test_a_model_that_is_named_twice_is_refused_in_whatever_words(folders, again):
    (folders / "link").symlink_to("student")
    with pytest.raises(ConfigError, match=f"student and {again}: a model is named twice"):
        names_in_results(["student", again])
