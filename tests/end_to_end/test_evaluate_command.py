"""launch/evaluate.py as users start it."""

import json
import shutil

import pytest
from refusal import assert_refused

from distilcb.config import DEFAULT_RECIPE

pytestmark = pytest.mark.launch

TEACHER = str(DEFAULT_RECIPE.parent / "mini" / "teacher")


@pytest.fixture(scope="module")
def on_one_and_two_ranks(commands, finished, tmp_path_factory):
    """The same evaluation of a finished run's student and its teacher on one rank and on two."""
    folder = tmp_path_factory.mktemp("evaluated")
    words = [finished / "student", TEACHER, "--teacher", TEACHER, "--heldout", f"{commands.text}/heldout"]
    words += ["--seq_len", "32", "--maskings", "2"]
    one = commands.python("evaluate", *words, "--output", folder / "one")
    two = commands.deepspeed(2, "evaluate", *words, "--output", folder / "two")
    for ended in (one, two):
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads((folder / name / "results.json").read_text()) for name in ("one", "two")], one.stdout, finished


def test_the_figures_are_those_of_the_runs_own_last_evaluation(on_one_and_two_ranks):
    (one, _), _, finished = on_one_and_two_ranks
    own = json.loads((finished / "summary.json").read_text())["heldout"]
    for who, name in (("student", str(finished / "student")), ("teacher", "teacher")):
        for figure in ("mlm_loss", "mlm_accuracy"):
            assert one["heldout"][name][figure] == pytest.approx(own[who][figure], rel=1e-4)
    assert one["heldout"][str(finished / "student")]["kl"] == pytest.approx(own["student"]["kl"], rel=1e-3)


def test_results_of_something_else_are_not_written_over(commands, finished, tmp_path):
    mine = tmp_path / "results.json"
    for text in ('{"results": {}}', "[1]", "notes"):
        mine.write_text(text)
        ended = commands.python("evaluate", finished / "student", "--output", tmp_path)
        assert_refused(ended, f"{mine} is of something else than this evaluation. Move it, or name another --output.")
        assert mine.read_text() == text
    page = mine.rename(tmp_path / "results.md")
    assert_refused(commands.python("evaluate", finished / "student", "--output", tmp_path), f"{page} is of something")
    for output in (page, page / "deeper"):
        ended = commands.python("evaluate", finished / "student", "--output", output)
        assert_refused(ended, f"{output} cannot be written ({page} is a file)")
    assert page.read_text() == "notes"


def test_a_teacher_agrees_with_itself(on_one_and_two_ranks):
    (one, _), _, _ = on_one_and_two_ranks
    assert one["heldout"][TEACHER]["kl"] == pytest.approx(0, abs=1e-6)
    assert one["heldout"][TEACHER]["agreement"] == 1.0


def test_two_ranks_give_the_figures_of_one(on_one_and_two_ranks):
    (one, two), _, _ = on_one_and_two_ranks
    assert (one["settings"]["ranks"], two["settings"]["ranks"]) == (1, 2)
    assert one["heldout"].keys() == two["heldout"].keys()
    for name, figures in one["heldout"].items():
        assert two["heldout"][name]["mlm_loss"] == pytest.approx(figures["mlm_loss"], rel=1e-5)


def test_the_table_names_each_model(on_one_and_two_ranks):
    _, shown, finished = on_one_and_two_ranks
    rows = [line for line in shown.splitlines() if "±" in line]
    names = ["teacher", str(finished / "student"), TEACHER]
    # Of all words, then of each band of them in which one was asked for: of 8,005 tokens all but the rarest.
    assert [row.split()[0] for row in rows] == names * 4
    assert all(f"\n{band}" in shown for band in ("the 100 most frequent", "100 to 1,000", "1,000 to 10,000"))


def test_models_of_different_tokenizers_are_refused(commands, tmp_path, finished):
    other = tmp_path / "other"
    shutil.copytree(TEACHER, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][400], tokenizer["model"]["vocab"][401] = tokenizer["model"]["vocab"][401:399:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    ended = commands.python("evaluate", finished / "student", other, "--output", tmp_path / "out")
    assert_refused(ended, f"{other} has another tokenizer than")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere"], "model nowhere: there is no such folder"),
        (["runs/mini/studnet"], "model folder runs/mini/studnet does not exist"),
        ([TEACHER, "--teacher", "./nowhere"], "model folder ./nowhere does not exist"),
        ([TEACHER, TEACHER], "named twice"),
        ([TEACHER, "--maskings", "1"], "argument --maskings: came 1, needed a whole number, 2 or more"),
        ([TEACHER, "--seq_len", "4000"], "has positions for"),
        ([TEACHER, "--heldout", "missing.txt"], "missing.txt"),
        ([TEACHER, "--int8"], f"--int8: {TEACHER}: no onnx/model_int8.onnx there"),
        ([TEACHER, "--speed", "--int8"], "--int8 is of held-out text: name it with --heldout"),
    ],
)
def test_what_cannot_be_evaluated_is_told(commands, tmp_path, words, told):
    assert_refused(commands.python("evaluate", *words, "--output", tmp_path / "out"), told)
    assert not (tmp_path / "out").exists()


def test_each_text_that_is_named_has_figures_of_its_own_but_one_too_short(commands, finished, tmp_path):
    text = commands.text / "heldout"
    (tmp_path / "one.txt").write_text("".join(path.read_text() for path in sorted(text.glob("*.txt"))))
    (tmp_path / "short.txt").write_text("Trop court.\n")
    names = [tmp_path / "one.txt", tmp_path / "short.txt"]
    words = [finished / "student", "--heldout", *names, "--maskings", "2", "--output", tmp_path / "output"]
    ended = commands.python("evaluate", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (figures,) = json.loads((tmp_path / "output" / "results.json").read_text())["heldout"].values()
    assert list(figures["by_source"]) == [str(names[0])]
    assert figures["by_source"][str(names[0])]["mlm_loss"] == pytest.approx(figures["mlm_loss"], rel=0.05)
    assert f"{names[1]} has no figures of its own" in ended.stderr
