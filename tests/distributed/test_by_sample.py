"""The figures of single samples add up to the step, and looking at them leaves the step as it is."""

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_fp16 import allow_fp16_on_this_cpu
from test_stepper import LOSSES

from distilcb import watchdog
from distilcb.config import LossConfig
from distilcb.distributed import all_reduce_sum
from distilcb.losses import reference
from distilcb.losses.triplet import TERMS, divisors
from distilcb.train.by_sample import figures_by_sample, spare_module, take_weights

pytestmark = pytest.mark.launch

GLOBAL_BATCH = 16
STEP = 2
# How far half precision takes the sum of samples, computed one by one, from the step.
TOLERANCE = {"zero2_cpu": 1e-5, "zero2_bf16": 2e-2, "zero2_fp16": 2e-3}


def look(cases: dict[str, tuple[str, LossConfig, float]]) -> dict[str, dict[str, Any]]:
    """Runs on every rank."""
    allow_fp16_on_this_cpu()
    return {name: _look(*case) for name, case in cases.items()}


def _look(deepspeed: str, loss: LossConfig, dropout: float) -> dict[str, Any]:
    """A step whose samples were looked at before, and the same step without."""
    config = tiny.tiny_config(deepspeed=deepspeed, loss=loss, dropout=dropout, global_batch=GLOBAL_BATCH)
    spare = spare_module(tiny.models(config), loss)
    run, undisturbed = tiny.start(config), tiny.start(config)
    for each in (run, undisturbed):
        each.take(0, STEP)
    take_weights(spare, run.engine.module)
    scale = float(run.engine.optimizer.cur_scale) if "fp16" in deepspeed else 1.0
    moves_before = watchdog._position.moves
    figures, again = (
        figures_by_sample(spare, run.stepper, run.micro_batches, run.counts, step=STEP, loss_scale=scale)
        for _ in range(2)
    )
    moves = watchdog._position.moves - moves_before
    (result,), (same,) = run.take(STEP, STEP + 1), undisturbed.take(STEP, STEP + 1)
    by = torch.tensor([divisors(loss, run.counts)[term] for term in TERMS], dtype=torch.float64)
    pairs = zip(run.engine.module.parameters(), undisturbed.engine.module.parameters(), strict=True)
    return {
        "terms": figures.terms,
        "grad_norms": figures.grad_norms,
        "grad_norm": figures.grad_norm,
        "moves": moves,
        "same_again": bool((figures.terms == again.terms).all() and (figures.grad_norms == again.grad_norms).all()),
        "step_terms": all_reduce_sum(result.sums.clone()) / by,
        "step_grad_norm": float(result.grad_norm),
        "same_sums": bool((result.sums == same.sums).all()),
        "same_grad_norm": float(result.grad_norm) == float(same.grad_norm),
        "same_weights": all(bool((ours == theirs).all()) for ours, theirs in pairs),
    }


CASES = {
    **{name: (name, LOSSES["all three"], 0.0) for name in TOLERANCE},
    **{loss: ("zero2_cpu", LOSSES[loss], 0.0) for loss in ("mlm", "cos", "masked tokens only")},
    "dropout": ("zero2_cpu", LOSSES["all three"], 0.1),
}
WITHOUT_DROPOUT = [name for name in CASES if name != "dropout"]


@pytest.fixture(scope="module", params=[1, 2])
def looked(request, run_on_ranks) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [rank.result for rank in run_on_ranks(look, request.param, cases=CASES)]


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_the_mean_of_the_samples_losses_is_the_steps(looked, name):
    for rank in looked:
        seen = rank[name]
        assert seen["terms"].shape == (GLOBAL_BATCH, len(TERMS))
        torch.testing.assert_close(seen["terms"].mean(0), seen["step_terms"], rtol=TOLERANCE[CASES[name][0]], atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_the_norm_of_the_samples_mean_gradient_is_the_steps(looked, name):
    for rank in looked:
        seen = rank[name]
        assert seen["grad_norm"] == pytest.approx(seen["step_grad_norm"], rel=TOLERANCE[CASES[name][0]])
        assert seen["grad_norms"].mean() > 1.05 * seen["grad_norm"]  # norms of parts are not the norm of the whole


@pytest.mark.parametrize("name", CASES)
def test_looking_at_the_samples_leaves_the_step_as_it_is_to_the_last_bit(looked, name):
    for rank in looked:
        assert rank[name]["same_sums"]
        assert rank[name]["same_grad_norm"]
        assert rank[name]["same_weights"]


@pytest.mark.parametrize("name", CASES)
def test_the_watchdog_sees_a_move_at_each_sample(looked, name):
    assert all(rank[name]["moves"] >= 2 * GLOBAL_BATCH / len(looked) for rank in looked)  # they were looked at twice


def test_samples_are_looked_at_without_dropout(looked):
    seen = looked[0]["dropout"]
    assert seen["same_again"]  # dropout would be drawn anew
    assert not torch.allclose(seen["terms"].mean(0), seen["step_terms"], rtol=1e-3)


def plain_sample(config, batch) -> tuple[dict[str, float], float]:
    """Mean terms and gradient norm of one sample at the first weights, in float64 and plain PyTorch."""
    built, loss = tiny.models(config), config.loss
    student, teacher = built.student.double(), built.teacher.model.double()
    ours = student(batch.input_ids, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(batch.input_ids, output_hidden_states=True)
    logits, teacher_logits = ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1)
    hidden, teacher_hidden = ours.hidden_states[-1].flatten(0, 1), theirs.hidden_states[-1].flatten(0, 1)
    terms = {
        "kl": reference.soft_target_kl(logits, teacher_logits, temperature=loss.temperature) / len(logits),
        "mlm": reference.masked_lm(logits[batch.labelled_rows], batch.labels) / len(batch.labels),
        "cos": reference.hidden_cosine(hidden, teacher_hidden) / len(logits),
    }
    sum(getattr(loss, term) * value for term, value in terms.items()).backward()
    squares = sum(float(weight.grad.square().sum()) for weight in student.parameters())
    return {term: value.item() for term, value in terms.items()}, squares**0.5


def look_at_first_step() -> dict[str, Any]:
    """Runs on every rank."""
    config = tiny.tiny_config(global_batch=GLOBAL_BATCH)
    spare = spare_module(tiny.models(config), config.loss)
    run = tiny.start(config)
    take_weights(spare, run.engine.module)
    figures = figures_by_sample(spare, run.stepper, run.micro_batches, run.counts, step=0)
    batches = [run.micro_batches.at(np.array([position])) for position in range(GLOBAL_BATCH)]
    return {"figures": asdict(figures), "batches": batches}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_samples_figures_are_those_of_plain_pytorch_on_it_alone(run_on_ranks, ranks):
    config = tiny.tiny_config(global_batch=GLOBAL_BATCH)
    for rank in run_on_ranks(look_at_first_step, ranks):
        figures, batches = rank.result["figures"], rank.result["batches"]
        for i, batch in enumerate(batches):
            terms, grad_norm = plain_sample(config, batch)
            for term, value in terms.items():
                assert figures["terms"][i][TERMS.index(term)].item() == pytest.approx(value, rel=1e-5), (i, term)
            assert figures["grad_norms"][i].item() == pytest.approx(grad_norm, rel=1e-5), i
