"""LAMB on ZeRO's shards against the plain algorithm on whole matrices."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor

from distilcb.engine.checkpoint import Checkpoints

pytestmark = pytest.mark.launch

LR, BETAS, EPS, DECAY, STEPS = 1e-2, (0.9, 0.98), 1e-6, 0.05, 3


def lamb_config(*, micro_batch: int = 4) -> Any:
    config = tiny.tiny_config(micro_batch=micro_batch)
    settings = {"name": "lamb", "lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "warmup": 0}
    return replace(config, optim=replace(config.optim, schedule="constant", **settings))


def trace(folder: Path | None = None) -> dict[str, Any]:
    """Runs on every rank: weights before, gradients of each step, weights after each step."""
    run = tiny.start(lamb_config())
    weights = dict(run.engine.module.student.named_parameters())
    found: dict[str, Any] = {"gradients": [], "weights": [whole(weights)]}
    take_step = run.engine.step

    def look_then_step() -> None:
        boundary = run.engine.is_gradient_accumulation_boundary()
        if boundary:
            found["gradients"].append({name: safe_get_full_grad(each).clone() for name, each in weights.items()})
        take_step()
        if boundary:
            found["weights"].append(whole(weights))

    run.engine.step = look_then_step
    run.take(0, STEPS - 1)
    if folder:
        checkpoints = Checkpoints(folder, keep=1)
        path = checkpoints.save(run.engine, step=STEPS - 1, world_size=run.stepper.cut.world_size, state={})
        found["saved"] = str(path)
    run.take(STEPS - 1, STEPS)
    found["shard"] = sum(p.numel() for group in run.engine.optimizer.optimizer.param_groups for p in group["params"])
    return found


def resumed(folder: Path, *, other_ranks: bool = False) -> dict[str, Tensor]:
    """Runs on every rank: the weights after the last step, which is taken from the checkpoint on."""
    checkpoints = Checkpoints(folder, keep=1)
    newest = checkpoints.newest()
    run = tiny.start(lamb_config(), load_universal=other_ranks)
    checkpoints.load(run.engine, newest, world_size=run.stepper.cut.world_size)
    run.take(STEPS - 1, STEPS)
    return whole(dict(run.engine.module.student.named_parameters()))


def whole(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: safe_get_full_fp32_param(each).clone() for name, each in weights.items()}


@pytest.fixture(scope="module")
def traces(run_on_ranks, tmp_path_factory) -> dict[int, list[dict[str, Any]]]:
    """What each rank of one and of two saw."""
    folder = tmp_path_factory.mktemp("lamb")
    found = {
        ranks: [rank.result for rank in run_on_ranks(trace, ranks, folder=folder / str(ranks))] for ranks in (1, 2)
    }
    found[0] = [rank.result for rank in run_on_ranks(resumed, 2, folder=folder / "2")]
    (found[-1],) = [[rank.result] for rank in run_on_ranks(resumed, 1, folder=folder / "2", other_ranks=True)]
    return found


def by_the_paper(weights: dict[str, Tensor], gradients: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Algorithm 2 in float64, each tensor by itself; vectors neither decay nor are scaled."""
    now = {name: each.double() for name, each in weights.items()}
    m = {name: torch.zeros_like(each) for name, each in now.items()}
    v = {name: torch.zeros_like(each) for name, each in now.items()}
    after = []
    for step, gradient in enumerate(gradients, start=1):
        for name, g in gradient.items():
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g.double()
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g.double() ** 2
            r = (m[name] / (1 - BETAS[0] ** step)) / ((v[name] / (1 - BETAS[1] ** step)).sqrt() + EPS)
            if g.dim() > 1:
                r = r + DECAY * now[name]
                r = r * now[name].norm() / r.norm()
            now[name] = now[name] - LR * r
        after.append(dict(now))
    return after


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_follow_the_paper_on_any_number_of_ranks(traces, ranks):
    found = traces[ranks][0]
    wanted = by_the_paper(found["weights"][0], found["gradients"])
    for ours, theirs in zip(found["weights"][1:], wanted, strict=True):
        for name, weight in ours.items():
            torch.testing.assert_close(weight.double(), theirs[name], rtol=2e-5, atol=2e-6, msg=lambda m, n=name: n + m)


def test_two_ranks_hold_half_each_and_cut_through_a_matrix(traces):
    one, two = traces[1][0]["shard"], [rank["shard"] for rank in traces[2]]
    assert all(0.5 <= each / one < 0.51 for each in two)
    sizes = [each.numel() for each in traces[1][0]["weights"][0].values() if each.dim() > 1]
    borders = {sum(sizes[:count]) for count in range(len(sizes) + 1)}
    assert sum(sizes) // 2 not in borders


def test_a_step_is_as_long_as_the_matrix_times_the_rate(traces):
    before, after = traces[2][0]["weights"][:2]
    for name, weight in before.items():
        if weight.dim() > 1:
            assert (after[name] - weight).norm().item() == pytest.approx(LR * weight.norm().item(), rel=1e-4)


def test_a_resumed_run_takes_the_same_step_to_the_last_bit(traces):
    for ours, theirs in zip(traces[0], traces[2], strict=True):
        wanted = theirs["weights"][-1]
        assert all(torch.equal(weight, wanted[name]) for name, weight in ours.items())


def test_a_run_that_goes_on_on_one_rank_takes_the_same_step_to_rounding(traces):
    wanted = traces[2][0]["weights"][-1]
    for name, weight in traces[-1][0].items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-5, atol=1e-6)
