"""Ranks that die, stall or are cut off: the job ends in good time and says who it was."""

import time

import pytest
from slurm_jobs import RANK_PROGRAM, SMALL

# A rank is taken for stalled after six seconds, where users wait ten minutes.
IMPATIENT = (*SMALL, "--train.steps", "400", "--train.stall_minutes", "0.1")


@pytest.fixture
def job(lab, run_dir):
    job = lab.submit("--run_dir", run_dir, *IMPATIENT)
    job.wait_for_step(run_dir, 3)
    yield job
    lab.run("scancel", "--signal=KILL", job.number, check=False)
    lab.run("scancel", job.number, check=False)
    lab.script("wait", job.number, "60")


def test_a_rank_that_stands_still_is_named_with_its_machine_and_step(lab, job):
    lab.signal_rank("node2", "STOP")
    started = time.monotonic()
    job.wait_until(lambda: "no sign of life" in job.said(), "the stalled rank is named", seconds=40)
    assert "TrainingError: rank 1 on node2: no sign of life" in job.said()
    assert "last seen in step " in job.said()
    facts = job.ended(seconds=60)
    assert (facts["JobState"], facts["Restarts"]) == ("FAILED", "0")
    assert time.monotonic() - started < 60


def test_where_rank_zero_stands_still_another_rank_says_so(lab, job):
    lab.signal_rank("node1", "STOP")
    job.wait_until(lambda: "does not answer" in job.said(), "rank zero is missed", seconds=60)
    assert "rank 0 at node1 does not answer" in job.said()
    lab.signal_rank("node1", "CONT")
    assert job.ended(seconds=60)["JobState"] == "FAILED"


def test_a_cut_cable_ends_the_ranks_on_both_sides_and_names_the_far_one(lab, run_dir, job):
    job.wait_for_step(run_dir, 6)
    lab.run("ip", "link", "set", "slab0.2", "down")
    try:
        job.wait_until(lambda: "rank 1 on node2" in job.said(), "the far side is named", seconds=60)
        assert "TrainingError: rank 1 on node2: no sign of life" in job.said()
        survivors = time.monotonic() + 60
        while _ranks_on(lab, "node1") + _ranks_on(lab, "node2"):
            assert time.monotonic() < survivors, "a rank outlived the cut"
            time.sleep(0.5)
        # The node does not answer Slurm either: it is tried again from the last checkpoint.
        job.wait_until(lambda: job.facts()["Restarts"] == "1", "it is requeued")
    finally:
        lab.run("ip", "link", "set", "slab0.2", "up")


def _ranks_on(lab, node):
    return len(lab.on_node(node, "pgrep", "--full", RANK_PROGRAM).stdout.split())
