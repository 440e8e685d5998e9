"""Real ranks that do not go together are refused at the start, on all of them, with one message."""

from pathlib import Path

import pytest
import torch

from distilcb import distributed
from distilcb.command_line import parse_command_line
from distilcb.train import preflight as preflight_module
from distilcb.train.preflight import preflight

pytestmark = pytest.mark.launch


def check(folder: Path, fault: str) -> int:
    """Runs on every rank; rank one is odd in one way."""
    world = distributed.start()
    odd = world.rank == 1
    lr = "0.002" if odd and fault == "recipe" else "0.001"
    run_dir = folder / ("other" if odd and fault == "folder" else "run")
    words = ["--data.train", "some.txt", "--run_dir", str(run_dir), "--optim.lr", lr]
    if odd and fault == "sums":
        right = distributed.all_reduce_sum
        preflight_module.all_reduce_sum = lambda tensor: right(tensor) + (torch.arange(tensor.numel()) == 7)
    if odd and fault == "blind":
        preflight_module._SEEN_WITHIN_SECONDS = 0.3
        preflight_module._appears = lambda _: False
    if fault == "blind":
        preflight_module.platform.node = lambda: f"node{world.rank}"
    return preflight(world, parse_command_line(words), {"zero_optimization": {"stage": 2}})


def test_ranks_that_go_together_pass_and_leave_nothing_behind(run_on_ranks, tmp_path):
    assert [rank.result for rank in run_on_ranks(check, 2, folder=tmp_path, fault="none")] == [1, 1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("recipe", "the resolved recipe is "),
        ("folder", "the run folder is "),
        ("sums", "a sum over ranks is wrong on rank 1: the network or its library corrupts data"),
        ("blind", "is not the same folder everywhere: node1 cannot see what node0 writes"),
    ],
)
def test_ranks_that_differ_are_refused_by_name_with_exit_code_2(run_on_ranks, tmp_path, fault, told):
    ranks = run_on_ranks(check, 2, fails=True, folder=tmp_path, fault=fault)
    assert [rank.exit_code for rank in ranks] == [2, 2], ranks[0].output
    assert told in ranks[0].output
    if fault in ("recipe", "folder"):
        assert "but not on rank 1 on " in ranks[0].output
    assert "Traceback" not in ranks[0].output + ranks[1].output
    assert list(tmp_path.iterdir()) == []


def look(folder: Path, blind: bool) -> int:
    """Runs on every rank, each on a machine of its own, for a run that is there."""
    world = distributed.start()
    preflight_module.platform.node = lambda: f"node{world.rank}"
    if blind and world.rank == 1:
        preflight_module._hash_of = lambda _: None
    command = parse_command_line(["--data.train", "some.txt", "--run_dir", str(folder)])
    return preflight(world, command, {}, reads_only=True)


def test_who_only_reads_a_run_on_two_machines_leaves_no_trace_in_its_folder(run_on_ranks, tmp_path):
    (tmp_path / "config.yaml").write_text("a: run")
    before = tmp_path.stat().st_mtime_ns
    assert [rank.result for rank in run_on_ranks(look, 2, folder=tmp_path, blind=False)] == [2, 2]
    assert tmp_path.stat().st_mtime_ns == before


def test_who_only_reads_a_run_is_told_which_machine_does_not_see_it(run_on_ranks, tmp_path):
    (tmp_path / "config.yaml").write_text("a: run")
    ranks = run_on_ranks(look, 2, fails=True, folder=tmp_path, blind=True)
    assert [rank.exit_code for rank in ranks] == [2, 2], ranks[0].output
    assert "not the same folder everywhere: node1 cannot see the run that node0 sees there" in ranks[0].output
