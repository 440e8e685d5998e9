"""Several students of one start: each run folder is that of a run of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusal import assert_refused

from distilcb.config import DEFAULT_RECIPE

pytestmark = pytest.mark.launch

STEPS = 6
# Differ in depth, in dropout, and in where and how softly the teacher is followed.
STUDENTS = {
    "six": {"student": {"num_layers": 6, "dropout": 0.0}},
    "four": {"student": {"num_layers": 4, "dropout": 0.1}, "loss": {"temperature": 3.0}, "optim": {"clip": 0.1}},
    "two": {"student": {"num_layers": 2, "dropout": 0.1}, "loss": {"kl_positions": "masked"}},
}
# Of the clock and of the process: a run beside others differs in them.
NOT_COMPUTED = {"seconds", "tokens_per_second", "data_wait_fraction", "memory_bytes"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """The mini recipe with each student's own settings."""
    folder, text = tmp_path_factory.mktemp("recipes"), DEFAULT_RECIPE.read_text(encoding="utf-8")
    written = {}
    for name, own in STUDENTS.items():
        tree = yaml.safe_load(text.replace("{recipe_dir}", str(DEFAULT_RECIPE.parent)))
        for section, settings in own.items():
            tree[section] |= settings
        written[name] = folder / f"{name}.yaml"
        written[name].write_text(yaml.safe_dump(tree), encoding="utf-8")
    return written


@pytest.fixture(scope="module")
def words(commands, recipes) -> list[Any]:
    """What names all students, and makes them small."""
    return ["--students", *recipes.values(), *commands.small]


@pytest.fixture(scope="module")
def alone(commands, recipes, tmp_path_factory) -> Path:
    """A folder with a run of its own for each student."""
    folder = tmp_path_factory.mktemp("alone")
    for name, recipe in recipes.items():
        finish(commands.python("train", "--recipe", recipe, "--run_dir", folder / name, *commands.small))
    return folder


@pytest.fixture(scope="module")
def together(commands, words, tmp_path_factory) -> tuple[Path, str]:
    """The folder above all students of one start, and what that printed last."""
    folder = tmp_path_factory.mktemp("together")
    return folder, finish(commands.python("train", "--run_dir", folder, *words)).stdout


def finish(ended: Any) -> Any:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended


