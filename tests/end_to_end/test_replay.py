"""launch/replay.py as users start it: on one rank and on two, beside a training, and on what it refuses."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusal import assert_refused

pytestmark = pytest.mark.launch

FIGURES = ("loss", "loss/kl", "loss/mlm", "loss/cos", "lr", "grad_norm", "loss_scale", "skipped_steps")
# Lines of steps 1 to 2, 3, 4 and 5 to 6; checkpoints of steps 3 and 6.
IN_WINDOWS = ("--optim.micro_batch", "2", "--train.log_every", "2", "--train.save_every", "3")


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and bytes of every file, time of every folder."""
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
        for path in [folder, *folder.rglob("*")]
    }


def line_of(run_dir: Path, step: int) -> dict[str, Any]:
    """What was logged at a step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    (line,) = [line for line in lines if line["step"] == step and "loss" in line]
    return line


@pytest.fixture(scope="module", params=[1, 2])
def in_windows(request, commands, tmp_path_factory) -> dict[str, Any]:
    """A run whose lines are means over several steps, and step 5 of it replayed on as many ranks."""
    ranks, folder = request.param, tmp_path_factory.mktemp("in_windows")
    run_dir, output = folder / "run", folder / "report.json"

    def start(program: str, *words: object) -> Any:
        ended = commands.python(program, *words) if ranks == 1 else commands.deepspeed(ranks, program, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    start("train", "--run_dir", run_dir, *commands.small, *IN_WINDOWS)
    before = contents(run_dir)
    ended = start("replay", run_dir, "--step", "5", "--output", output)
    return {
        "run": run_dir,
        "report": json.loads(output.read_text()),
        "said": ended.stdout,
        "unchanged": contents(run_dir) == before,
    }


def test_a_replayed_window_is_equal_to_its_line_to_the_last_bit(in_windows):
    report, line = in_windows["report"], line_of(in_windows["run"], 6)
    compared = report["comparison"]
    assert (report["started_from"], compared["first"], compared["last"]) == (3, 5, 6)
    assert line["window_steps"] == 2
    assert compared["replayed"] == {name: line[name] for name in FIGURES}
    assert compared["logged"] == compared["replayed"]
    assert report["taken"] != compared["replayed"]  # the step alone is not its window
    assert "where steps 5 to 6 have one line" in in_windows["said"]
    assert "all equal to the last bit" in in_windows["said"]


def test_a_replay_leaves_every_byte_of_the_run_folder_as_it_is(in_windows):
    assert in_windows["unchanged"]


def test_the_samples_of_a_step_add_up_to_it(in_windows):
    report = in_windows["report"]
    assert len(report["samples"]) == 8
    for name in ("loss", "loss/kl", "loss/mlm", "loss/cos"):
        mean = math.fsum(sample["figures"][name] for sample in report["samples"]) / 8
        assert mean == pytest.approx(report["taken"][name], rel=1e-6), name
        assert report["together"][name] == pytest.approx(mean)
    assert report["together"]["grad_norm"] == pytest.approx(report["taken"]["grad_norm"], rel=1e-6)


def test_samples_are_named_the_largest_gradient_first(in_windows):
    samples = in_windows["report"]["samples"]
    norms = [sample["figures"]["grad_norm"] for sample in samples]
    assert norms == sorted(norms, reverse=True)
    assert len({sample["sample"] for sample in samples}) == 8
    said = [line for line in in_windows["said"].splitlines() if any(f" {s['sample']} " in line for s in samples)]
    assert len(said) == 8
    for line, sample in zip(said, samples, strict=True):
        assert f" {sample['sample']} " in line
        assert f" {sample['epoch']} " in line
        assert sample["text"][:60] in line
        assert {word["treatment"] for word in sample["masked"]} <= {"hidden", "replaced", "kept"}
        assert sum(len(word["columns"]) for word in sample["masked"]) == round(0.15 * 30)


def test_a_step_before_the_first_checkpoint_is_taken_from_the_first_weights(commands, finished, tmp_path):
    ended = commands.python("replay", finished, "--step", "2", "--worst", "1", "--full", "--output", tmp_path / "r")
    assert ended.returncode == 0, ended.stderr
    assert "from the first weights" in ended.stderr
    assert "the 1 of 8 samples" in ended.stdout
    report, line = json.loads((tmp_path / "r").read_text()), line_of(finished, 2)
    assert report["started_from"] == 0
    assert report["samples"][0]["text"] in ended.stdout
    assert report["taken"] == report["comparison"]["replayed"] == {name: line[name] for name in FIGURES}
    assert report["together"]["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-6)
    assert report["together"]["loss"] == pytest.approx(line["loss"], rel=1e-6)


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished run, to be spoiled."""
    return shutil.copytree(finished, tmp_path / "copied")


def rewrite_line(run_dir: Path, step: int, **figures: Any) -> None:
    """Change a step's line, or without figures take it away."""
    path = run_dir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["step"] != step or "loss" not in line or figures]
    for line in kept:
        if line["step"] == step and "loss" in line:
            line.update(figures)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in kept))


def rewrite_provenance(run_dir: Path, *, facts: dict[str, Any] | None = None, **known: Any) -> None:
    """Change what a run says of where it comes from."""
    document = yaml.safe_load((run_dir / "config.yaml").read_text())
    document["provenance"] |= known
    document["provenance"]["facts"] |= facts or {}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(document))


