"""Real steps on random words: does it fit, and how long will it take?"""

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distilcb.command_line import CommandLine
from distilcb.config import Config, accumulation_steps
from distilcb.data.blocks import RandomBlocks
from distilcb.data.loader import training_batches
from distilcb.distributed import all_reduce_sum, barrier, on_main
from distilcb.durability import write_durably
from distilcb.losses.triplet import TERMS, active_terms, divisors
from distilcb.monitor.metrics import peak_memory_bytes
from distilcb.train.build import Place, take_place, wire_stepper
from distilcb.train.micro_batch import is_out_of_memory, refused_memory, settle_micro_batch
from distilcb.train.models import Models, build_models

# Micro-batches a rank in each step: one to warm up, then in turn short and long ones, whose difference tells what the
# micro-batches take and what the optimizer.
_WARM_UP, _SHORT, _LONG = 2, 2, 6
# Turns after which times are told though fp16's loss scale still overflows in each.
_MOST_SKIPPED = 32


def dry_run(command: CommandLine) -> dict[str, Any]:
    """Take a few short steps with the real stepper and engine; print and write what the run's steps cost.

    The report goes to <run_dir>.dry_run.json; the run folder itself is not touched.

    Raises:
        ConfigError: more than the GPU's memory holds.
    """
    report = measure_steps(command)
    path = command.run_dir.with_name(f"{command.run_dir.name}.dry_run.json")
    on_main(lambda: _tell(report, path))
    return report


def measure_steps(command: CommandLine, *, seconds: float = 0.0) -> dict[str, Any]:
    """What the run's steps cost, by short ones: a few, or as many as fill so many seconds.

    Raises:
        ConfigError: more than the GPU's memory holds.
    """
    config = command.config
    place = take_place(command, reads_only=True)
    models = build_models(config, place)
    config = settle_micro_batch(command, place, models, kept=None).config
    try:
        return _measure(config, place, models, seconds)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise refused_memory(config) from error


def _measure(config: Config, place: Place, models: Models, seconds: float) -> dict[str, Any]:
    words = RandomBlocks(models.tokenizer.vocabulary, seq_len=config.data.seq_len, blocks=640)
    engine, stepper, micro_batches, counts = wire_stepper(_shortened(config, place), place, models, words)
    batches = training_batches(micro_batches, first_step=0, last_step=sys.maxsize // 8, workers=0, pin_memory=False)

    def step_of(micros: int) -> tuple[float, list[float], bool]:
        """Seconds, sums, and whether the update was skipped."""
        stepper.cut = replace(stepper.cut, global_batch=config.optim.sequences_a_pass * place.world.size * micros)
        barrier()
        started = time.perf_counter()
        result = stepper.step(0, batches)  # the first one's rate and loss, however many are taken
        sums = all_reduce_sum(result.sums).tolist()  # reading them waits for the device
        return time.perf_counter() - started, sums, result.skipped

    _, sums, _ = step_of(_WARM_UP)
    by = divisors(config.loss, counts)
    accumulation = accumulation_steps(config.optim, place.world.size)
    turns = list(_turns(lambda: [step_of(micros) for micros in (_SHORT, _LONG)], place, seconds))
    short, long = (statistics.median(times) for times in zip(*turns, strict=True))
    seconds_per_step = _whole_step(short, long, accumulation)
    hours = seconds_per_step * config.train.steps / 3600
    return {
        "world_size": place.world.size,
        "device": torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else place.device.type,
        "precision": place.precision,
        "micro_batch": config.optim.sequences_a_pass,
        "accumulation": accumulation,
        "global_batch": config.optim.global_batch,
        "seq_len": config.data.seq_len,
        "steps": config.train.steps,
        "seconds_per_step": seconds_per_step,
        "tokens_per_second": config.optim.global_batch * config.data.seq_len / seconds_per_step,
        # of the steps: evaluations and checkpoints come on top
        "projected_hours": hours,
        "projected_device_hours": hours * place.world.size,
        "loss_at_start": {
            term: total / by[term] for term, total in zip(TERMS, sums, strict=True) if term in active_terms(config.loss)
        },
        "memory_bytes": _memory(models, engine, place),
    }


def _turns(
    turn: Callable[[], list[tuple[float, list[float], bool]]], place: Place, seconds: float
) -> Iterator[tuple[float, ...]]:
    """Times of the steps of each turn whose updates were made, of one and of more until a rank's seconds are over."""
    began, told = time.perf_counter(), 0
    for number in itertools.count(1):
        steps = turn()
        if not any(skipped for *_, skipped in steps) or number > _MOST_SKIPPED:
            told += 1
            yield tuple(time_ for time_, *_ in steps)
        has_time = torch.tensor([float(time.perf_counter() - began < seconds)], device=place.device)
        if told and all_reduce_sum(has_time).item() < place.world.size:
            return


def _whole_step(short: float, long: float, accumulation: int) -> float:
    """The time of a step of `accumulation` micro-batches, from those of short and of long steps."""
    micro = (long - short) / (_LONG - _SHORT) if long > short else short / _SHORT
    optimizer = max(0.0, short - _SHORT * micro)
    return optimizer + accumulation * micro


def _shortened(config: Config, place: Place) -> Config:
    """The same run with as many sequences a step as the first short one takes."""
    size = config.optim.sequences_a_pass * place.world.size * _WARM_UP
    return replace(config, optim=replace(config.optim, global_batch=size))


def _memory(models: Models, engine: Any, place: Place) -> dict[str, int]:
    """Bytes on this rank by part; activations and buffers are what is left of the peak."""
    parts = {
        "teacher": models.teacher.nbytes if models.teacher else 0,
        "student_weights": sum(p.nbytes for p in engine.module.parameters()),
        "optimizer_states": sum(
            value.nbytes
            for state in engine.optimizer.optimizer.state.values()
            for value in state.values()
            if hasattr(value, "nbytes")
        ),
        "master_weights": sum(p.nbytes for group in engine.optimizer.optimizer.param_groups for p in group["params"]),
    }
    peak = peak_memory_bytes(place.device)
    return parts | {"everything_else": max(0, peak - sum(parts.values())), "peak": peak}


def _tell(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(report, indent=2) + "\n")
    rows = [(name, value) for name, value in report.items() if not isinstance(value, dict)]
    for name in ("loss_at_start", "memory_bytes"):
        rows += [(f"{name}: {part}", value) for part, value in report[name].items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = f"{value / 2**20:,.1f} MiB" if name.startswith("memory") else _shown(value)
        print(f"{name.ljust(width)}  {shown:>14}")
    print(f"report: {path}", flush=True)


def _shown(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
