"""Faults that DeepSpeed would pass over in silence."""

import math

import pytest
import tiny

from distilcb.errors import TrainingError

pytestmark = pytest.mark.launch


def spoil_the_gradient() -> str:
    """Runs on every rank: the loss stays finite, one weight's gradient does not."""
    run = tiny.start(tiny.tiny_config())
    run.take(0, 1)
    run.models.student.lm_head.dense.weight.register_hook(lambda gradient: gradient * math.nan)
    try:
        run.take(1, 2)
    except TrainingError as error:
        return str(error)
    return "nothing was said"


def test_a_gradient_that_is_not_finite_stops_a_run_that_cannot_overflow(run_on_ranks):
    (rank,) = run_on_ranks(spoil_the_gradient, 1)
    assert rank.result == "step 2: the gradient is not finite, though every loss term is."