def test_a_line_that_was_tampered_with_is_told_with_both_figures(commands, copied, tmp_path):
    logged = line_of(copied, 5)
    other = {name: math.nextafter(logged[name], math.inf) for name in ("loss/kl", "grad_norm")}
    rewrite_line(copied, 5, **other)
    rewrite_provenance(copied, threads=9)
    ended = commands.python("replay", copied, "--step", "5", "--output", tmp_path / "report.json")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("ReplayError: step 5 came out otherwise") == 1
    for name, value in other.items():
        assert f"{name}: logged {value!r}, now {logged[name]!r}\n" in ended.stderr
    assert "loss/mlm: logged" not in ended.stderr
    assert "first start: threads 9 -> 1." in ended.stderr
    compared = json.loads((tmp_path / "report.json").read_text())["comparison"]
    assert compared["differing"] == ["loss/kl", "grad_norm"]


def test_a_step_without_a_line_is_shown_and_nothing_is_compared(commands, copied, tmp_path):
    rewrite_line(copied, 6)
    ended = commands.python("replay", copied, "--step", "6", "--output", tmp_path / "report.json")
    assert ended.returncode == 0, ended.stderr
    assert "nothing could be compared" in ended.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["comparison"], len(report["samples"])) == (None, 8)


def test_the_step_that_ended_a_run_is_shown_by_sample_before_it_ends_the_replay(commands, tmp_path):
    run_dir, output = tmp_path / "run", tmp_path / "report.json"
    words = [*commands.small, "--optim.lr", "1e30", "--optim.warmup", "0", "--train.save_every", "1"]
    assert commands.python("train", "--run_dir", run_dir, *words).returncode == 1
    ended = commands.python("replay", run_dir, "--step", "2", "--output", output)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert "TrainingError: step 2: loss term kl, mlm, cos is not finite" in ended.stderr
    report = json.loads(output.read_text())
    assert "is not finite" in report["fault"]
    assert (report["taken"], report["comparison"]) == (None, None)
    assert [sample["figures"]["grad_norm"] for sample in report["samples"]] == [None] * 8
    assert all(f" {sample['sample']} " in ended.stdout for sample in report["samples"])


def test_a_replay_runs_beside_the_training_and_disturbs_nothing(commands, finished, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--run_dir", run_dir, *commands.small, "--train.steps", "5000", "--train.keep_checkpoints", "5000"]
    with commands.training(*words, until_step=3) as training:
        lock = (run_dir / ".lock").read_bytes()
        ended = commands.python("replay", run_dir, "--step", "3", "--worst", "1")
        assert training.poll() is None
        assert (run_dir / ".lock").read_bytes() == lock
    assert ended.returncode == 0, ended.stderr
    assert "all equal to the last bit" in ended.stdout


REFUSED = {
    "a folder that is not there": ("{tmp}/none", ["--step", "1"], ["does not exist", "--run_dir"]),
    "a folder of something else": ("{text}", ["--step", "1"], ["no run folder"]),
    "no step": ("{run}", [], ["--step"]),
    "a step that is no number": ("{run}", ["--step", "last"], ["--step", "'last'"]),
    "a step beyond the last": ("{run}", ["--step", "7"], ["--step 7", "steps 1 to 6"]),
    "an option that is none": ("{run}", ["--step", "1", "--optim.lr", "1"], ["--optim.lr"]),
    "a report in the run folder": ("{run}", ["--step", "1", "--output", "{run}/r.json"], ["lies in the run folder"]),
    "text that is not there": ("{run}", ["--step", "1", "--data.train", "no/text"], ["no/text", "does not exist"]),
    "other text": (
        "{run}",
        ["--step", "1", "--data.train", "{text}/heldout"],
        ["data.train: other text"],
    ),
    "another teacher": ("{run}", ["--step", "1", "--teacher.model", "{run}/student"], ["teacher.model: another model"]),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_ends_with_one_message_and_changes_nothing(commands, finished, tmp_path, mistake):
    run_dir, words, parts = REFUSED[mistake]
    places = {"run": finished, "tmp": tmp_path, "text": commands.text}
    before = contents(finished)
    ended = commands.python("replay", run_dir.format(**places), *(word.format(**places) for word in words))
    assert_refused(ended, *parts)
    assert contents(finished) == before


def test_another_precision_than_the_runs_is_refused(commands, copied):
    rewrite_provenance(copied, facts={"precision": "fp16"})
    assert_refused(commands.python("replay", copied, "--step", "1"), "precision: fp16 -> fp32")


def test_a_run_of_one_rank_is_not_replayed_on_two_and_that_is_told_once(commands, finished):
    ended = commands.deepspeed(2, "replay", finished, "--step", "5")
    assert ended.returncode == 2
    said = ended.stdout + ended.stderr
    assert said.count("CheckpointError: ") == 1
    assert "taken by 1 rank(s), not by 2" in said
    assert "Traceback (most recent call last)" not in said


def test_text_and_teacher_that_lie_elsewhere_now_are_told_by_options(commands, finished, tmp_path):
    shutil.copytree(commands.text / "train", tmp_path / "moved")
    teacher = yaml.safe_load((finished / "config.yaml").read_text())["teacher"]["model"]
    shutil.copytree(teacher, tmp_path / "teacher")
    config = shutil.copytree(finished, tmp_path / "run") / "config.yaml"
    config.write_text(
        config.read_text().replace(str(commands.text), "/gone").replace(str(commands.cache), f"{tmp_path}/cache")
    )
    words = ["--data.train", tmp_path / "moved", "--teacher.model", tmp_path / "teacher"]
    words += ["--data.cache", commands.cache, "--data.workers", "0"]
    ended = commands.python("replay", tmp_path / "run", "--step", "5", "--worst", "1", *words)
    assert ended.returncode == 0, ended.stderr
    assert "all equal to the last bit" in ended.stdout
