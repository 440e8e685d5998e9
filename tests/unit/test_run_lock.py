"""One process at a time in a run folder."""

import json
import os
import platform
import subprocess
import sys
import time

import pytest

from distilcb.errors import CheckpointError
from distilcb.train import run_lock
from distilcb.train.run_lock import RunLock, refuse_if_held


@pytest.fixture
def elsewhere(tmp_path):
    """Writes a lock as another machine would."""

    def write(*, seconds_ago=0.0, **facts):
        path = tmp_path / run_lock.LOCK
        path.write_text(json.dumps({"host": "another", "pid": 7, "slurm_job": None, "since": "noon"} | facts))
        when = time.time() - seconds_ago
        os.utime(path, (when, when))

    return write


@pytest.fixture
def other_process():
    """A process of this machine that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


def test_a_folder_is_free_until_it_is_taken_and_again_afterwards(tmp_path):
    refuse_if_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    facts = json.loads(lock.path.read_text())
    assert (facts["host"], facts["pid"]) == (platform.node(), os.getpid())
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock.release()
    RunLock(tmp_path).acquire()


def test_a_process_of_this_machine_that_lives_keeps_others_out(tmp_path, other_process):
    started = run_lock._start_of(other_process.pid)
    facts = {"host": platform.node(), "pid": other_process.pid, "process_started": started, "since": "noon"}
    path = tmp_path / run_lock.LOCK
    path.write_text(json.dumps(facts))
    os.utime(path, (0, 0))  # it need not be fresh: that it lives can be seen
    with pytest.raises(CheckpointError, match=f"process {other_process.pid} on .*since noon, trains there"):
        RunLock(tmp_path).acquire()
    assert json.loads(path.read_text()) == facts
    other_process.kill()
    other_process.wait()
    RunLock(tmp_path).acquire()


def test_a_number_that_another_process_has_by_now_keeps_nobody_out(tmp_path, other_process):
    facts = {"host": platform.node(), "pid": other_process.pid, "process_started": "1"}
    (tmp_path / run_lock.LOCK).write_text(json.dumps(facts))
    refuse_if_held(tmp_path)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.release()


def test_another_machine_keeps_others_out_while_its_lock_is_fresh(tmp_path, elsewhere):
    elsewhere(seconds_ago=100)
    with pytest.raises(CheckpointError, match="process 7 on another"):
        refuse_if_held(tmp_path)
    elsewhere(seconds_ago=1000)
    refuse_if_held(tmp_path)


@pytest.mark.parametrize(("ours", "free"), [("41", False), ("42", True), (None, False)])
def test_a_requeued_job_takes_over_its_own_lock_and_no_other_does(tmp_path, elsewhere, monkeypatch, ours, free):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if ours:
        monkeypatch.setenv("SLURM_JOB_ID", ours)
    elsewhere(slurm_job="42")
    if free:
        refuse_if_held(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="Slurm job 42"):
            refuse_if_held(tmp_path)


@pytest.mark.parametrize(
    ("says", "free"),
    [
        ("echo RUNNING", False),
        ("echo SUSPENDED", False),
        ("echo PENDING", True),
        ("true", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1", False),
    ],
)
def test_a_job_that_slurm_says_is_not_running_keeps_nobody_out(tmp_path, elsewhere, monkeypatch, says, free):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "squeue").write_text(f'#!/bin/sh\n[ "$*" = "--noheader --jobs 42 --format=%T" ] || exit 9\n{says}\n')
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    # Slurm is believed whatever the lock's age; where it says nothing a fresh one counts.
    elsewhere(slurm_job="42", seconds_ago=0 if "controller" in says else 1000)
    if free:
        refuse_if_held(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="Slurm job 42"):
            refuse_if_held(tmp_path)


def squeue_says(what, tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "squeue").write_text(f"#!/bin/sh\n{what}\n")
    (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")


def test_a_fresh_lock_of_a_job_that_slurm_does_not_know_keeps_others_out(tmp_path, elsewhere, monkeypatch):
    """It runs on another cluster, or is not for us to see."""
    squeue_says("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", tmp_path, monkeypatch)
    elsewhere(slurm_job="42", seconds_ago=5)
    with pytest.raises(CheckpointError, match="Slurm job 42"):
        refuse_if_held(tmp_path)


@pytest.mark.parametrize(("theirs", "free"), [("west", False), ("east", True), (None, True)])
def test_slurm_is_not_asked_for_a_job_of_another_cluster(tmp_path, elsewhere, monkeypatch, theirs, free):
    squeue_says("true", tmp_path, monkeypatch)  # of that number nothing runs here
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "east")
    elsewhere(slurm_job="42", slurm_cluster=theirs, seconds_ago=5)
    if free:
        refuse_if_held(tmp_path)
    else:
        with pytest.raises(CheckpointError, match="Slurm job 42"):
            refuse_if_held(tmp_path)


def test_a_job_that_slurm_is_taking_from_its_nodes_is_waited_for(tmp_path, elsewhere, monkeypatch):
    monkeypatch.setattr(run_lock, "_ENDING_IS_LOOKED_AT_EVERY_SECONDS", 0.01)
    answers = iter([{"COMPLETING"}] * 3 + [set()] * 3)
    monkeypatch.setattr(run_lock, "_states_of", lambda *_: next(answers))
    elsewhere(slurm_job="42")
    refuse_if_held(tmp_path)
    assert len(list(answers)) < 3


def test_a_process_whose_folder_was_taken_over_ends_and_leaves_the_new_lock(tmp_path, elsewhere, monkeypatch, capfd):
    ended = []
    monkeypatch.setattr(run_lock, "_FRESHEN_EVERY_SECONDS", 0.05)
    monkeypatch.setattr(os, "_exit", ended.append)
    lock = RunLock(tmp_path)
    lock.acquire()
    elsewhere(seconds_ago=0)
    taken = lock.path.read_text()
    deadline = time.monotonic() + 20
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
    lock.release()
    assert ended[0] == 1
    assert lock.path.read_text() == taken
    assert "was taken over by process 7 on another" in capfd.readouterr().err


def test_a_lock_that_cannot_be_read_keeps_others_out_for_a_while(tmp_path):
    path = tmp_path / run_lock.LOCK
    path.write_text("half of")
    with pytest.raises(CheckpointError, match="trains there"):
        refuse_if_held(tmp_path)
    os.utime(path, (0, 0))
    refuse_if_held(tmp_path)


def test_a_lock_is_kept_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "_FRESHEN_EVERY_SECONDS", 0.05)
    lock = RunLock(tmp_path)
    lock.acquire()
    os.utime(lock.path, (0, 0))
    deadline = time.monotonic() + 20
    while lock.path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.time() - lock.path.stat().st_mtime < 20
    lock.release()
