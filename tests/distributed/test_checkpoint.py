"""Checkpoints: whole or not at all, whenever a process dies; damage found; resumed exactly."""

import errno
import itertools
import json
import logging
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distilcb import distributed
from distilcb.engine import checkpoint as checkpoint_module
from distilcb.engine.checkpoint import Checkpoint, Checkpoints
from distilcb.errors import CheckpointError

MODEL, SHARD = "mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"


class StandIn:
    """Writes files where DeepSpeed's engine would, without an engine."""

    shards: tuple[str, ...] = ("zero_pp_rank_0_mp_rank_00_optim_states.pt", SHARD)

    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        assert not save_latest  # DeepSpeed writes it before the files are safe
        path = Path(folder) / tag
        path.mkdir(parents=True)
        for name in (MODEL, *self.shards):
            (path / name).write_text(f"{name} after step {client_state['step']}")


def save(folder: Path, step: int, *, keep: int = 2, engine: Any = None) -> None:
    Checkpoints(folder, keep=keep).save(engine or StandIn(), step=step, world_size=2, state={})


def newest(folder: Path) -> Checkpoint | None:
    return Checkpoints(folder, keep=2).newest()


def newest_step(folder: Path) -> int | None:
    found = newest(folder)
    return None if found is None else found.step


def latest(folder: Path) -> str:
    return (folder / "latest").read_text().strip()


