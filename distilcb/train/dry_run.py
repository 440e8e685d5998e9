"""A few real steps on random words: does it fit, and how long will it take?"""

import json
import time
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
from distilcb.errors import ConfigError
from distilcb.losses.triplet import TERMS, active_terms, divisors
from distilcb.monitor.metrics import peak_memory_bytes
from distilcb.train.build import Place, take_place, wire_stepper
from distilcb.train.micro_batch import settle_micro_batch
from distilcb.train.models import Models, build_models

# Micro-batches a rank in each step: one to warm up, then two of different length, whose difference tells what the
# micro-batches take and what the optimizer.
_ACCUMULATIONS = (2, 2, 6)


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


def measure_steps(command: CommandLine) -> dict[str, Any]:
    """What the run's steps cost, by a few short ones; ConfigError where they are more than the GPU's memory holds."""
    config = command.config
    place = take_place(command, reads_only=True)
    models = build_models(config, place)
    config = settle_micro_batch(command, place, models, kept=None).config
    try:
        return _measure(config, place, models)
    except torch.cuda.OutOfMemoryError as error:
        size = config.optim.sequences_a_pass
        less = f"--optim.micro_batch {size // 2}" if size > 1 else "a smaller data.seq_len, or a larger GPU"
        raise ConfigError(
            f"optim.micro_batch={size} sequences of {config.data.seq_len} tokens: the GPU's memory does not hold them, "
            f"or somebody else uses it. Try {less}."
        ) from error


def _measure(config: Config, place: Place, models: Models) -> dict[str, Any]:
    words = RandomBlocks(models.tokenizer.vocabulary, seq_len=config.data.seq_len, blocks=sum(_ACCUMULATIONS) * 64)
    engine, stepper, micro_batches, counts = wire_stepper(_shortened(config, place), place, models, words)
    batches = training_batches(micro_batches, first_step=0, last_step=sum(_ACCUMULATIONS), workers=0, pin_memory=False)
    seconds, sums = [], []
    for step, micros in enumerate(_ACCUMULATIONS):
        stepper.cut = replace(stepper.cut, global_batch=config.optim.sequences_a_pass * place.world.size * micros)
        barrier()
        started = time.perf_counter()
        sums.append(all_reduce_sum(stepper.step(step, batches).sums).tolist())  # reading them waits for the device
        seconds.append(time.perf_counter() - started)
    by = divisors(config.loss, counts)
    accumulation = accumulation_steps(config.optim, place.world.size)
    seconds_per_step = _whole_step(seconds, accumulation)
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
            term: total / by[term]
            for term, total in zip(TERMS, sums[0], strict=True)
            if term in active_terms(config.loss)
        },
        "memory_bytes": _memory(models, engine, place),
    }


def _whole_step(seconds: list[float], accumulation: int) -> float:
    """The time of a step of `accumulation` micro-batches, from those of the short steps."""
    _warm_up, few, many = seconds
    more = _ACCUMULATIONS[2] - _ACCUMULATIONS[1]
    micro = (many - few) / more if many > few else few / _ACCUMULATIONS[1]
    optimizer = max(0.0, few - _ACCUMULATIONS[1] * micro)
    return optimizer + accumulation * micro


def _shortened(config: Config, place: Place) -> Config:
    """The same run with as many sequences a step as the first short one takes."""
    size = config.optim.sequences_a_pass * place.world.size * _ACCUMULATIONS[0]
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
