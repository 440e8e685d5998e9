"""What a dry run makes of its timings; the run itself is tested end to end."""

import pytest

from distilcb.train.dry_run import _whole_step


@pytest.mark.parametrize("accumulation", [1, 2, 512])
def test_a_whole_step_is_its_micro_batches_and_the_optimizer_once(accumulation):
    micro, optimizer = 0.3, 0.05
    seconds = [9.0, 2 * micro + optimizer, 6 * micro + optimizer]
    assert _whole_step(seconds, accumulation) == pytest.approx(accumulation * micro + optimizer)


def test_timings_that_contradict_each_other_still_give_a_time():
    assert _whole_step([9.0, 2.0, 1.0], 10) == pytest.approx(10.0)
