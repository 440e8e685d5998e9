"""launch/plan.py: its options, and the table that it prints."""

import argparse
import json
import logging
from dataclasses import replace
from typing import Any

from distilcb.command_line import CommandLine, Parser, new_file, number, parse_command_line
from distilcb.config import MOST_TOKENS, Config, accumulation_steps, even_sizes
from distilcb.durability import write_durably
from distilcb.engine import deepspeed_config
from distilcb.errors import ConfigError, writing
from distilcb.gpus import GPUS
from distilcb.plan.prediction import (
    RESERVED,
    Machine,
    checkpoint_bytes,
    flop_per_token,
    largest_micro_batch,
    memory,
    room,
    step,
)
from distilcb.plan.sizes import Sizes, sizes_of

log = logging.getLogger(__name__)

_OF_AUTO = f"the most that fits of up to {MOST_TOKENS['cuda']:,} tokens, beyond which a GPU gets no faster"
_WIDTHS = {"fp16": 2, "bf16": 2, "fp32": 4}


def plan_from(words: list[str], *, description: str | None) -> None:
    """Print the plan that the words of the command line ask for.

    Raises:
        UserError: options that do not go together, or models that cannot be read.
    """
    parser = _parser(description)
    options, settings = parser.parse_known_args(words)
    command = parse_command_line([*settings, "--dry_run"])  # which asks for no text
    plan = make_plan(command, options)
    print(_as_text(plan))
    if options.json:
        with writing(options.json, ConfigError, "Name another file."):
            write_durably(options.json, json.dumps(plan, indent=2) + "\n")
        print(f"the same as data: {options.json}")


def make_plan(command: CommandLine, options: argparse.Namespace) -> dict[str, Any]:
    """The whole plan as plain data. Bytes, seconds, FLOP."""
    config, gpu = command.config, GPUS[options.gpu.upper()]
    if config.optim.global_batch % options.gpus:
        raise ConfigError(
            f"optim.global_batch={config.optim.global_batch} is not a multiple of --gpus {options.gpus}: ranks must "
            "have the same number of sequences."
        )
    settings = _settings(config)
    precision = deepspeed_config.precision(settings)
    width, sizes = _WIDTHS[precision], sizes_of(config)
    machine = _machine(options, settings, width=width)
    most = _largest_micro_batch(config, sizes, machine, width=width)
    tried = even_sizes(config, machine.gpus, device_type="cuda")
    micro_batch = max(size for size in tried if size <= most)
    if config.optim.micro_batch != "auto":
        micro_batch = config.optim.micro_batch
    accumulation = accumulation_steps(replace(config.optim, micro_batch=micro_batch), machine.gpus)
    rate, measured_on = _measured_rate(command, options.calibrate) if options.calibrate else (None, "")
    # What was measured are first steps, and loss.kl_until makes the last ones cheaper.
    first = replace(config, loss=replace(config.loss, kl_until=1.0))
    over_all_steps = rate and rate * flop_per_token(first, sizes) / flop_per_token(config, sizes)
    parts = memory(config, sizes, machine, micro_batch=micro_batch, width=width)
    one = step(config, sizes, machine, micro_batch=micro_batch, width=width, token_rate=over_all_steps)
    hours = one.seconds * config.train.steps / 3600
    disk = checkpoint_bytes(sizes, width=width)
    return {
        "teacher_parameters": sizes.teacher.parameters if sizes.teacher else 0,
        "student_parameters": sizes.student.parameters,
        "precision": precision,
        "flop_per_token": flop_per_token(config, sizes),
        "micro_batch": micro_batch,
        "largest_micro_batch": most,
        "accumulation": accumulation,
        "memory_bytes": parts.parts | {"total": parts.total, "of a device": machine.memory},
        "fits": parts.total <= room(machine),
        "step_seconds": one.seconds,
        "communication_seconds": one.communication,
        "communication_share": (one.seconds - one.computing) / one.seconds,
        "tokens_per_second": one.tokens / one.seconds,
        "steps": config.train.steps,
        "hours": hours,
        "device_hours": hours * machine.gpus,
        "checkpoint_bytes": disk,
        # One more while the next is saved, and the exported student in fp32.
        "disk_bytes": disk * (config.train.keep_checkpoints + 1) + 4.0 * sizes.student.parameters,
        "assumptions": _assumptions(machine, gpu.name, width=width, rate=rate, measured_on=measured_on)
        | ({"micro_batch auto": _OF_AUTO} if config.optim.micro_batch == "auto" else {}),
    }


def _machine(options: argparse.Namespace, settings: dict[str, Any], *, width: int) -> Machine:
    """What the options say of it. settings: of the DeepSpeed file."""
    gpu = GPUS[options.gpu.upper()]
    return Machine(
        gpus=options.gpus,
        gpus_per_node=min(options.gpus, options.gpus_per_node),
        memory=options.memory_gb * 1e9 if options.memory_gb else gpu.memory,
        flops=gpu.flops if width == 2 else gpu.fp32_flops,
        efficiency=options.efficiency,
        link=gpu.link,
        node_link=options.node_gb * 1e9,
        buckets=deepspeed_config.bucket_numbers(settings),
    )