@pytest.fixture
def warnings():
    """What was warned of, whatever other tests made of the loggers."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(checkpoint_module.__name__)
    logger.addHandler(handler)
    yield told
    logger.removeHandler(handler)


def killed_before_change(number: int, action: Callable[[], None]) -> bool:
    """Do `action` in a process that is killed before its change `number` to the disk; False if it makes fewer."""
    child = os.fork()
    if child == 0:
        changes = itertools.count()

        def kill_if_it_is_time() -> None:
            if next(changes) == number:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                kill_if_it_is_time()

        sys.addaudithook(audit)
        sync = os.fsync
        os.fsync = lambda descriptor: (kill_if_it_is_time(), sync(descriptor))  # type: ignore[assignment]
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status != 0


@pytest.mark.parametrize(("before", "keep"), [((), 2), ((1,), 1), ((1, 2), 2)])
def test_a_kill_at_any_moment_of_a_save_leaves_the_newest_complete_checkpoint(tmp_path, before, keep):
    step = len(before) + 1
    for number in itertools.count():
        folder = tmp_path / str(number)
        for earlier in before:
            save(folder, earlier, keep=keep)
        killed = killed_before_change(number, lambda folder=folder: save(folder, step, keep=keep))
        assert newest_step(folder) in (step, before[-1] if before else None)
        save(folder, step, keep=keep)  # the next start comes to the same step
        assert newest_step(folder) == step
        assert latest(folder) == f"step_{step:08d}"
        assert Checkpoints(folder, keep=keep).steps() == [*before, step][-keep:]
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".step")) == []
        if not killed:
            break
    assert number > 12


def test_a_kill_while_a_damaged_checkpoint_is_replaced_leaves_the_one_before_it(tmp_path):
    for number in itertools.count():
        folder = tmp_path / str(number)
        save(folder, 1)
        save(folder, 2)
        (folder / "step_00000002" / MODEL).write_text("damaged")
        killed = killed_before_change(number, lambda folder=folder: save(folder, 2))
        assert newest_step(folder) in (1, 2)
        if not killed:
            break
    assert newest_step(folder) == 2


def change_a_byte(checkpoint: Path) -> None:
    data = bytearray((checkpoint / SHARD).read_bytes())
    data[3] ^= 1
    (checkpoint / SHARD).write_bytes(data)


DAMAGE = {
    "a changed byte": (change_a_byte, SHARD),
    "a file cut short": (lambda path: os.truncate(path / MODEL, 5), MODEL),
    "a missing file": (lambda path: (path / SHARD).unlink(), SHARD),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "a manifest cut short": (lambda path: os.truncate(path / "manifest.json", 20), "Error"),
    "another format": (lambda path: (path / "manifest.json").write_text(json.dumps({"format_version": 99})), "99"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, warnings, damage):
    for step in (1, 2):
        save(tmp_path, step)
    spoil, named = DAMAGE[damage]
    spoil(tmp_path / "step_00000002")
    assert newest_step(tmp_path) == 1
    assert len(warnings) == 1
    assert str(tmp_path / "step_00000002") in warnings[0]
    assert named in warnings[0]
    assert Checkpoints(tmp_path, keep=2).of_step(2) is None


def test_a_damaged_checkpoint_of_a_later_step_does_not_push_good_ones_out(tmp_path):
    save(tmp_path, 4, keep=1)
    (tmp_path / "step_00000004" / MODEL).unlink()
    save(tmp_path, 2, keep=1)
    assert newest_step(tmp_path) == 2
    save(tmp_path, 5, keep=1)
    assert Checkpoints(tmp_path, keep=1).steps() == [5]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_checkpoints_are_kept(tmp_path, keep):
    for step in range(10, 60, 10):
        save(tmp_path, step, keep=keep)
        assert latest(tmp_path) == f"step_{step:08d}"
    assert Checkpoints(tmp_path, keep=keep).steps() == [10, 20, 30, 40, 50][-keep:]


def test_the_newest_is_found_by_number_and_not_by_name(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    assert newest_step(tmp_path) == 100_000_000


def test_latest_is_for_readers_and_its_absence_changes_nothing(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "latest").unlink()
    assert newest_step(tmp_path) == 2


def test_a_folder_without_checkpoints_has_no_newest(tmp_path):
    assert newest(tmp_path) is None
    assert newest(tmp_path / "missing") is None


def test_where_no_checkpoint_can_be_used_a_run_does_not_begin_anew_over_them(tmp_path, warnings):
    assert Checkpoints(tmp_path, keep=2).newest_or_none_at_all() is None
    for step in (1, 2):
        save(tmp_path, step)
        (tmp_path / f"step_{step:08d}" / MODEL).write_text("something else")
    with pytest.raises(CheckpointError, match=r"of its 2 checkpoint\(s\) none can be used"):
        Checkpoints(tmp_path, keep=2).newest_or_none_at_all()
    assert len(warnings) == 2


def test_a_shard_that_a_network_file_system_shows_late_is_waited_for(tmp_path):
    class Late(StandIn):
        def save_checkpoint(self, folder: str, *, tag: str, **rest: Any) -> None:
            super().save_checkpoint(folder, tag=tag, **rest)
            shard = Path(folder) / tag / SHARD
            hidden = shard.rename(shard.with_name("not listed yet"))
            threading.Timer(1.0, lambda: hidden.rename(shard)).start()

    save(tmp_path, 1, engine=Late())
    assert newest_step(tmp_path) == 1


def test_a_save_whose_shards_rank_zero_does_not_all_see_is_not_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "_SHARDS_ARE_SEEN_WITHIN_SECONDS", 0.1)
    save(tmp_path, 1)
    lacking = StandIn()
    lacking.shards = (SHARD,)
    with pytest.raises(CheckpointError, match="1 shards of 2 ranks are seen"):
        save(tmp_path, 2, engine=lacking)
    assert newest_step(tmp_path) == 1


def test_a_conversion_that_takes_too_long_is_ended_before_the_other_ranks_give_up(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint_module, "_CONVERTED_WITHIN_SECONDS", 0.01)
    with pytest.raises(CheckpointError, match=r"not converted .* within 0 s"):
        Checkpoints(tmp_path, keep=2).load(None, Checkpoints(tmp_path, keep=2).of_step(1), world_size=1)


def test_a_checkpoint_that_cannot_be_converted_for_other_ranks_says_so_and_stays(tmp_path):
    save(tmp_path, 1)  # a stand-in's files, which DeepSpeed cannot read
    found = newest(tmp_path)
    assert found is not None
    with pytest.raises(
        CheckpointError, match=r"cannot be converted for another number of ranks \(.+\)\. Start on as many"
    ):
        Checkpoints(tmp_path, keep=2).load(None, found, world_size=3)
    assert newest(tmp_path) == found
    assert not list(tmp_path.glob(".universal*"))


class FullDisk(StandIn):
    def save_checkpoint(self, folder: str, *, tag: str, client_state: dict[str, Any], save_latest: bool) -> None:
        super().save_checkpoint(folder, tag=tag, client_state=client_state, save_latest=save_latest)
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoints_before_it(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step_00000002 cannot be written .*No space left"):
        save(tmp_path, 2, engine=FullDisk())
    assert newest_step(tmp_path) == 1
    assert latest(tmp_path) == "step_00000001"
    assert [path.name for path in tmp_path.glob(".step*")] == []


def test_a_disk_that_fills_up_with_the_manifest_is_told_too(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def no_space(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, "write_durably", no_space)
    with pytest.raises(CheckpointError, match=r"cannot be written .*No space left"):
        save(tmp_path, 2)
    assert newest_step(tmp_path) == 1
    assert [path.name for path in tmp_path.glob(".step*")] == []


def sums_of(run: tiny.TinyRun, first: int, last: int) -> torch.Tensor:
    """(steps, terms) sums over all ranks."""
    return distributed.all_reduce_sum(torch.stack([result.sums for result in run.take(first, last)]))


@pytest.fixture(scope="module")
def killed_run(run_on_ranks, tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """Checkpoints of a run on 2 ranks that died while it saved step 6, and the sums of its 6 steps."""
    folder = tmp_path_factory.mktemp("killed")
    ranks = run_on_ranks(train_until_killed, 2, fails=True, folder=folder)
    assert ranks[0].exit_code == -signal.SIGKILL, ranks[0].output
    return folder, torch.load(folder / "sums.pt")


def train_until_killed(folder: Path) -> None:
    """Runs on every rank."""
    run, checkpoints = tiny.start(tiny.tiny_config()), Checkpoints(folder, keep=3)
    sums = []
    for first in (0, 2, 4):
        sums.append(sums_of(run, first, first + 2))
        if first == 4 and distributed.is_main_process():
            torch.save(torch.cat(sums), folder / "sums.pt")
            Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment, method-assign]
        checkpoints.save(run.engine, step=first + 2, world_size=2, state={"seconds": first + 0.5})


@pytest.fixture(scope="module")
def resumed_run(run_on_ranks, killed_run) -> tuple[list[Any], Path]:
    """What the next start on 2 ranks makes of it; its disk ends full."""
    folder, _ = killed_run
    (folder / "latest").unlink()
    return run_on_ranks(resume_twice, 2, fails=True, folder=folder), folder


def resume_twice(folder: Path) -> None:
    """Runs on every rank: go on, damage what was gone on from, go on again, and have no room for a save."""
    checkpoints = Checkpoints(folder, keep=3)
    told = {}
    for damaged in (None, 4):
        if damaged and distributed.is_main_process():
            shard = folder / f"step_{damaged:08d}" / SHARD
            os.truncate(shard, shard.stat().st_size - 1)
        run = tiny.start(tiny.tiny_config())
        found = distributed.on_main(checkpoints.newest)
        assert found is not None
        state = checkpoints.load(run.engine, found, world_size=2)
        told[found.step] = {"state": state, "sums": sums_of(run, found.step, 6)}
    if distributed.is_main_process():
        torch.save(told, folder / "told.pt")
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    checkpoints.save(run.engine, step=6, world_size=2, state={})


@pytest.mark.launch
def test_a_save_that_was_killed_is_passed_over(killed_run):
    folder, _ = killed_run
    assert (folder / ".step_00000006.tmp").is_dir()
    assert Checkpoints(folder, keep=3).steps() == [2, 4]


@pytest.mark.launch
def test_a_resumed_run_goes_on_as_if_it_had_not_been_killed(killed_run, resumed_run):
    _, sums = killed_run
    told = torch.load(resumed_run[1] / "told.pt", weights_only=False)
    assert sorted(told) == [2, 4]  # step 4, and step 2 once that was damaged
    for step in told:
        assert torch.equal(told[step]["sums"], sums[step:])
        assert told[step]["state"]["seconds"] == step - 1.5


@pytest.mark.launch
def test_one_rank_without_disk_space_ends_all_and_says_why(resumed_run):
    ranks, folder = resumed_run
    assert [rank.exit_code for rank in ranks] == [1, 2], ranks[0].output + ranks[1].output
    assert "TrainingError: another rank is gone, which may say why" in ranks[0].output
    message = f"[rank 1] CheckpointError: {folder / 'step_00000006'} cannot be written"
    assert ranks[1].output.count(message) == ranks[1].output.count("cannot be written") == 1
    assert newest_step(folder) == 2
