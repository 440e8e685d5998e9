"""Which ranks are odd, which layouts are refused, and whether the disk has room."""

import shutil
from collections import namedtuple

import pytest

from distilcb.errors import CheckpointError
from distilcb.launcher import World
from distilcb.train.preflight import check_free_disk, disagreements, layout_faults

Usage = namedtuple("Usage", "total used free")
GIB = 2**30


def rank(host, **same):
    return {"host": host, "same": {"torch": "2.13.0", "the resolved recipe": "a1"} | same}


def srun(size):
    return World("srun", 0, size, 0, 1, "node1", 1)


def test_like_ranks_do_not_disagree():
    assert disagreements([rank("node1"), rank("node1"), rank("node2")]) == []


def test_the_odd_rank_out_is_named_with_its_machine_and_what_it_has():
    ranks = [rank("node1"), rank("node1"), rank("node2", torch="2.11.0"), rank("node2")]
    assert disagreements(ranks) == ["torch is 2.13.0, but not on rank 2 on node2 (2.11.0)"]


def test_rank_zero_may_be_the_odd_one():
    ranks = [rank("node1", torch="2.11.0"), rank("node2"), rank("node3")]
    assert disagreements(ranks) == ["torch is 2.13.0, but not on rank 0 on node1 (2.11.0)"]


def test_of_two_ranks_that_differ_rank_zero_is_taken_for_right():
    ranks = [rank("node1"), rank("node2", **{"the resolved recipe": "b2"})]
    assert disagreements(ranks) == ["the resolved recipe is a1, but not on rank 1 on node2 (b2)"]


def test_every_disagreement_is_told_and_many_ranks_are_counted():
    ranks = [rank("node1")] * 9 + [rank("node2", torch="2.11.0", **{"the resolved recipe": "b2"})] * 8
    torch_line, recipe_line = disagreements(ranks)
    assert torch_line.endswith("and 4 more")
    assert recipe_line.startswith("the resolved recipe is a1")


def test_machines_with_different_numbers_of_ranks_are_refused():
    (fault,) = layout_faults(srun(3), {"node1": 2, "node2": 1}, "")
    assert "node1 2, node2 1" in fault
    assert "--ntasks-per-node" in fault


@pytest.mark.parametrize(("gpus", "fault"), [("4", True), ("2", False), ("", False)])
def test_gpus_that_would_idle_are_told_with_the_header_that_uses_them(gpus, fault):
    found = layout_faults(srun(4), {"node1": 2, "node2": 2}, gpus)
    assert bool(found) == fault
    if fault:
        assert "2 of them would idle" in found[0]
        assert "--ntasks-per-node=4 --gres=gpu:4" in found[0]


def test_somebody_who_starts_one_process_by_hand_may_use_one_gpu_of_many():
    world = World("single", 0, 1, 0, 1, "127.0.0.1", 1)
    assert layout_faults(world, {"node1": 1}, "4") == []


@pytest.fixture
def disk(monkeypatch):
    def with_free(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * GIB, 0, free))

    return with_free


def test_a_disk_without_room_for_one_checkpoint_is_refused_with_both_sizes(disk, tmp_path):
    disk(GIB)
    with pytest.raises(CheckpointError, match=r"1\.00 GiB are free .* 68,000,000 parameters needs 1\.01"):
        check_free_disk(tmp_path / "runs" / "new", parameters=68_000_000, keep=2)


def test_room_for_one_checkpoint_but_not_for_all_is_a_warning_that_counts_what_the_run_holds(disk, tmp_path, caplog):
    disk(2 * GIB)
    check_free_disk(tmp_path, parameters=68_000_000, keep=2)
    assert "3 checkpoints need 3.0" in caplog.text
    caplog.clear()
    with (tmp_path / "old_checkpoint").open("wb") as stream:
        stream.truncate(2 * GIB)
    check_free_disk(tmp_path, parameters=68_000_000, keep=2)
    assert caplog.text == ""