def _largest_micro_batch(config: Config, sizes: Sizes, machine: Machine, *, width: int) -> int:
    """The largest that fits; raises ConfigError where not one sequence does."""
    most = largest_micro_batch(config, sizes, machine, width=width)
    if not most:
        needed = memory(config, sizes, machine, micro_batch=1, width=width).total
        raise ConfigError(
            f"one sequence of {config.data.seq_len} tokens needs {needed / 1e9:.1f} GB on each device, which has "
            f"{machine.memory / 1e9:.0f} GB, {RESERVED:.0%} of them kept free. Take a smaller data.seq_len, more GPUs, "
            "or --train.activation_checkpointing true."
        )
    return most


def _assumptions(machine: Machine, name: str, *, width: int, rate: float | None, measured_on: str) -> dict[str, str]:
    """What the plan goes by, in words. rate: tokens/s of a device as measured, or None."""
    peak = "the half-precision peak" if width == 2 else "the peak in fp32"
    return {
        "gpus": f"{machine.gpus} x {name}, {machine.gpus_per_node} a node",
        "rate of one device": (
            f"{rate:,.0f} tokens/s, measured here on {measured_on}"
            if rate
            else f"{machine.efficiency:.0%} of {machine.flops / 1e12:,.0f} TFLOP/s, {peak}"
        ),
        "memory kept free": f"{RESERVED:.0%} of a device's",
        "time": "steps alone; evaluations and checkpoints come on top",
        "link inside a node": f"{machine.link / 1e9:,.0f} GB/s a device and direction",
        "link between nodes": f"{machine.node_link / 1e9:,.0f} GB/s a node and direction",
        "gradients": "all-reduced in every micro-batch, as DeepSpeed's buckets are, beside the backward pass; what is "
        "longer shows",
    }


def _measured_rate(command: CommandLine, seconds: float) -> tuple[float, str]:
    """Tokens/s of one device in real steps on this machine for so long, and what the device is."""
    from distilcb.train.dry_run import measure_steps

    report = measure_steps(command, seconds=seconds)
    device = str(report["device"])
    if device == "cpu":
        log.warning("measured on a CPU: the hours below are those of so many CPUs like this one")
    return float(report["tokens_per_second"]) / int(report["world_size"]), device


def _settings(config: Config) -> dict[str, Any]:
    """Those of the DeepSpeed file that the run would use on a GPU."""
    path, _ = deepspeed_config.choose_file(config.deepspeed, cuda=True, cpu_has_bf16=True)
    return deepspeed_config.read_file(path)


def _parser(description: str | None) -> Parser:
    parser = Parser(
        description=description,
        allow_abbrev=False,
        epilog="Every setting of a recipe can be given as well: launch/train.py --help lists them.",
    )
    parser.add_argument("--gpus", type=number(1, 100_000), required=True, help="devices in all")
    names = sorted(name.lower() for name in GPUS)
    parser.add_argument("--gpu", choices=names, required=True, type=str.lower, help="what kind of device")
    parser.add_argument("--gpus_per_node", type=number(1, 64), default=4, help="devices a node (default: 4)")
    parser.add_argument(
        "--memory_gb", type=number(1, 10_000, kind=float), help="of a device (default: its data sheet's)"
    )
    parser.add_argument(
        "--efficiency",
        type=number(0.01, 1, kind=float),
        default=0.35,
        help="share of the peak that a step reaches (default: 0.35, an assumption: measure with --calibrate)",
    )
    parser.add_argument(
        "--node_gb",
        type=number(0.01, 10_000, kind=float),
        default=25.0,
        help="GB/s between nodes, of one node in one direction (default: 25, one link of 200 Gbit/s)",
    )
    parser.add_argument(
        "--calibrate",
        type=number(0.1, 3600, kind=float),
        nargs="?",
        const=30.0,
        metavar="SECONDS",
        help="take real steps here for so long (default: 30), and go by their rate",
    )
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the plan there")
    return parser


def _as_text(plan: dict[str, Any]) -> str:
    disk = {name: f"{plan[name] / 1e9:,.2f} GB" for name in ("checkpoint_bytes", "disk_bytes")}
    gb = {f"memory: {part}": f"{size / 1e9:,.2f} GB" for part, size in plan["memory_bytes"].items()}
    rows = {
        "teacher": f"{plan['teacher_parameters'] / 1e6:,.1f} M parameters",
        "student": f"{plan['student_parameters'] / 1e6:,.1f} M parameters",
        "work": f"{plan['flop_per_token'] / 1e6:,.0f} MFLOP a token, {plan['precision']}",
        "micro-batch": f"{plan['micro_batch']} sequences, {plan['accumulation']} a step"
        + ("" if plan["fits"] else f": DOES NOT FIT, {plan['largest_micro_batch']} does"),
        "largest micro-batch": str(plan["largest_micro_batch"]),
        **gb,
        "step": f"{plan['step_seconds']:,.2f} s, {plan['tokens_per_second']:,.0f} tokens/s in all",
        "communication": f"{plan['communication_seconds']:,.3f} s; steps wait {plan['communication_share']:.0%} for it",
        "run": f"{plan['steps']:,} steps, {plan['hours']:,.1f} hours, {plan['device_hours']:,.0f} GPU-hours",
        "checkpoint": f"{disk['checkpoint_bytes']}; the run folder up to {disk['disk_bytes']}",
        **{f"assumed: {name}": text for name, text in plan["assumptions"].items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows.items())
