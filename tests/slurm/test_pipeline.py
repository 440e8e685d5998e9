"""slurm/pipeline.sh on a real Slurm: text to model card in one submission."""

import json
import re

import pytest
from slurm_jobs import ONE_RANK_A_NODE, SMALL, Job, assert_same_run, curve

from distilcb.config import DEFAULT_RECIPE

MINI = DEFAULT_RECIPE.parent / "mini"
ONE_TASK = ("--nodes=1", "--ntasks-per-node=1", "--gres=gpu:1", "--cpus-per-task=1", "--time=60")


@pytest.fixture
def folder(lab, run_dir):
    """Where a test's pipeline works, with a task of a few rows."""
    made = run_dir.with_name(f"{run_dir.name}_files")
    rows = made / "data" / "allocine_fr"
    rows.mkdir(parents=True)
    texts = ("Un très beau film.", "Quel ennui, ce film.")
    for split, count in (("train", 24), ("test", 8)):
        lines = (json.dumps({"text": texts[n % 2], "label": n % 2}, ensure_ascii=False) for n in range(count))
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return made


def write_pipeline(lab, folder, run_dir, *, evaluate="", distil=""):
    """A file for pipeline.sh; returns it."""
    options = " ".join(ONE_RANK_A_NODE)
    log = f"--output={lab.shared}/%j.out"
    text = f"""
        teacher={MINI}/teacher
        prepare=(--input {MINI}/text/train --tokenizer "$teacher" --seq_len 128 --output {folder}/blocks)
        distill=({" ".join(SMALL)} --data.train {folder}/blocks --run_dir {run_dir} {distil})
        evaluate=({run_dir}/student --teacher "$teacher" --tasks allocine_fr --data {folder}/data --seeds 0 1 2 3)
        evaluate+=(--epochs 1 --speed --lengths 16 --card --output {folder}/evaluation {evaluate})
        prepare_sbatch=({log} --nodes=2 --cpus-per-task=1 --time=60)
        distill_sbatch=({log} {options})
        evaluate_sbatch=({log} --cpus-per-task=1 --time=60)
    """
    path = folder / "pipeline"
    path.write_text("\n".join(line.strip() for line in text.splitlines()), encoding="utf-8")
    return path


def submit(lab, file, *, check=True):
    """What pipeline.sh said, and its jobs in their order."""
    ended = lab.run("bash", "slurm/pipeline.sh", file, check=check)
    numbers = re.findall(r"(?:prepare|distill|evaluate): job (\d+)", ended.stdout)
    return ended, [Job(lab, number, lab.shared / f"{number}.out") for number in numbers]


def lose_a_node(lab, job, node):
    """One that the job runs on; it is there again once Slurm has noticed and requeued."""
    lab.script("crash", node)
    job.wait_until(lambda: job.facts()["Restarts"] == "1", "Slurm notices, and requeues")
    lab.script("boot", node)


def test_a_pipeline_loses_a_node_in_every_stage_and_ends_with_a_filled_card(lab, folder, run_dir, undisturbed):
    file = write_pipeline(lab, folder, run_dir)
    said, (prepare, distil, evaluate) = submit(lab, file)
    assert f"evaluate: job {evaluate.number}, afterok:{distil.number}" in said.stdout
    rank = ("pgrep", "--full", "^[^ ]*python[^ ]* launch/prepare.py")
    prepare.wait_until(lambda: lab.on_node("node2", *rank).returncode == 0, "it has a rank there")
    lose_a_node(lab, prepare, "node2")
    assert distil.facts()["JobState"] == "PENDING"
    assert prepare.ended()["JobState"] == "COMPLETED", prepare.said()

    distil.wait_for_step(run_dir, 6)
    assert evaluate.facts()["JobState"] == "PENDING"
    lose_a_node(lab, distil, "node2")
    assert distil.ended()["JobState"] == "COMPLETED", distil.said()

    fine_tunings = folder / "evaluation/tasks/allocine_fr"
    evaluate.wait_until(lambda: list(fine_tunings.glob("*/seed_*/result.json")), "a seed is finished")
    finished = {path: path.stat().st_mtime_ns for path in fine_tunings.glob("*/seed_*/result.json")}
    lose_a_node(lab, evaluate, evaluate.facts()["NodeList"])
    assert evaluate.ended()["JobState"] == "COMPLETED", evaluate.said()
    assert all(path.stat().st_mtime_ns == made for path, made in finished.items())

    card = (run_dir / "student" / "README.md").read_text(encoding="utf-8")
    assert "| allocine_fr | accuracy |" in card
    assert "## Size and speed" in card
    found = json.loads((folder / "evaluation/tasks/results.json").read_text())["tasks"]["allocine_fr"]["models"]
    assert [len(each["seeds"]) for each in found.values()] == [4, 4]

    assert_same_run(run_dir, undisturbed)  # which prepared the same text itself, and lost no node

    # The same line again finds all of it done.
    figures, results = curve(run_dir), folder / "evaluation/tasks/allocine_fr/teacher/seed_0/result.json"
    made = results.stat().st_mtime_ns
    again = submit(lab, file)[1]
    assert [job.ended()["JobState"] for job in again] == ["COMPLETED"] * 3, [job.said() for job in again]
    assert curve(run_dir) == figures
    assert results.stat().st_mtime_ns == made


