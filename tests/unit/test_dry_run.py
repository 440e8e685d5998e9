"""What a dry run makes of its timings; the run itself is tested end to end."""

from types import SimpleNamespace

import pytest
import torch

from distilcb.train import dry_run
from distilcb.train.dry_run import _turns, _whole_step

PLACE = SimpleNamespace(device=torch.device("cpu"), world=SimpleNamespace(size=1))


@pytest.mark.parametrize("accumulation", [1, 2, 512])
def test_a_whole_step_is_its_micro_batches_and_the_optimizer_once(accumulation):
    micro, optimizer = 0.3, 0.05
    short, long = 2 * micro + optimizer, 6 * micro + optimizer
    assert _whole_step(short, long, accumulation) == pytest.approx(accumulation * micro + optimizer)


def test_timings_that_contradict_each_other_still_give_a_time():
    assert _whole_step(2.0, 1.0, 10) == pytest.approx(10.0)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(dry_run.time, "perf_counter", lambda: clock.now)
    return clock


def steps_of_a_second(clock, skips=()):
    """Turns of a short and a long step, a second in all; updates of the turns `skips` are skipped."""
    taken = []

    def turn():
        clock.now += 1
        taken.append(len(taken))
        return [(0.3, [], False), (0.7, [], taken[-1] in skips)]

    return turn, taken


@pytest.mark.parametrize(("seconds", "turns"), [(0.0, 1), (1.0, 1), (2.5, 3), (30.0, 30)])
def test_turns_are_taken_until_the_time_is_over(clock, seconds, turns):
    turn, taken = steps_of_a_second(clock)
    assert list(_turns(turn, PLACE, seconds)) == [(0.3, 0.7)] * turns
    assert len(taken) == turns


def test_skipped_updates_are_not_timed(clock):
    turn, taken = steps_of_a_second(clock, skips=(0, 1, 3))
    assert len(list(_turns(turn, PLACE, 5.0))) == 2
    assert len(taken) == 5


def test_a_loss_scale_that_never_comes_to_rest_does_not_keep_it_from_ending(clock):
    turn, _ = steps_of_a_second(clock, skips=range(1000))
    assert len(list(_turns(turn, PLACE, 0.0))) == 1
