"""Students that take steps together take those that each would alone, to the last bit."""

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from distilcb.config import Config, LossConfig, StudentConfig
from distilcb.data.loader import training_batches
from distilcb.engine.stepper import step_together

pytestmark = pytest.mark.launch

STEPS = 3


def configs() -> dict[str, Config]:
    """Of three students: another depth, dropout, objective, rate and clipping each."""
    base = tiny.tiny_config()
    optim = base.optim
    return {
        "two layers": base,
        "one layer, dropout": replace(
            base, student=StudentConfig(num_layers=1, dropout=0.1), optim=replace(optim, lr=2e-3, betas=(0.9, 0.999))
        ),
        "three layers, masked": replace(
            base,
            student=StudentConfig(num_layers=3, dropout=0.2),
            loss=LossConfig(kl_positions="masked", temperature=3.0, mse=0.01),
            optim=replace(optim, clip=0.1, weight_decay=0.1),
        ),
    }


def figures(run: tiny.TinyRun, results: list[Any]) -> dict[str, Any]:
    """What a student's steps have left, on this rank."""
    weights = {name: value.clone() for name, value in run.engine.module.student.state_dict().items()}
    return {"sums": [result.sums for result in results], "norm": float(results[-1].grad_norm), "weights": weights}


def alone_and_together() -> dict[str, Any]:
    """Runs on every rank."""
    alone = {}
    for name, config in configs().items():
        run = tiny.start(config)
        alone[name] = figures(run, run.take(0, STEPS))
    runs = {name: tiny.start(config) for name, config in configs().items()}
    teacher = runs["two layers"].models.teacher
    for run in runs.values():
        run.stepper.teacher = teacher
    alive = watch(teacher)
    batches = training_batches(
        runs["two layers"].micro_batches, first_step=0, last_step=STEPS, workers=0, pin_memory=False
    )
    steppers = [run.stepper for run in runs.values()]
    taken = [step_together(steppers, step, batches) for step in range(STEPS)]
    together = {
        name: figures(run, [results[number] for results in taken]) for number, (name, run) in enumerate(runs.items())
    }
    return {"alone": alone, "together": together, "alive": alive}


def watch(teacher: Any) -> list[int]:
    """A list that gets, at each of the teacher's passes, how many of their hidden states are alive."""
    ask, seen, alive = teacher.hidden, [], []

    def hidden(input_ids: torch.Tensor) -> torch.Tensor:
        found = ask(input_ids)
        seen.append(StorageWeakRef(found.untyped_storage()))
        alive.append(sum(not each.expired() for each in seen))
        return found

    teacher.hidden = hidden
    return alive


@pytest.fixture(scope="module", params=[1, 2])
def taken(run_on_ranks, request) -> list[dict[str, Any]]:
    return [rank.result for rank in run_on_ranks(alone_and_together, request.param)]


@pytest.mark.parametrize("name", configs())
def test_sums_norm_and_weights_are_those_of_steps_alone(taken, name):
    for rank in taken:
        alone, together = rank["alone"][name], rank["together"][name]
        assert all(map(torch.equal, alone["sums"], together["sums"]))
        assert alone["norm"] == together["norm"]
        assert alone["weights"].keys() == together["weights"].keys()
        for weight, value in alone["weights"].items():
            assert torch.equal(value, together["weights"][weight]), weight


def test_students_differ_from_each_other(taken):
    sums = [figures["sums"][-1] for figures in taken[0]["together"].values()]
    assert not torch.equal(sums[0], sums[1])
    assert not torch.equal(sums[1], sums[2])


def test_the_teacher_runs_once_a_micro_batch_and_one_lesson_lives_at_a_time(taken):
    for rank in taken:
        assert rank["alive"] == [1] * (STEPS * 16 // (4 * len(taken)))
