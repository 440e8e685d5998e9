"""fp16 with DeepSpeed's real loss scaler, on a CPU: torch computes in fp16 there, and only DeepSpeed refuses to.

What a CPU cannot show (kernels, speed, NCCL) is in tests/gpu.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import tiny

from distilcb.engine.checkpoint import Checkpoints
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.errors import TrainingError

pytestmark = pytest.mark.launch

STEPS = 8


def allow_fp16_on_this_cpu() -> None:
    """Answer for DeepSpeed's CPU accelerator what it would say of a GPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = type(get_accelerator())
    accelerator.is_fp16_supported = lambda _self: True
    accelerator.supported_dtypes = lambda _self: list(DTYPES.values())


def start(folder: Path, **fp16: Any) -> tiny.TinyRun:
    """A tiny run under ds_configs/zero2_fp16.json with changed settings of the scaler."""
    allow_fp16_on_this_cpu()
    settings = json.loads((tiny.deepspeed_config.DS_CONFIGS / "zero2_fp16.json").read_text())
    settings["fp16"] |= fp16
    file = folder / f"fp16_{os.getpid()}.json"
    file.write_text(json.dumps(settings))
    return tiny.start(tiny.tiny_config(deepspeed=str(file), steps=STEPS))


def spoil_gradients(run: tiny.TinyRun, value: float) -> Any:
    """Make one weight's gradient `value` times what it is; remove() ends it."""
    return run.models.student.lm_head.dense.weight.register_hook(lambda gradient: gradient * value)


def compare_precisions(folder: Path) -> dict[str, list[tuple[list[float], float]]]:
    """Runs on every rank: sums of the loss terms and gradient norm of each step, in fp16 and in fp32."""
    runs = {"fp16": start(folder), "fp32": tiny.start(tiny.tiny_config(steps=STEPS))}
    return {
        name: [(result.sums.tolist(), float(result.grad_norm)) for result in run.take(0, STEPS)]
        for name, run in runs.items()
    }


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_in_fp16_follows_the_one_in_fp32(run_on_ranks, tmp_path, ranks):
    for rank in run_on_ranks(compare_precisions, ranks, folder=tmp_path):
        for (half, half_norm), (full, full_norm) in zip(rank.result["fp16"], rank.result["fp32"], strict=True):
            assert half == pytest.approx(full, rel=2e-2)
            assert half_norm == pytest.approx(full_norm, rel=2e-2)


def overflow_and_resume(folder: Path) -> dict[str, Any]:
    """Runs on every rank: one good step, two that overflow, a checkpoint, and one good step; then again from it."""
    run = start(folder, hysteresis=1)
    scales, skipped = [run.engine.optimizer.cur_scale], []

    def take(step: int) -> None:
        (result,) = run.take(step, step + 1)
        scales.append(run.engine.optimizer.cur_scale)
        skipped.append(result.skipped)

    take(0)
    weight = run.engine.module.student.lm_head.dense.weight
    before = weight.clone()
    spoiled = spoil_gradients(run, math.inf)
    take(1)
    take(2)
    spoiled.remove()
    untouched = bool((weight == before).all())
    checkpoints = Checkpoints(folder / "checkpoints", keep=1)
    checkpoints.save(run.engine, step=3, world_size=1, state={})
    take(3)
    moved = not bool((weight == before).all())
    again = start(folder, hysteresis=1)
    newest = checkpoints.newest()
    assert newest is not None
    checkpoints.load(again.engine, newest, world_size=1)
    resumed = [again.engine.optimizer.cur_scale, again.engine.skipped_steps]
    again.take(3, 4)
    same = bool((again.engine.module.student.lm_head.dense.weight == weight).all())
    return {"scales": scales, "skipped": skipped, "untouched": untouched, "moved": moved} | {
        "resumed": resumed,
        "same": same,
    }


@pytest.fixture(scope="module")
def overflow(run_on_ranks, tmp_path_factory) -> dict[str, Any]:
    (rank,) = run_on_ranks(overflow_and_resume, 1, folder=tmp_path_factory.mktemp("overflow"))
    return rank.result


def test_an_overflow_halves_the_scale_and_skips_the_step(overflow):
    assert overflow["scales"] == [2**16, 2**16, 2**15, 2**14, 2**14]
    assert overflow["skipped"] == [False, True, True, False]


def test_a_skipped_step_leaves_the_weights_and_the_next_moves_them(overflow):
    assert overflow["untouched"]
    assert overflow["moved"]


def test_a_resumed_run_has_the_scale_that_was_saved(overflow):
    assert overflow["resumed"] == [2**14, 2]
    assert overflow["same"]


def end_of(run: tiny.TinyRun) -> str:
    """What stops a run."""
    try:
        run.take(0, STEPS)
    except TrainingError as error:
        return str(error)
    return "nothing was said"


def overflow_forever(folder: Path) -> str:
    """Runs on every rank: every gradient overflows until the scale cannot be lowered."""
    run = start(folder, hysteresis=1, initial_scale_power=2)
    spoil_gradients(run, math.inf)
    return end_of(run)


def test_overflows_that_no_scale_mends_stop_the_run(run_on_ranks, tmp_path):
    (rank,) = run_on_ranks(overflow_forever, 1, folder=tmp_path)
    assert rank.result == "step 3: fp16 overflows at the smallest loss scale. Lower optim.lr, or use bf16."


def be_taught_nonsense(folder: Path) -> str:
    """Runs on every rank: a teacher with a weight that is not a number."""
    run = start(folder)
    assert run.models.teacher is not None
    run.models.teacher.model.lm_head.layer_norm.bias.data[0] = math.nan
    return end_of(run)


def test_a_loss_that_is_nan_is_not_taken_for_an_overflow(run_on_ranks, tmp_path):
    (rank,) = run_on_ranks(be_taught_nonsense, 1, folder=tmp_path)
    assert rank.result.startswith("step 1: loss term kl is not finite on rank 0.")
