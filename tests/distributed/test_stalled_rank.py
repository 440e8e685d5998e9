"""A rank that stands still while others wait for it: the whole start ends in good time, and it is named."""

import os
import signal
import time
from typing import Any

import pytest
import tiny
from torch.distributed import TCPStore

from distilcb import distributed
from distilcb.engine.checkpoint import Checkpoints
from distilcb.launcher import free_port
from distilcb.watchdog import Place, Watchdog, at

pytestmark = pytest.mark.launch

STALL_SECONDS = 6.0


def stand_still(folder: Any, port: int, moment: str) -> None:
    """Runs on every rank: rank one stands still at a moment of its third step."""
    run = tiny.start(tiny.tiny_config(deepspeed="zero2_cpu", steps=4))
    world = distributed.discover()
    store = TCPStore("127.0.0.1", port, is_master=world.is_main, wait_for_workers=False)
    Watchdog(world, store, stall_minutes=STALL_SECONDS / 60).start()
    run.take(0, 2)
    if world.rank == 1 and moment == "reading":
        at(Place.READING, step=3)
        time.sleep(300)
    if moment == "saving":
        if world.rank == 1:
            run.engine.save_checkpoint = lambda *_, **__: time.sleep(300)
        at(Place.SAVING)
        Checkpoints(folder, keep=1).save(run.engine, step=2, world_size=2, state={})
    run.take(2, 4)


@pytest.mark.parametrize(
    ("moment", "told"),
    [
        ("reading", "rank 1 on {host}: has not moved for"),
        ("saving", "no rank has moved for"),
    ],
)
def test_a_rank_that_stands_still_ends_all_and_is_named_or_shown(run_on_ranks, tmp_path, moment, told):
    import platform

    started = time.monotonic()
    ranks = run_on_ranks(stand_still, 2, fails=True, folder=tmp_path, port=free_port(), moment=moment)
    assert time.monotonic() - started < 120
    assert [rank.exit_code for rank in ranks] == [1, 1], ranks[0].output
    assert told.format(host=platform.node()) in ranks[0].output
    assert "[rank 1] stands here:" in ranks[1].output
    assert "stand_still" in ranks[1].output
    assert not list(tmp_path.glob("step_*"))


def die_among_four(port: int) -> None:
    """Runs on every rank: rank two dies in the third step. Its neighbours notice by themselves, rank zero does not."""
    run = tiny.start(tiny.tiny_config(deepspeed="zero2_cpu", steps=400))
    world = distributed.discover()
    store = TCPStore("127.0.0.1", port, is_master=world.is_main, wait_for_workers=False)
    dog = Watchdog(world, store, stall_minutes=1)
    dog.start()
    run.take(0, 2)
    time.sleep(3)  # every rank has beaten
    if world.rank == 2:
        at(Place.READING, step=3)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        run.take(2, 400)
    except RuntimeError as error:
        raise dog.lost(error) from error


def test_of_four_ranks_the_one_that_died_is_named_and_no_other(run_on_ranks):
    ranks = run_on_ranks(die_among_four, 4, fails=True, port=free_port())
    assert [rank.exit_code for rank in ranks] == [1, 1, -signal.SIGKILL, 1], ranks[0].output
    (told,) = [line for line in ranks[0].output.splitlines() if "TrainingError: " in line]
    assert "rank 2 on " in told
    assert "is gone, last seen in step " in told
    assert not any(f"rank {other} on" in told for other in (0, 1, 3))
