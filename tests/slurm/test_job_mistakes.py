"""What users of slurm/distill.sbatch get wrong: one message on one rank, exit code 2, nothing spoiled."""

import re

from slurm_jobs import ONE_RANK_A_NODE, SMALL, curve

# Long enough for another job to meet it.
LONGER = (*SMALL, "--train.steps", "40")


def refusal(job):
    """The one message of a job that was refused."""
    facts = job.ended(seconds=120)
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0"), job.said()
    assert "Traceback" not in job.said()
    messages = re.findall(r"(?m)^(?:\[rank \d+\] )?\w+Error: .*(?:\n  .*)*", job.said())
    assert len(messages) == 1, job.said()
    return messages[0]


def test_an_option_that_does_not_exist_is_told_before_any_rank_starts(lab, run_dir):
    job = lab.submit("--run_dir", run_dir, "--optim.lrr", "1")
    assert "did you mean --optim.lr?" in refusal(job)
    assert "srun ended" not in job.said()


def test_a_site_file_that_is_missing_is_named(lab):
    job = lab.submit(environ={"DISTILCB_SITE": "/nowhere/site.sh"})
    assert "DISTILCB_SITE=/nowhere/site.sh is not there. Copy slurm/site.sh.example" in refusal(job)


def test_a_job_that_is_warned_before_it_begins_is_not_requeued_over_and_over(lab, run_dir):
    """As one whose --time is no longer than the warning before its end."""
    site = lab.shared / "warned.sh"
    site.write_text("kill -USR1 $$\n")
    job = lab.submit("--run_dir", run_dir, *SMALL, environ={"DISTILCB_SITE": str(site)})
    assert "the time limit is near before training has begun. Ask for a --time" in refusal(job)
    assert not run_dir.exists()


def test_a_job_submitted_from_elsewhere_is_told_from_where(lab):
    job = lab.submit(options=(*ONE_RANK_A_NODE, f"--chdir={lab.shared}"), environ={"DISTILCB_HOME": str(lab.shared)})
    assert f"{lab.shared} is not distilcb's folder" in refusal(job)


def test_a_python_without_the_package_is_named_with_the_mend(lab):
    job = lab.submit(environ={"PYTHON": "/usr/bin/python3"})
    job.ended()
    assert "LaunchError: /usr/bin/python3 has no distilcb on node1. Run 'make install'" in job.said()
    assert job.facts()["ExitCode"] == "2:0"


def test_a_run_folder_on_a_nodes_own_disk_is_found_out(lab):
    job = lab.submit("--run_dir", "/tmp/own_disk/run", *SMALL)
    message = refusal(job)
    assert "/tmp/own_disk/run is not the same folder everywhere: node2 cannot see what node1 writes" in message
    assert "a file system that all nodes share" in message


def test_tasks_that_do_not_fill_the_nodes_evenly_are_refused(lab, run_dir):
    options = ("--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gres=gpu:2", "--time=60", "--cpus-per-task=1")
    job = lab.submit("--run_dir", run_dir, *SMALL, "--optim.global_batch", "24", options=options)
    assert "machines have different numbers of ranks (node1 2, node2 1)" in refusal(job)


def test_gpus_that_would_idle_are_refused(lab, run_dir):
    options = ("--nodes=1", "--ntasks-per-node=1", "--gres=gpu:4", "--time=60", "--cpus-per-task=1")
    job = lab.submit("--run_dir", run_dir, *SMALL, options=options)
    assert "1 task(s) and 4 GPUs a node: 3 of them would idle" in refusal(job)


def test_the_folder_of_a_running_job_is_refused_and_so_is_a_recipe_that_changed_between_slices(lab, run_dir):
    first = lab.submit("--run_dir", run_dir, *LONGER)
    first.wait_for_step(run_dir, 3)
    message = refusal(lab.submit("--run_dir", run_dir, *LONGER))
    assert f"Slurm job {first.number}" in message
    assert "trains there" in message

    (run_dir / "STOP").touch()
    assert first.ended()["JobState"] == "COMPLETED", first.said()
    (run_dir / "STOP").unlink()
    steps = len(curve(run_dir))
    message = refusal(lab.submit("--run_dir", run_dir, *LONGER, "--optim.lr", "0.002", "--train.steps", "41"))
    assert "optim.lr: 0.0015 -> 0.002" in message
    assert "train.steps: 40 -> 41" in message
    assert len(curve(run_dir)) == steps

    may_change = ("--optim.micro_batch", "8", "--train.log_every", "2", "--train.save_every", "6")
    last = lab.submit("--run_dir", run_dir, *LONGER, *may_change)
    assert last.ended()["JobState"] == "COMPLETED", last.said()
    assert (run_dir / "DONE").exists()
