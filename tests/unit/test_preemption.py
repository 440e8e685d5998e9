"""Requests to stop: where they are heard, and how ranks agree on the step."""

import os
import signal
import time

import pytest
from torch.distributed import HashStore

from distilcb.errors import TrainingError
from distilcb.launcher import World
from distilcb.preemption import STOP_FILE_VARIABLE, StopRequest, ignore_in_helper


@pytest.fixture
def requests(tmp_path, monkeypatch):
    """A request object for each rank, over one store; files are looked at each time."""

    def on(ranks, *, look_every=-1.0, **environ):
        monkeypatch.setattr("distilcb.preemption._LOOK_EVERY_SECONDS", look_every)
        store = HashStore()
        worlds = [World("env", rank, ranks, rank, ranks, "127.0.0.1", 1) for rank in range(ranks)]
        return [StopRequest(world, store, tmp_path, environ) for world in worlds]

    return on


@pytest.fixture
def handlers():
    """Puts the signals' handlers back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nobody_stops_unasked(requests):
    one, two = requests(2)
    assert [one.agreed_after(step) or two.agreed_after(step) for step in range(5)] == [None] * 5
    assert not one.heard()
    assert not two.heard()


def test_a_single_process_stops_after_the_step_in_which_it_is_asked(requests, tmp_path):
    (only,) = requests(1)
    assert only.agreed_after(1) is None
    (tmp_path / "STOP").touch()
    assert only.agreed_after(2) == f"{tmp_path / 'STOP'} is there"
    assert only.agreed_now() == only.agreed_after(3)


def test_a_file_in_the_folder_of_any_run_that_stops_with_this_one_is_a_request(tmp_path):
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    world = World("env", 0, 1, 0, 1, "127.0.0.1", 1)
    only = StopRequest(world, HashStore(), folders[0], {}, beside=folders[1:])
    assert only.agreed_after(1) is None
    (folders[2] / "STOP").touch()
    other = StopRequest(world, HashStore(), folders[0], {}, beside=folders[1:])
    assert other.agreed_after(2) == f"{folders[2] / 'STOP'} is there"


def test_the_file_of_this_slice_is_a_request_too(requests, tmp_path):
    (only,) = requests(1, **{STOP_FILE_VARIABLE: str(tmp_path / "time_is_up.42.0")})
    (tmp_path / "time_is_up.41.0").touch()
    assert only.agreed_after(1) is None
    (tmp_path / "time_is_up.42.0").touch()
    assert only.agreed_after(2) == "the time limit is near"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_request_and_ends_nothing_by_itself(requests, handlers, number):
    (only,) = requests(1)
    only.listen()
    os.kill(os.getpid(), number)
    assert only.agreed_after(1) == f"{number.name} came"
    only.stop_listening()
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
@pytest.mark.parametrize("asked", [0, 1, 2])
def test_all_ranks_stop_after_one_step_whoever_is_asked_and_whoever_looks_first(requests, handlers, order, asked):
    ranks = requests(3)
    ranks[asked].listen()
    stopped_after = {}
    for step in range(1, 8):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        for rank in order:  # as in training, no rank is a whole step ahead of another
            if (reason := ranks[rank].agreed_after(step)) is not None:
                stopped_after[rank] = step
                assert "SIGTERM came" in reason
                assert reason.startswith(f"rank {asked}: ") == (asked != 0)
        if stopped_after:
            break
    assert set(stopped_after) == {0, 1, 2}, "some rank would go on alone"
    assert len(set(stopped_after.values())) == 1
    assert stopped_after[0] in (4, 5)


def test_a_rank_that_others_have_left_behind_ends_in_an_error_rather_than_alone(requests, tmp_path):
    one, two = requests(2)
    (tmp_path / "STOP").touch()
    assert one.agreed_after(1) is None
    assert one.agreed_after(2)
    with pytest.raises(TrainingError, match="rank 1 has taken step 3, but all were to stop after 2"):
        two.agreed_after(3)


def test_what_one_rank_hears_in_an_evaluation_the_others_hear(requests, tmp_path):
    one, two = requests(2)
    (tmp_path / "STOP").touch()
    assert not two.heard()  # only rank zero looks at files
    assert one.heard()
    assert two.heard()


def test_rank_zero_hears_the_others_though_it_looks_for_files_as_well(requests, handlers):
    one, two = requests(2, look_every=0.05)
    two.listen()
    os.kill(os.getpid(), signal.SIGTERM)
    assert two.heard()
    deadline = time.monotonic() + 10
    while not one.heard() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.heard()


def test_what_is_heard_is_known_to_rank_zero_by_then(requests, handlers, monkeypatch):
    """A signal that comes between the two halves of `heard` is heard by the next call, not by this one alone."""
    one, two = requests(2)
    pass_on = two._pass_on

    def pass_on_and_be_signalled():
        pass_on()
        two._hear(signal.SIGTERM, None)

    monkeypatch.setattr(two, "_pass_on", pass_on_and_be_signalled)
    assert not two.heard()
    monkeypatch.setattr(two, "_pass_on", pass_on)
    assert two.heard()
    assert one._asked_anywhere() == "rank 1: SIGTERM came"


def test_a_helper_lives_on_when_every_process_of_the_step_is_signalled(handlers):
    ignore_in_helper(0)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