def computed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl without what the clock says."""
    return [{name: value for name, value in line.items() if name not in NOT_COMPUTED} for line in lines]


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


def assert_equal_runs(metrics, one: Path, other: Path) -> None:
    """Every figure of every line, the held-out figures and every weight."""
    assert [line["step"] for line in metrics(one) if "loss" in line] == list(range(1, STEPS + 1))
    assert computed(metrics(one)) == computed(metrics(other))
    heldout = [json.loads((run / "summary.json").read_text())["heldout"] for run in (one, other)]
    assert heldout[0] == heldout[1]
    assert weights(one) == weights(other)
    assert (one / "DONE").exists()


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_among_others_equals_its_run_alone_to_the_last_bit(alone, together, metrics, name):
    assert_equal_runs(metrics, together[0] / name, alone / name)


def test_a_run_folder_of_one_among_others_holds_all_that_one_alone_does(alone, together):
    for name in STUDENTS:
        there = [
            {str(path.relative_to(run)) for path in run.rglob("*") if "tensorboard" not in str(path)}
            for run in (together[0] / name, alone / name)
        ]
        assert there[0] == there[1]
        assert list((together[0] / name / "tensorboard").glob("events.*"))


def test_each_students_provenance_names_its_own_recipe(together, recipes):
    for name, recipe in recipes.items():
        document = yaml.safe_load((together[0] / name / "config.yaml").read_text())
        assert document["provenance"]["recipe"] == str(recipe)
        assert document["student"]["num_layers"] == STUDENTS[name]["student"]["num_layers"]


def test_the_last_screen_is_a_table_of_all_students(together):
    lines = together[1].splitlines()
    (head,) = [number for number, line in enumerate(lines) if line.startswith("held-out text")]
    assert [line.split("  ")[0] for line in lines[head + 2 : head + 6]] == [
        "teacher",
        "six, end",
        "four, end",
        "two, end",
    ]
    for name in STUDENTS:
        assert str(together[0] / name / "student") in together[1]


def test_a_start_of_students_that_are_all_done_changes_nothing(commands, words, together):
    before = {path: path.stat().st_mtime_ns for path in together[0].rglob("*")}
    ended = finish(commands.python("train", "--run_dir", together[0], *words))
    assert ended.stderr.count("is DONE") == 3
    assert {path: path.stat().st_mtime_ns for path in together[0].rglob("*")} == before


def test_students_killed_and_at_different_checkpoints_go_on_as_if_nothing_had_happened(
    commands, words, alone, metrics, tmp_path
):
    """As a kill between the saves of one step leaves them, and one that was alone in saving nothing yet."""
    commands.train_until_killed(tmp_path, *words, after_step=5, student="two")
    newest = [path.name for path in sorted((tmp_path / "four" / "checkpoints").glob("step_*"))]
    assert newest == ["step_00000002", "step_00000004"]
    shutil.rmtree(tmp_path / "four" / "checkpoints" / "step_00000004")
    for path in (tmp_path / "two" / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    ended = finish(commands.python("train", "--run_dir", tmp_path, *words))
    assert "step_00000004: 4 steps are done" in ended.stderr
    assert "step_00000002: 2 steps are done" in ended.stderr
    for name in STUDENTS:
        assert_equal_runs(metrics, tmp_path / name, alone / name)


def test_a_student_that_joins_those_that_are_done_trains_alone(commands, words, together, alone, metrics, tmp_path):
    for name in ("six", "two"):
        shutil.copytree(together[0] / name, tmp_path / name)
    ended = finish(commands.python("train", "--run_dir", tmp_path, *words))
    assert ended.stderr.count("is DONE") == 2
    assert_equal_runs(metrics, tmp_path / "four", alone / "four")
    assert "six, end" in ended.stdout


def test_a_stop_file_in_one_folder_stops_all_after_the_same_step(commands, words, metrics, tmp_path):
    words = ["--run_dir", tmp_path, *words, "--train.steps", "400", "--train.save_every", "0"]
    with commands.training(*words, until_step=2, student="two") as process:
        (tmp_path / "four" / "STOP").touch()
        said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    saved = {name: [path.name for path in (tmp_path / name / "checkpoints").glob("step_*")] for name in STUDENTS}
    (step,) = saved["six"]
    assert saved == {name: [step] for name in STUDENTS}
    assert f"stopped after step {int(step.removeprefix('step_'))} of 400" in said[1]
    for name in STUDENTS:
        assert metrics(tmp_path / name)[-1]["step"] == int(step.removeprefix("step_"))
    again = finish(commands.python("train", *words))
    assert f"{tmp_path / 'four' / 'STOP'} is there: not starting" in again.stderr


def test_fresh_moves_the_folders_of_all_aside(commands, words, together, tmp_path):
    for name in STUDENTS:
        shutil.copytree(together[0] / name, tmp_path / name)
    finish(commands.python("train", "--run_dir", tmp_path, *words, "--train.steps", "2", "--fresh"))
    for name in STUDENTS:
        (aside,) = tmp_path.glob(f"{name}.*")
        assert json.loads((aside / "summary.json").read_text())["train"]["steps"] == STEPS
        assert json.loads((tmp_path / name / "summary.json").read_text())["train"]["steps"] == 2


def test_a_student_among_others_on_two_ranks_killed_and_resumed_equals_its_run_alone_there(
    commands, recipes, words, metrics, tmp_path
):
    commands.train_until_killed(tmp_path / "together", *words, after_step=3, ranks=2, student="two")
    finish(commands.deepspeed(2, "train", "--run_dir", tmp_path / "together", *words))
    finish(commands.deepspeed(2, "train", "--recipe", recipes["four"], "--run_dir", tmp_path / "a", *commands.small))
    assert_equal_runs(metrics, tmp_path / "together" / "four", tmp_path / "a")


def test_students_that_do_not_go_together_are_refused_and_leave_nothing(commands, words, recipes, tmp_path):
    other = tmp_path / "other.yaml"
    tree = yaml.safe_load(recipes["two"].read_text())
    tree["masking"]["smoothing"] = 0.5
    other.write_text(yaml.safe_dump(tree))
    ended = commands.python(
        "train", "--run_dir", tmp_path / "runs", "--students", recipes["six"], other, *commands.small
    )
    assert_refused(ended, "masking.smoothing: 0.0 in", "six.yaml", "0.5 in", "other.yaml")
    assert not (tmp_path / "runs").exists()


def test_a_student_with_other_settings_than_its_folder_is_refused_and_the_others_are_not_touched(
    commands, words, together, tmp_path
):
    for name in ("six", "two"):
        shutil.copytree(together[0] / name, tmp_path / name)
    (tmp_path / "two" / "DONE").unlink()
    ended = commands.python("train", "--run_dir", tmp_path, *words, "--optim.lr", "0.002")
    assert_refused(ended, "optim.lr: 0.001 -> 0.002", str(tmp_path / "six"))
    assert not (tmp_path / "four").exists()
