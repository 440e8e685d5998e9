"""A run that goes on, on another number of ranks than saved it."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from distilcb import distributed
from distilcb.engine.checkpoint import Checkpoints

pytestmark = pytest.mark.launch

SAVED_AT, STEPS = 3, 7


def figures(run: tiny.TinyRun, first: int, last: int) -> list[tuple[list[float], float]]:
    """Sums of the loss terms over all ranks, and gradient norm, of each step."""
    return [
        (distributed.all_reduce_sum(result.sums).tolist(), float(result.grad_norm)) for result in run.take(first, last)
    ]


def save_and_go_on(folder: Path, deepspeed: str) -> dict[str, Any]:
    """Runs on every rank: some steps, a checkpoint, and the steps after it."""
    run = tiny.start(tiny.tiny_config(deepspeed=deepspeed, steps=STEPS))
    run.take(0, SAVED_AT)
    world_size = distributed.discover().size
    Checkpoints(folder, keep=1).save(run.engine, step=SAVED_AT, world_size=world_size, state={"seconds": 1.5})
    return {"figures": figures(run, SAVED_AT, STEPS), "weights": weights(run)}


def go_on(folder: Path, deepspeed: str) -> dict[str, Any]:
    """Runs on every rank: the steps after the checkpoint."""
    run = tiny.start(tiny.tiny_config(deepspeed=deepspeed, steps=STEPS), load_universal=True)
    checkpoints = Checkpoints(folder, keep=1)
    found = distributed.on_main(checkpoints.newest)
    state = checkpoints.load(run.engine, found, world_size=distributed.discover().size)
    return {"figures": figures(run, SAVED_AT, STEPS), "weights": weights(run), "seconds": state["seconds"]}


def weights(run: tiny.TinyRun) -> dict[str, torch.Tensor]:
    return {name: value.detach().float().clone() for name, value in run.engine.module.named_parameters()}


@pytest.fixture(scope="module")
def saved(run_on_ranks, tmp_path_factory):
    """Saves on a number of ranks, once each; gives the folder and what followed there."""
    kept: dict[Any, tuple[Path, Any]] = {}

    def on(ranks: int, deepspeed: str) -> tuple[Path, Any]:
        if (ranks, deepspeed) not in kept:
            folder = tmp_path_factory.mktemp(f"saved_on_{ranks}")
            results = run_on_ranks(save_and_go_on, ranks, folder=folder, deepspeed=deepspeed)
            kept[ranks, deepspeed] = folder, results[0].result
        return kept[ranks, deepspeed]

    return on


@pytest.mark.parametrize(
    ("before", "after", "deepspeed", "tolerance"),
    [
        (2, 1, "zero2_cpu", 1e-5),
        (2, 4, "zero2_cpu", 1e-5),
        (1, 2, "zero2_cpu", 1e-5),
        (2, 1, "zero2_bf16", 2e-2),
    ],
)
def test_losses_and_weights_are_those_of_the_run_that_stayed(saved, run_on_ranks, before, after, deepspeed, tolerance):
    folder, stayed = saved(before, deepspeed)
    for rank in run_on_ranks(go_on, after, folder=folder, deepspeed=deepspeed):
        moved = rank.result
        assert moved["seconds"] == 1.5
        for (sums, norm), (expected, expected_norm) in zip(moved["figures"], stayed["figures"], strict=True):
            assert sums == pytest.approx(expected, rel=tolerance)
            assert norm == pytest.approx(expected_norm, rel=tolerance)
        for name, value in stayed["weights"].items():
            assert torch.allclose(moved["weights"][name], value, rtol=tolerance, atol=tolerance * 10), name
    assert [path.name for path in folder.iterdir() if "universal" in path.name] == []
