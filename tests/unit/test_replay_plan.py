"""Which steps a replay takes and what it refuses, decided from the files of a run folder alone."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distilcb.config import Config, OptimConfig, TrainConfig, to_plain
from distilcb.engine.checkpoint import FORMAT_VERSION, Checkpoint
from distilcb.errors import CheckpointError, ConfigError
from distilcb.monitor.writers import logged_steps
from distilcb.train.replay import load_checkpoint, plan_replay, refuse_facts
from distilcb.train.run_folder import RunFolder, find_run

STEPS, LOG_EVERY = 20, 4
CONFIG = Config(train=TrainConfig(steps=STEPS, log_every=LOG_EVERY))
FACTS = {"precision": "bf16", "teacher": "t", "text": {"train": "a", "heldout": "b"}}


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder: lines (step, steps in its window) of metrics.jsonl, and checkpoints with their ranks."""

    def make(*, lines=(), checkpoints=(), ranks=1):
        folder = RunFolder(tmp_path / "run")
        folder.checkpoints.mkdir(parents=True)
        document = to_plain(CONFIG) | {"provenance": {"world_size": ranks, "facts": FACTS}}
        folder.config.write_text(yaml.safe_dump(document))
        for step, world_size in checkpoints:
            path = folder.checkpoints / f"step_{step:08d}"
            path.mkdir()
            manifest = {"format_version": FORMAT_VERSION, "step": step, "world_size": world_size, "files": {}}
            (path / "manifest.json").write_text(json.dumps(manifest))
        records = [{"step": 0, "eval/student/kl": 1.0}]
        records += [{"step": step, "window_steps": steps, "loss": 1.0} for step, steps in lines]
        (folder.path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return folder

    return make


def planned(folder, step, *, world_size=1, **options):
    """(first, last) of the steps that are taken together, the logged step and where the replay starts."""
    plan = plan_replay(folder, CONFIG, step, world_size=world_size, **options)
    return (plan.first, plan.last), plan.record["step"] if plan.record else None, plan.start


def contents(folder: Path):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*")
    }


def test_all_the_steps_of_a_line_are_taken_from_the_checkpoint_before_them(make_run):
    folder = make_run(lines=[(4, 4), (6, 2), (8, 2), (12, 4)], checkpoints=[(6, 1), (12, 1)])
    assert planned(folder, 7) == ((7, 8), 8, 6)
    assert planned(folder, 8) == ((7, 8), 8, 6)
    assert planned(folder, 9) == ((9, 12), 12, 6)
    assert planned(folder, 12) == ((9, 12), 12, 6)


def test_a_step_before_the_first_checkpoint_starts_from_the_first_weights(make_run):
    folder = make_run(lines=[(4, 4), (8, 4)], checkpoints=[(8, 1)])
    assert planned(folder, 1) == ((1, 4), 4, 0)
    assert planned(folder, 8) == ((5, 8), 8, 0)


def test_a_damaged_checkpoint_is_passed_over(make_run):
    folder = make_run(lines=[(4, 4), (8, 4), (12, 4)], checkpoints=[(4, 1), (8, 1)])
    (folder.checkpoints / "step_00000008" / "manifest.json").write_text("{")
    assert planned(folder, 9) == ((9, 12), 12, 4)


def test_a_step_after_the_last_line_has_nothing_to_be_compared_with(make_run):
    folder = make_run(lines=[(4, 4)], checkpoints=[(4, 1)])
    assert planned(folder, 7) == ((7, 7), None, 4)


def test_a_step_whose_line_is_lost_has_nothing_to_be_compared_with(make_run):
    folder = make_run(lines=[(4, 4), (12, 4)], checkpoints=[(4, 1)])
    assert planned(folder, 6) == ((6, 6), None, 4)
    assert planned(folder, 9) == ((9, 12), 12, 4)


