"""slurm/distill.sbatch on a real Slurm: warned, requeued, cancelled, chained, stopped, and a node lost."""

import pytest
from slurm_jobs import ONE_RANK_A_NODE, SMALL, assert_same_run, curve

from distilcb.config import REPOSITORY


def time_is_nearly_up(lab, job):
    """The warning that --signal=B:USR1@600 sends before the time limit."""
    lab.run("scancel", "--batch", "--signal=USR1", job.number)


def test_a_bare_sbatch_distils_the_shipped_text_on_every_task_of_the_header(lab):
    run_dir = REPOSITORY / "runs" / "mini"
    if run_dir.exists():
        pytest.skip("runs/mini is there already, and is the user's")
    job = lab.submit(options=("--time=60",), environ={"OMP_NUM_THREADS": "1"})
    try:
        assert job.ended(seconds=400)["JobState"] == "COMPLETED", job.said()
        assert "world: 1 node(s) x 4 rank(s)" in job.said()
        assert (run_dir / "DONE").exists()
        assert list(curve(run_dir)) == [10, 20, 30, 40, 50, 60]
    finally:
        lab.run("rm", "-rf", run_dir)


def test_a_run_that_is_warned_saves_requeues_itself_and_ends_as_if_undisturbed(lab, run_dir, undisturbed):
    job = lab.submit("--run_dir", run_dir, *SMALL)
    for restarts, step in (("1", 3), ("2", 9)):
        job.wait_for_step(run_dir, step)
        time_is_nearly_up(lab, job)
        job.wait_until(lambda wanted=restarts: job.facts()["Restarts"] == wanted, "it is requeued")
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), job.said()
    assert job.said().count("saved and requeued") == 2
    assert job.said().count("resuming from") == 2
    assert_same_run(run_dir, undisturbed)
    assert not list(run_dir.parent.glob(f".{run_dir.name}.time_is_up*"))


def test_a_cancelled_run_has_saved_and_the_same_line_again_goes_on(lab, run_dir, undisturbed):
    first = lab.submit("--run_dir", run_dir, *SMALL)
    first.wait_for_step(run_dir, 3)
    lab.run("scancel", first.number)
    assert first.ended()["JobState"] == "CANCELLED"
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step_*"))
    assert saved, first.said()
    assert "stopped after step" in first.said()
    second = lab.submit("--run_dir", run_dir, *SMALL)
    assert second.ended()["JobState"] == "COMPLETED", second.said()
    assert f"resuming from {run_dir / 'checkpoints' / saved[-1]}" in second.said()
    assert_same_run(run_dir, undisturbed)


def test_a_rank_that_is_killed_ends_the_job_as_failed_and_it_is_not_repeated(lab, run_dir):
    job = lab.submit("--run_dir", run_dir, *SMALL)
    job.wait_for_step(run_dir, 3)
    lab.signal_rank("node2", "KILL")
    facts = job.ended(seconds=30)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0"), job.said()
    assert "task 1: Killed" in job.said()
    assert not (run_dir / "DONE").exists()


def test_a_run_whose_node_loses_power_is_requeued_and_ends_as_if_undisturbed(lab, run_dir, undisturbed):
    job = lab.submit("--run_dir", run_dir, *SMALL)
    job.wait_for_step(run_dir, 6)
    lab.script("crash", "node2")
    job.wait_until(lambda: job.facts()["Restarts"] == "1", "Slurm notices, and requeues")
    lab.script("boot", "node2")
    facts = job.ended()
    assert facts["JobState"] == "COMPLETED", job.said()
    assert_same_run(run_dir, undisturbed)


def test_a_lost_node_that_we_notice_before_slurm_does_costs_no_more_than_the_steps_since_the_last_save(
    lab, run_dir, undisturbed
):
    """As on most clusters, where Slurm waits for a silent node for five minutes, and a run for one."""
    job = lab.submit("--run_dir", run_dir, *SMALL, "--train.stall_minutes", "0.1")
    job.wait_for_step(run_dir, 6)
    with lab.node_may_be_silent_for(45):
        lab.script("crash", "node2")
        # srun ends when Slurm, too, calls the node down; then the job's script requeues it, or Slurm does.
        job.wait_until(lambda: job.facts()["Restarts"] == "1", "it is requeued")
        lab.script("boot", "node2")
        facts = job.ended()
    assert facts["JobState"] == "COMPLETED", job.said()
    assert "rank 1 on node2: no sign of life for 6 s" in job.said()
    assert_same_run(run_dir, undisturbed)


