"""What a checkpoint of DistilCamemBERT's real size costs: seconds and bytes a save, and the share of training lost.

python benchmarks/checkpoint_cost.py --folder DIR [--saves 5] [--report docs/results/checkpoint_cost.md]

The student has camembert-base's sizes in 6 layers and random weights, its optimizer's states are DeepSpeed's own, in
fp32. Each save is the one that training makes (written, hashed, fsynced, renamed), beside the same number of bytes
written to the same folder and fsynced by one plain loop, in turn. Under `deepspeed --num_gpus N` ranks share the work.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from distilcb import distributed
from distilcb.command_line import new_file, parse_command_line
from distilcb.config import REPOSITORY
from distilcb.durability import write_durably
from distilcb.engine.checkpoint import Checkpoints
from distilcb.engine.step_module import StepModule
from distilcb.models.families import family_of
from distilcb.train.build import start_engine, take_place

# Sizes of almanach/camembert-base's config.json, with half of its layers.
SIZES = {"vocab_size": 32005, "hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12}
SIZES |= {"intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1}
MINUTES_BETWEEN_SAVES = 10


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where to write, such as the scratch of your runs")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--deepspeed", default="zero2_cpu", help="a file of ds_configs/ (default: zero2_cpu, fp32)")
    parser.add_argument("--report", type=new_file, help="Markdown file to write")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    folder = options.folder.absolute() / "checkpoint_cost"
    recipe = ["--recipe", str(REPOSITORY / "recipes" / "distilcamembert.yaml"), "--run_dir", str(folder)]
    command = parse_command_line([*recipe, "--data.train", "none", "--deepspeed", options.deepspeed])
    place = take_place(command)
    student = _student()
    parameters = sum(parameter.numel() for parameter in student.parameters())
    module = StepModule(student, family_of(student.config, where="the student"), command.config.loss)
    engine = start_engine(module, command.config, place)
    _take_step(engine)
    checkpoints = Checkpoints(folder, keep=2)
    saves, writes, size = [], [], 0
    try:
        for number in range(1, options.saves + 1):
            distributed.barrier()
            started = time.perf_counter()
            path = checkpoints.save(engine, step=number, world_size=place.world.size, state={"number": number})
            saves.append(time.perf_counter() - started)
            if place.world.is_main:
                size = sum(each.stat().st_size for each in path.iterdir())
                writes.append(_plain_write(folder / "plain", size))
            distributed.barrier()
        if place.world.is_main:
            text = _report(options, parameters, size, saves, writes, place.world.size)
            print(text)
            if options.report:
                write_durably(options.report, text)
    finally:
        distributed.barrier()
        if place.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    distributed.stop()


def _student() -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForMaskedLM

    torch.manual_seed(0)
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("camembert", **SIZES), dtype=torch.float32)


def _take_step(engine: Any) -> None:
    """The first step makes the optimizer's moments; zero gradients will do."""
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(sum(parameter.sum() for parameter in engine.module.parameters()) * 0.0)
    engine.step()


def _plain_write(path: Path, size: int) -> float:
    """Seconds for one process to write and fsync random bytes."""
    piece = os.urandom(1 << 24)
    started = time.perf_counter()
    with path.open("wb") as stream:
        for start in range(0, size, len(piece)):
            stream.write(piece[: size - start])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def _report(
    options: argparse.Namespace, parameters: int, size: int, saves: list[float], writes: list[float], ranks: int
) -> str:
    save, write = statistics.median(saves), statistics.median(writes)
    share = save / (save + MINUTES_BETWEEN_SAVES * 60)
    shown = " ".join(f"{seconds:.1f}" for seconds in saves)
    return "\n".join(
        [
            "# What a checkpoint costs",
            "",
            f"{parameters:,} parameters (camembert-base in 6 layers), {options.deepspeed}, {ranks} rank(s):",
            "",
            f"| | median of {len(saves)} |",
            "| --- | ---: |",
            f"| bytes | {size / 1e9:.2f} GB ({size / parameters:.1f} a parameter) |",
            f"| a save: written, hashed, fsynced, renamed | {save:.2f} s ({shown}) |",
            f"| the same bytes, written and fsynced by a plain loop | {write:.2f} s |",
            f"| ratio | {save / write:.2f} |",
            f"| share of training lost at a save every {MINUTES_BETWEEN_SAVES} minutes | {share:.2%} |",
            "",
            f"`python benchmarks/checkpoint_cost.py --folder DIR --saves {options.saves} --deepspeed "
            f"{options.deepspeed}`, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, local "
            "disk. The ranks wait while they save, so a save's seconds are all that is lost; on a cluster each rank "
            "writes its own part of the optimizer's states.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
