"""The learning rate by hand, and which weights decay."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distilcb.config import OptimConfig
from distilcb.engine.optimizer import build_optimizer, learning_rate, parameter_groups, warmup_steps
from distilcb.errors import LaunchError

SCHEDULES = ("linear", "cosine", "constant")


def rates(*, steps, lr=1.0, **settings):
    return [learning_rate(OptimConfig(lr=lr, **settings), step=step, steps=steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("warmup", "steps", "rising"),
    [(0, 100, 0), (0.05, 100, 5), (0.1, 25, 2), (0.999, 1000, 999), (1, 100, 1), (30, 100, 30), (500, 100, 500)],
)
def test_warmup_is_a_share_below_1_and_a_number_of_steps_from_1_on(warmup, steps, rising):
    assert warmup_steps(OptimConfig(warmup=warmup), steps) == rising


def test_the_rate_rises_in_equal_steps_and_reaches_its_peak_on_the_last_of_them():
    assert rates(steps=100, lr=8e-4, warmup=4)[:5] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 8e-4])


def test_linear_falls_in_equal_steps_to_one_step_above_0():
    assert rates(steps=10, warmup=0.2, schedule="linear") == pytest.approx(
        [1 / 2, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    )


def test_cosine_falls_along_half_a_wave():
    half, quarter = 1 / 2, math.sqrt(2) / 4
    assert rates(steps=6, warmup=2, schedule="cosine") == pytest.approx(
        [half, 1, 1, half + quarter, half, half - quarter]
    )


def test_constant_stays_at_its_peak():
    assert rates(steps=5, warmup=2, schedule="constant") == pytest.approx([0.5, 1, 1, 1, 1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.05, 0.5, 1, 7])
def test_a_rate_is_never_0_nor_above_its_peak_and_falls_only_after_the_peak(schedule, warmup):
    steps = 60
    found = rates(steps=steps, lr=3e-4, warmup=warmup, schedule=schedule)
    assert min(found) > 0
    assert max(found) == pytest.approx(3e-4)
    peak = max(1, warmup_steps(OptimConfig(warmup=warmup), steps)) - 1
    assert found[peak] == pytest.approx(3e-4)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
    if schedule != "constant":
        assert found[-1] < 0.06 * 3e-4


def test_the_rate_ends_at_0():
    for schedule in ("linear", "cosine"):
        assert learning_rate(OptimConfig(schedule=schedule), step=40, steps=40) == pytest.approx(0, abs=1e-18)


def test_a_warmup_longer_than_the_run_only_rises():
    assert rates(steps=3, warmup=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_of_one_step_learns_at_its_peak(schedule):
    assert rates(steps=1, warmup=0.05, schedule=schedule) == [1.0]


class Encoder(nn.Module):
    """The kinds of weights that an encoder with a tied head has; its positions are frozen."""

    def __init__(self):
        super().__init__()
        self.words, self.positions = nn.Embedding(11, 4), nn.Embedding(5, 4)
        self.dense, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.decoder = nn.Linear(4, 11)
        self.decoder.weight = self.words.weight
        self.positions.weight.requires_grad_(False)


def names_by_decay(model, weight_decay):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay)
    return {group["weight_decay"]: [names[id(parameter)] for parameter in group["params"]] for group in groups}


def test_matrices_decay_and_biases_and_layer_norms_do_not():
    assert names_by_decay(Encoder(), 0.01) == {
        0.01: ["words.weight", "dense.weight"],
        0.0: ["dense.bias", "norm.weight", "norm.bias", "decoder.bias"],
    }


def test_every_trained_weight_is_in_one_group_once_and_no_frozen_one_in_any():
    model = Encoder()
    grouped = [id(parameter) for group in parameter_groups(model, 0.1) for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert id(model.positions.weight) not in grouped


@pytest.fixture
def no_compiler(monkeypatch):
    """DeepSpeed's fused Adam cannot be built."""

    def fail(*_, **__):
        raise RuntimeError("ninja is missing\nand much more")

    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", SimpleNamespace(FusedAdam=fail))


def test_without_a_compiler_the_fused_adam_is_refused_with_what_is_needed(no_compiler):
    with pytest.raises(LaunchError, match=r"\(ninja is missing\).*C\+\+ compiler.*--optim\.name adamw_torch\.$"):
        build_optimizer(Encoder(), OptimConfig())


def test_torchs_adamw_is_there_for_the_asking_and_needs_no_compiler(no_compiler):
    optim = OptimConfig(name="adamw_torch", lr=1e-3, betas=(0.8, 0.9), eps=1e-7, weight_decay=0.1)
    optimizer = build_optimizer(Encoder(), optim)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (1e-3, (0.8, 0.9), 1e-7)


def test_a_step_without_gradient_shrinks_matrices_only(no_compiler):
    model = Encoder()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, OptimConfig(name="adamw_torch", lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {"words.weight", "dense.weight"}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.1 * 0.5 if name in shrunk else 1))
