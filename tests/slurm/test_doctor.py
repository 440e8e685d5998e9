"""slurm/doctor.sbatch on a real Slurm: alike nodes are found healthy, one that is slowed on purpose is named."""

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

pytestmark = pytest.mark.launch

SLOW_LINK = "50mbit"
SLOW_LINK_GB_PER_SECOND = 0.00625
# On the core of a node's rank, at the rank's own priority: it keeps a third of its time.
BURNERS = 2
# So that none is left should this process be killed.
SPIN = "from time import time; end = time() + 400\nwhile time() < end: pass"
# Above whatever else this machine does meanwhile, so that it does not decide; in its own session and in the group of
# sessions that the kernel may schedule together.
PRIORITY = -15

# Each node's ranks on a core of their own, as machines have theirs.
PYTHON = """#!/bin/bash
case $(hostname) in *1) core={first};; *) core={second};; esac
{raise_group}
exec nice -n {priority} taskset --cpu-list $core {python} "$@"
"""
RAISE_GROUP = f"{{ [ ! -w /proc/self/autogroup ] || echo {PRIORITY} > /proc/self/autogroup; }} 2>/dev/null"


def options(*, ranks_a_node):
    return ("--nodes=2", f"--ntasks-per-node={ranks_a_node}", "--gres=none", "--cpus-per-task=1")


@pytest.fixture(scope="module")
def cores():
    """Two cores of this machine, one for each node."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores, so that two nodes have one each")
    return cores[:2]


@pytest.fixture
def submitted(lab, run_dir, cores):
    """Submits the doctor: submitted("--wait_minutes", 1, ranks_a_node=2) -> job."""
    run_dir.mkdir(parents=True)
    python = run_dir / "python"
    first, second = cores
    python.write_text(
        PYTHON.format(first=first, second=second, raise_group=RAISE_GROUP, priority=PRIORITY, python=sys.executable)
    )
    python.chmod(0o755)

    def submit(*words, ranks_a_node):
        words = ("--run_dir", run_dir / "run", "--output", run_dir / "report.json", *words)
        chosen = options(ranks_a_node=ranks_a_node)
        return lab.submit(*words, options=chosen, script="doctor.sbatch", environ={"PYTHON": str(python)})

    return submit


def report_of(job, run_dir, *, exit_code):
    """The report of an ended job."""
    facts = job.ended(seconds=500)
    assert facts["ExitCode"] == exit_code, job.said()
    report = json.loads((run_dir / "report.json").read_text())
    assert report["seconds"] < 300
    return report


def test_two_nodes_alike_are_found_healthy_and_nobody_is_named(submitted, run_dir):
    job = submitted(ranks_a_node=2)
    report = report_of(job, run_dir, exit_code="0:0")
    assert report["findings"] == []
    assert "verdict: OK: nothing is broken, and no node is clearly slower than the others" in job.said()
    assert "--exclude" not in job.said()
    assert [each["host"] for each in report["ranks"]] == ["node1", "node1", "node2", "node2"]
    assert set(report["sums"]) == {"node1", "node2", "between nodes", "all ranks"}
    assert {(each["from"], each["to"]) for each in report["links"]} == {("node1", "node2"), ("node2", "node1")}
    assert min(report["writes"].values()) > 0
    assert {path.name for path in run_dir.iterdir()} == {"python", "report.json"}


def test_a_node_with_a_slow_link_is_named_with_the_rate_that_it_was_given(lab, submitted, run_dir):
    limit = ("root", "tbf", "rate", SLOW_LINK, "burst", "64kb", "latency", "100ms")
    assert lab.on_node("node1", "tc", "qdisc", "add", "dev", "eth0", *limit).returncode == 0
    try:
        job = submitted(ranks_a_node=1)
        report = report_of(job, run_dir, exit_code="1:0")
    finally:
        lab.on_node("node1", "tc", "qdisc", "del", "dev", "eth0", "root")
    assert [(each["host"], each["kind"]) for each in report["findings"]] == [("node1", "sends")]
    assert report["findings"][0]["ratio"] < 0.1
    sent = {each["from"]: each["gb_per_second"] for each in report["links"]}
    assert sent["node1"] == pytest.approx(SLOW_LINK_GB_PER_SECOND, rel=0.15)
    assert "the slowest node is node1" in job.said()
    assert "#SBATCH --exclude=node1" in job.said()


def test_a_node_whose_core_something_else_uses_is_named_and_told_why(submitted, run_dir, cores):
    with ExitStack() as stack:
        for _ in range(BURNERS):
            spin = f"{RAISE_GROUP}; exec nice -n {PRIORITY} taskset --cpu-list {cores[1]} {sys.executable} -c '{SPIN}'"
            burner = subprocess.Popen(["bash", "-c", spin], start_new_session=True)
            stack.callback(burner.wait)
            stack.callback(burner.kill)
        report = report_of(submitted(ranks_a_node=1), run_dir, exit_code="1:0")
        assert burner.poll() is None
    assert [(each["host"], each["kind"]) for each in report["findings"]] == [("node2", "products")]
    assert report["findings"][0]["ratio"] < 0.7
    assert "of its cores' time: something else runs there" in report["findings"][0]["text"]


def test_a_rank_that_stands_still_ends_the_doctor_and_is_named(lab, submitted):
    job = submitted("--wait_minutes", 0.5, ranks_a_node=1)
    job.wait_until(lambda: "2 of 4: measuring sums" in job.said(), "the second measurement")
    started = time.monotonic()
    found = lab.on_node("node2", "pgrep", "--full", "--oldest", "python.* launch/doctor.py").stdout.strip()
    lab.on_node("node2", "kill", "-STOP", found)
    facts = job.ended(seconds=100)
    assert facts["JobState"] == "FAILED"
    assert "TrainingError: rank 1 on node2: no sign of life for " in job.said()
    assert "Look at that machine" in job.said()
    assert time.monotonic() - started < 60