def test_a_stage_that_fails_cancels_those_after_it(lab, folder, run_dir):
    file = write_pipeline(lab, folder, run_dir, distil="--data.heldout /nowhere")
    _, (prepare, distil, evaluate) = submit(lab, file)
    assert prepare.ended()["JobState"] == "COMPLETED", prepare.said()
    assert distil.ended()["JobState"] == "FAILED", distil.said()
    assert "/nowhere does not exist" in distil.said()
    assert evaluate.ended(seconds=60)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(
    ("evaluate", "distil", "told"),
    [
        ("--sedes 3", "", "--sedes"),
        ("--heldout /nowhere", "", "/nowhere does not exist"),
        ("--split dev", "", "no rows of 'dev'"),
        ("", "--optim.lrr 1", "did you mean --optim.lr?"),
    ],
)
def test_a_mistake_in_a_late_stage_is_told_before_anything_is_submitted(lab, folder, run_dir, evaluate, distil, told):
    before = lab.run("squeue", "--noheader", "--states=all").stdout
    ended, jobs = submit(lab, write_pipeline(lab, folder, run_dir, evaluate=evaluate, distil=distil), check=False)
    assert (ended.returncode, jobs) == (2, [])
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
    assert lab.run("squeue", "--noheader", "--states=all").stdout.count("\n") == before.count("\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("prepare+=(--input /nowhere.txt)", "/nowhere.txt does not exist"),
        ("prepare+=(--tokenizer /nowhere)", "tokenizer folder /nowhere does not exist"),
        ("distil=(--train.steps 3)", "sets distil, which is no stage"),
        ("distil_sbatch=(--nodes=4)", "sets distil_sbatch, which is no stage"),
        ("prepare=(--input", "is not bash"),
    ],
)
def test_a_mistake_in_the_file_is_told(lab, folder, run_dir, line, told):
    file = write_pipeline(lab, folder, run_dir)
    file.write_text(f"{file.read_text()}\n{line}\n")
    ended, jobs = submit(lab, file, check=False)
    assert (ended.returncode, jobs) == (2, [])
    assert told in ended.stderr


def test_options_that_slurm_refuses_leave_nothing_behind(lab, folder, run_dir):
    file = write_pipeline(lab, folder, run_dir)
    file.write_text(file.read_text() + "\nevaluate_sbatch=(--partition=nowhere)\n")
    ended, (prepare, distil) = submit(lab, file, check=False)
    assert ended.returncode == 2
    assert "Mend evaluate_sbatch" in ended.stderr
    assert [job.ended(seconds=60)["JobState"] for job in (prepare, distil)] == ["CANCELLED"] * 2


def test_a_file_that_is_not_there_or_empty_is_told(lab, folder):
    ended, _ = submit(lab, folder / "nowhere", check=False)
    assert (ended.returncode, "Copy slurm/pipeline.example" in ended.stderr) == (2, True)
    (folder / "empty").write_text("run=here\n")
    ended, _ = submit(lab, folder / "empty", check=False)
    assert (ended.returncode, "has no stage" in ended.stderr) == (2, True)


def test_an_evaluation_at_its_time_limit_goes_on_in_another_slice_once_it_has_finished_something(lab, folder):
    output = folder / "evaluation"
    words = (MINI / "teacher", "--tasks", "allocine_fr", "--data", folder / "data", "--output", output)
    words += ("--seeds", *range(12), "--epochs", "12")
    job = lab.submit(*words, options=ONE_TASK, script="evaluate.sbatch")

    def finished():
        return {path: path.stat().st_mtime_ns for path in output.glob("tasks/*/*/*/result.json")}

    job.wait_until(lambda: "launch/evaluate.py" in job.said(), "it has begun")
    lab.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: "nothing was finished in this slice" in job.said(), "it says so")
    assert not finished()
    job.wait_until(finished, "it has gone on, and finished one")
    assert job.facts()["Restarts"] == "0"

    lab.run("scancel", "--batch", "--signal=USR1", job.number)
    job.wait_until(lambda: job.facts()["Restarts"] == "1", "it is requeued")
    kept = finished()
    assert 0 < len(kept) < 12
    facts = job.ended()
    assert facts["JobState"] == "COMPLETED", job.said()
    assert len(finished()) == 12
    assert kept.items() <= finished().items()