def test_lines_without_the_size_of_their_window_go_by_the_line_before(make_run):
    folder = make_run(checkpoints=[(4, 1)])
    lines = [{"step": 4, "loss": 1.0}, {"step": 8, "loss": 1.0}]
    (folder.path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert planned(folder, 3) == ((1, 4), 4, 0)
    assert planned(folder, 6) == ((5, 8), 8, 4)


def test_a_line_that_is_being_written_is_left_out(make_run):
    folder = make_run(lines=[(4, 4)])
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "window_steps": 4, "lo')
    assert [record["step"] for record in logged_steps(folder.path)] == [4]


def test_planning_changes_nothing(make_run):
    folder = make_run(lines=[(4, 4), (8, 4)], checkpoints=[(4, 1)])
    before = contents(folder.path)
    planned(folder, 6, output=folder.path.parent / "report.json")
    assert contents(folder.path) == before


@pytest.mark.parametrize(("step", "told"), [(0, "steps 1 to 20"), (-3, "steps 1 to 20"), (21, "steps 1 to 20")])
def test_a_step_that_the_run_does_not_have_is_refused(make_run, step, told):
    folder = make_run(lines=[(4, 4)])
    with pytest.raises(ConfigError, match=f"--step {step}: the run has {told}"):
        planned(folder, step)


def test_a_step_that_the_run_cannot_have_taken_yet_is_refused(make_run):
    folder = make_run(lines=[(4, 4), (8, 4)], checkpoints=[(4, 1)])
    assert planned(folder, 12) == ((12, 12), None, 4)
    with pytest.raises(CheckpointError, match=r"come to step 8 .* Name one up to 12"):
        planned(folder, 13)


def test_another_number_of_ranks_than_took_the_step_is_refused(make_run):
    folder = make_run(lines=[(4, 4), (8, 4)], checkpoints=[(4, 2), (8, 2)], ranks=2)
    assert planned(folder, 7, world_size=2) == ((5, 8), 8, 4)
    with pytest.raises(CheckpointError, match=r"taken by 2 rank\(s\), not by 1 .* --num_gpus 2"):
        planned(folder, 7)


def test_without_a_checkpoint_the_ranks_are_those_of_the_first_start(make_run):
    folder = make_run(lines=[(4, 4)], ranks=2)
    assert planned(folder, 2, world_size=2) == ((1, 4), 4, 0)
    with pytest.raises(CheckpointError, match=r"taken by 2 rank\(s\), not by 4"):
        planned(folder, 2, world_size=4)


def test_steps_from_the_first_weights_were_taken_by_the_ranks_that_the_run_began_on(make_run, caplog):
    """Resumed on one rank since, and the checkpoints of two are deleted."""
    folder = make_run(lines=[(4, 4), (8, 4), (12, 4)], checkpoints=[(8, 1), (12, 1)], ranks=2)
    assert planned(folder, 2, world_size=2) == ((1, 4), 4, 0)
    assert "was begun on 2 rank(s), and step_00000008 was saved by 1" in caplog.text
    with pytest.raises(CheckpointError, match=r"taken by 2 rank\(s\), not by 1"):
        planned(folder, 2, world_size=1)


def test_the_ranks_of_later_steps_are_those_that_saved_the_checkpoint_after_them(make_run, caplog):
    folder = make_run(lines=[(4, 4), (8, 4), (12, 4)], checkpoints=[(4, 1), (8, 1)], ranks=2)
    assert planned(folder, 6) == ((5, 8), 8, 4)
    assert planned(folder, 9) == ((9, 12), 12, 8)
    assert not caplog.text


def test_steps_that_another_number_of_ranks_took_than_saved_the_checkpoint_are_refused(make_run):
    folder = make_run(lines=[(4, 4), (8, 4), (12, 4)], checkpoints=[(4, 2), (8, 1)], ranks=2)
    for world_size in (1, 2):
        with pytest.raises(CheckpointError, match=r"step_00000004 was saved by 2 rank\(s\).* taken by 1"):
            planned(folder, 6, world_size=world_size)
    assert planned(folder, 9) == ((9, 12), 12, 8)


def test_other_settings_are_refused_and_where_files_lie_is_not(make_run):
    folder = make_run(lines=[(4, 4)])
    other = replace(CONFIG, optim=OptimConfig(lr=1.0))
    with pytest.raises(CheckpointError, match=r"other settings:\n.*optim\.lr: 0\.0005 -> 1\.0"):
        plan_replay(folder, other, 2, world_size=1)
    moved = replace(CONFIG, data=replace(CONFIG.data, train=("elsewhere",), cache="there"))
    assert plan_replay(folder, moved, 2, world_size=1).last == 4


def test_other_text_teacher_and_precision_are_refused_and_held_out_text_is_not_asked_for(make_run):
    folder = make_run()
    refuse_facts(folder, FACTS | {"text": {"train": "a"}})
    for name, value, told in (
        ("precision", "fp32", "precision: bf16 -> fp32"),
        ("teacher", "u", "teacher.model: another model"),
        ("text", {"train": "c"}, "data.train: other text"),
    ):
        with pytest.raises(CheckpointError, match=told):
            refuse_facts(folder, {name: value})


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("run/config.yaml", "is there already"),
        ("run/report.json", "lies in the run folder"),
        ("run/checkpoints/../report.json", "lies in the run folder"),
        ("none/report.json", "none is no folder"),
    ],
)
def test_a_report_that_cannot_be_written_is_refused_before_any_step_is_taken(make_run, output, told):
    folder = make_run(lines=[(4, 4)])
    with pytest.raises(ConfigError, match=told):
        planned(folder, 2, output=folder.path.parent / output)


def test_a_folder_that_is_no_run_is_refused(make_run, tmp_path):
    folder = make_run()
    (folder.path / "student").mkdir()
    with pytest.raises(CheckpointError, match=r"no run folder: it has no config\.yaml"):
        find_run(tmp_path)
    with pytest.raises(CheckpointError, match="Give the run folder, not the student in it"):
        find_run(folder.path / "student")


class Deleted:
    """Checkpoints that cannot be loaded, in DeepSpeed's way."""

    def load(self, *_arguments, **_options):
        raise AssertionError


def test_a_checkpoint_that_the_training_has_deleted_meanwhile_is_told(tmp_path):
    run = SimpleNamespace(checkpoints=Deleted(), engine=None, place=SimpleNamespace(world=SimpleNamespace(size=1)))
    with pytest.raises(CheckpointError, match="is gone: the run goes on"):
        load_checkpoint(run, Checkpoint(tmp_path / "step_00000004", 4, 1))
    with pytest.raises(AssertionError):  # one that is there is another fault
        load_checkpoint(run, Checkpoint(tmp_path, 4, 1))
