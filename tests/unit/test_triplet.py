"""The objective's divisors and coefficients, by hand."""

import dataclasses

import pytest

from distilcb.config import LossConfig
from distilcb.losses.triplet import TERMS, Counts, active_terms, coefficients, divisors, weighted_loss

# 4 blocks of 100 tokens, 15 masked in each
COUNTS = Counts(attended=400, labelled=60)
LOSS = LossConfig(kl=0.5, mlm=0.2, cos=0.3, mse=0.1, relation=0.7)


def test_each_term_is_divided_by_the_rows_it_is_summed_over():
    assert divisors(LOSS, COUNTS) == {"kl": 400, "mlm": 60, "cos": 400, "mse": 400, "clm": 60, "relation": 400}


def test_kl_and_mse_on_masked_positions_are_divided_by_those():
    masked = dataclasses.replace(LOSS, kl_positions="masked")
    assert divisors(masked, COUNTS) == {"kl": 60, "mlm": 60, "cos": 400, "mse": 60, "clm": 60, "relation": 400}


def test_a_coefficient_is_weight_over_count():
    found = dataclasses.asdict(coefficients(LOSS, COUNTS, world_size=1))
    wanted = {"kl": 0.5 / 400, "mlm": 0.2 / 60, "cos": 0.3 / 400, "mse": 0.1 / 400, "clm": 0, "relation": 0.7 / 400}
    assert found == pytest.approx(wanted)


@pytest.mark.parametrize("world_size", [2, 3, 64])
def test_coefficients_grow_with_the_ranks_over_which_deepspeed_takes_a_mean(world_size):
    one = dataclasses.asdict(coefficients(LOSS, COUNTS, world_size=1))
    many = dataclasses.asdict(coefficients(LOSS, COUNTS, world_size=world_size))
    assert many == pytest.approx({term: world_size * factor for term, factor in one.items()})


@pytest.mark.parametrize("kl_positions", ["attended", "masked"])
def test_the_mean_over_ranks_of_what_is_optimised_is_the_weighted_loss(kl_positions):
    loss = dataclasses.replace(LOSS, kl_positions=kl_positions)
    sums_by_rank = [
        {"kl": 70.0, "mlm": 33.0, "cos": 12.0, "mse": 900.0, "clm": 0.0, "relation": 40.0},
        {"kl": 10.0, "mlm": 66.0, "cos": 19.0, "mse": 100.0, "clm": 0.0, "relation": 3.0},
        {"kl": 45.0, "mlm": 1.0, "cos": 0.0, "mse": 555.0, "clm": 0.0, "relation": 0.0},
    ]
    factors = dataclasses.asdict(coefficients(loss, COUNTS, world_size=3))
    optimised = sum(factors[term] * sums[term] for sums in sums_by_rank for term in TERMS) / 3
    by = divisors(loss, COUNTS)
    means = {term: sum(sums[term] for sums in sums_by_rank) / by[term] for term in TERMS}
    assert weighted_loss(means, loss) == pytest.approx(optimised)


def test_weighted_loss_by_hand():
    means = {"kl": 2.0, "mlm": 5.0, "cos": 1.0, "mse": 10.0, "clm": 7.0, "relation": 10.0}
    assert weighted_loss(means, LOSS) == pytest.approx(1 + 1 + 0.3 + 1 + 7)
    assert weighted_loss(means, LossConfig(kl=0, mlm=0, cos=0, clm=2)) == 14


def test_only_terms_with_a_weight_are_active_in_a_fixed_order():
    assert active_terms(LOSS) == ("kl", "mlm", "cos", "mse", "relation")
    assert active_terms(LossConfig(kl=0, mlm=1, cos=1, mse=0)) == ("mlm", "cos")
    assert active_terms(LossConfig(kl=0, mlm=0, cos=0, mse=0)) == ()
    assert active_terms(LossConfig(kl=1, mlm=0, cos=0, clm=1)) == ("kl", "clm")


def test_a_term_without_weight_has_a_coefficient_of_0():
    assert coefficients(LossConfig(mse=0), COUNTS, world_size=5).mse == 0


def test_relations_are_divided_by_every_token():
    assert divisors(LossConfig(relation=1, kl_positions="masked"), COUNTS)["relation"] == COUNTS.attended


def test_every_weight_of_the_loss_section_is_a_term():
    weights = {field.name for field in dataclasses.fields(LossConfig) if isinstance(field.default, float)}
    assert weights - {"temperature", "kl_until"} == set(TERMS)


@pytest.mark.parametrize(("until", "steps", "last"), [(0.55, 100, 55), (0.07, 100_000, 7000), (0.5, 5, 3), (1.0, 9, 9)])
def test_kl_is_learnt_for_its_share_of_the_steps(until, steps, last):
    loss = dataclasses.replace(LOSS, kl_until=until)
    with_kl = [step for step in range(steps) if loss.at(step, steps).kl]
    assert with_kl == list(range(last))
    assert loss.at(steps - 1, steps).mlm == loss.mlm