def test_a_preempted_run_saves_in_its_time_of_grace_and_goes_on_when_the_nodes_are_free(lab, run_dir, undisturbed):
    job = lab.submit("--run_dir", run_dir, *SMALL)
    job.wait_for_step(run_dir, 3)
    all_of_it = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={lab.shared}/urgent.out")
    urgent = lab.run("sbatch", "--parsable", *all_of_it, "--wrap", "sleep 2").stdout.strip()
    job.wait_until(lambda: job.facts()["Restarts"] == "1", "it is requeued")
    assert "stopped after step" in job.said()
    assert lab.script("wait", urgent, "60").returncode == 0
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert "resuming from" in job.said()
    assert_same_run(run_dir, undisturbed)


@pytest.mark.parametrize("moment", ["preflight: 2 ranks", "evaluating on held-out text"])
def test_a_run_that_is_preempted_before_its_first_step_is_begun_again(lab, run_dir, moment):
    """While its models are loaded, when SIGTERM ends the ranks; and in the first evaluation, when they end well."""
    job = lab.submit("--run_dir", run_dir, *SMALL, "--train.eval_maskings", "40", "--train.eval_every", "0")
    job.wait_until(lambda: moment in job.said(), moment)
    all_of_it = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={lab.shared}/urgent.out")
    lab.run("sbatch", *all_of_it, "--wrap", "sleep 2")
    job.wait_until(lambda: job.facts()["Restarts"] == "1", "it is requeued")
    assert not curve(run_dir)
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.said()
    assert (run_dir / "DONE").exists()


def test_a_dry_run_as_a_job_ends_well(lab, run_dir):
    job = lab.submit("--run_dir", run_dir, "--dry_run", "--deepspeed", "zero2_cpu", "--optim.global_batch", "32")
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    assert "seconds_per_step" in job.said()
    assert not run_dir.exists()


def test_an_array_chains_slices_and_those_after_the_last_step_do_nothing(lab, run_dir, undisturbed):
    chain = lab.submit("--run_dir", run_dir, "--fresh", *SMALL, options=(*ONE_RANK_A_NODE, "--array=1-4%1"))
    chain.wait_until(lambda: len(curve(run_dir)) >= 1, "the first slice trains")
    # Slurm 22.05 delivers it, and tries again with "Job can not be altered now" until the slice is over.
    lab.run("scancel", "--batch", "--signal=USR1", f"{chain.number}_1", check=False)
    said = _wait_for_chain(lab, chain.number)
    assert "the next slice goes on" in said[1]
    assert "resuming from" in said[2]
    assert "DONE: nothing to do" in said[3]
    assert "DONE: nothing to do" in said[4]
    assert_same_run(run_dir, undisturbed)


def _wait_for_chain(lab, number):
    """What each slice said, once all are over."""
    assert lab.script("wait", number, "240").returncode == 0
    slices = _slices(lab, number)
    return {place: (lab.shared / f"{facts['JobId']}.out").read_text() for place, facts in slices.items()}


def _slices(lab, number):
    """Facts of each slice that has started, by its place in the array."""
    lines = lab.run("scontrol", "-o", "show", "job", number).stdout.splitlines()
    slices = [dict(word.partition("=")[::2] for word in line.split() if "=" in word) for line in lines]
    return {int(facts["ArrayTaskId"]): facts for facts in slices if facts["ArrayTaskId"].isdecimal()}


def test_a_file_stop_ends_a_run_saved_and_keeps_it_from_going_on_until_it_is_removed(lab, run_dir, undisturbed):
    job = lab.submit("--run_dir", run_dir, *SMALL)
    job.wait_for_step(run_dir, 3)
    (run_dir / "STOP").touch()
    facts = job.ended()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), job.said()
    steps = list(curve(run_dir))
    assert "STOP is there" in job.said()
    again = lab.submit("--run_dir", run_dir, *SMALL)
    assert again.ended()["JobState"] == "COMPLETED", again.said()
    assert "STOP is there: not starting" in again.said()
    assert list(curve(run_dir)) == steps
    (run_dir / "STOP").unlink()
    last = lab.submit("--run_dir", run_dir, *SMALL)
    assert last.ended()["JobState"] == "COMPLETED", last.said()
    assert_same_run(run_dir, undisturbed)


def test_a_run_that_is_done_is_left_alone(lab, undisturbed):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    job = lab.submit("--run_dir", undisturbed, *SMALL)
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    assert "is DONE: nothing to do" in job.said()
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before
