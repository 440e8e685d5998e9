"""Is a run that is killed again and again the same run? Beside one that nothing happens to, to the last bit.

python benchmarks/torture.py --kills 100 --ranks 4 --report docs/results/torture.md

Both runs distil the shipped mini teacher under ZeRO-2 in fp32. The tortured one is killed with SIGKILL at random
moments: while it starts, in a step, while it saves, while it evaluates; the whole job, or one rank whose launcher then
ends the others. After each kill every checkpoint must be whole or not there, and none that was whole may be gone but by
age.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distilcb.command_line import new_file
from distilcb.config import REPOSITORY
from distilcb.distributed import exit_code
from distilcb.durability import write_durably
from distilcb.engine.checkpoint import Checkpoints
from distilcb.errors import TrainingError

KEEP, SAVE_EVERY, EVAL_EVERY = 2, 3, 5
TIMED = {"seconds", "tokens_per_second", "data_wait_fraction", "memory_bytes", "mfu"}
MOMENTS = ("start", "step", "save", "evaluation")
# How long a start and the few steps to any moment may take, on a busy machine.
_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Kill:
    """What was done: at which moment, after which logged step, to one rank or to all."""

    moment: str
    step: int
    whole_job: bool


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--runs", type=Path, default=Path("runs/torture"), help="folder for both runs; must be new")
    parser.add_argument("--report", type=new_file, help="Markdown file to write")
    options = parser.parse_args(words)
    # Some kills come before the first save after the last one, so steps are plenty.
    steps = SAVE_EVERY * (options.kills + 2)
    started = time.perf_counter()
    whole, tortured = options.runs / "whole", options.runs / "tortured"
    finish(whole, options.ranks, steps)
    kills = torture(tortured, options.ranks, steps, options.kills, random.Random(options.seed))
    finish(tortured, options.ranks, steps)
    compare(whole, tortured, steps)
    text = report(kills, options, steps, time.perf_counter() - started)
    print(text)
    if options.report:
        write_durably(options.report, text)


def command(run_dir: Path, ranks: int, steps: int) -> list[str]:
    """The run, as a user starts it."""
    launcher = Path(sys.executable).parent / "deepspeed"
    return [
        *(str(launcher), "--num_gpus", str(ranks), "launch/train.py", "--run_dir", str(run_dir.absolute())),
        *("--deepspeed", "zero2_cpu", "--data.seq_len", "32", "--optim.micro_batch", "2"),
        *("--optim.global_batch", str(4 * ranks), "--train.steps", str(steps), "--train.log_every", "1"),
        *("--train.save_every", str(SAVE_EVERY), "--train.keep_checkpoints", str(KEEP)),
        *("--train.eval_every", str(EVAL_EVERY), "--train.eval_maskings", "2", "--data.workers", "1"),
    ]


def finish(run_dir: Path, ranks: int, steps: int) -> None:
    """Let a run go on to its end."""
    done = subprocess.run(command(run_dir, ranks, steps), cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode or not (run_dir / "DONE").exists():
        raise TrainingError(f"{run_dir} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def torture(run_dir: Path, ranks: int, steps: int, kills: int, chance: random.Random) -> list[Kill]:
    """Start the run and kill it, again and again; returns what was done."""
    done = []
    while len(done) < kills:
        moment = MOMENTS[len(done) % len(MOMENTS)]
        whole_job = chance.random() < 0.5
        before = good_checkpoints(run_dir)
        process = subprocess.Popen(
            command(run_dir, ranks, steps),
            cwd=REPOSITORY,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_for(moment, process, run_dir, chance)
            rank = None if whole_job else a_rank_of(process, chance)
            os.kill(rank, signal.SIGKILL) if rank else os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=_PATIENCE_SECONDS)
        finally:
            for left in [*ranks_of(process.pid), process.pid]:
                try:
                    os.killpg(os.getpgid(left), signal.SIGKILL)
                except ProcessLookupError:
                    continue
            process.wait()
        if (run_dir / "DONE").exists():
            raise TrainingError(f"{run_dir} was done before kill {len(done) + 1}: give it more steps")
        after = good_checkpoints(run_dir)
        if before and (not after or max(after) < max(before)):
            raise TrainingError(f"kill {len(done) + 1}, {moment}: checkpoints {before} became {after}")
        done.append(Kill(moment, last_step(run_dir), whole_job))
        print(f"kill {len(done)}: {done[-1]}, good checkpoints {after}", flush=True)
    return done


def a_rank_of(process: subprocess.Popen[bytes], chance: random.Random) -> int:
    """Any rank of the job, once it has one."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (ranks := ranks_of(process.pid)):
        if process.poll() is not None or time.monotonic() > deadline:
            raise TrainingError(f"process {process.pid} ended, or started no rank")
        time.sleep(0.01)
    return chance.choice(ranks)


def wait_for(moment: str, process: subprocess.Popen[bytes], run_dir: Path, chance: random.Random) -> None:
    """Until the run is somewhere in a moment of this kind."""
    first, deadline = last_step(run_dir), time.monotonic() + _PATIENCE_SECONDS
    conditions: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "step": lambda: last_step(run_dir) > first,
        # A folder that an earlier kill has left is removed before the first step.
        "save": lambda: last_step(run_dir) > first and any((run_dir / "checkpoints").glob(".step_*.tmp")),
        # The line of the step is written before its evaluation.
        "evaluation": lambda: last_step(run_dir) > first and last_step(run_dir) % EVAL_EVERY == 0,
    }
    while not conditions[moment]():
        if process.poll() is not None or time.monotonic() > deadline:
            raise TrainingError(f"{run_dir}: it ended, or came to no {moment}")
        time.sleep(0.001)
    time.sleep(chance.uniform(0, {"start": 8.0, "step": 0.5, "save": 0.05, "evaluation": 0.2}[moment]))


def ranks_of(pid: int) -> list[int]:
    """The ranks among a process's descendants; the helpers that a rank forks carry its name too."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(words[1]), []).append(int(path.parent.name))
    family, ranks = [pid], []
    while family:
        for child in children.get(family.pop(), []):
            if _is_rank(child):
                ranks.append(child)
            else:
                family.append(child)
    return ranks


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"launch/train.py" in words and any(word.startswith(b"--local_rank=") for word in words)


def good_checkpoints(run_dir: Path) -> list[int]:
    """Steps of the checkpoints that are there; one that is not what its manifest says is an error."""
    checkpoints = Checkpoints(run_dir / "checkpoints", keep=KEEP)
    for step in checkpoints.steps():
        if checkpoints.of_step(step) is None:
            raise TrainingError(f"{run_dir}: half a checkpoint has the name of a whole one, step {step}")
    return checkpoints.steps()


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what a clock says."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{name: value for name, value in record.items() if name not in TIMED} for record in found]


def last_step(run_dir: Path) -> int:
    """The last step that is logged."""
    return max((record["step"] for record in records(run_dir) if "loss" in record), default=0)


def compare(whole: Path, tortured: Path, steps: int) -> None:
    """Raise TrainingError where the two runs are not the same."""
    ours, theirs = records(tortured), records(whole)
    if [record["step"] for record in ours if "loss" in record] != list(range(1, steps + 1)):
        raise TrainingError(f"{tortured}: not every step was logged once")
    for one, other in zip(ours, theirs, strict=True):
        if one != other:
            raise TrainingError(f"step {other['step']}: {one} is not {other}")
    files = [each / "student" / "model.safetensors" for each in (tortured, whole)]
    if files[0].read_bytes() != files[1].read_bytes():
        raise TrainingError(f"{files[0]} differs from {files[1]}, though every figure is the same")


def report(kills: list[Kill], options: argparse.Namespace, steps: int, seconds: float) -> str:
    """What was done, as Markdown."""
    counts = Counter((kill.moment, kill.whole_job) for kill in kills)
    rows = [f"| {moment} | {counts[moment, True]} | {counts[moment, False]} |" for moment in MOMENTS]
    last = json.dumps([asdict(kill) for kill in kills[-3:]])
    return "\n".join(
        [
            "# Killed again and again",
            "",
            f"{len(kills)} kills with SIGKILL of a run of {steps} steps on {options.ranks} ranks (ZeRO-2, fp32, CPU): "
            "every line of metrics.jsonl and every byte of the student are those of the run that nothing happened to.",
            "",
            "| moment | the whole job | one rank |",
            "| --- | ---: | ---: |",
            *rows,
            "",
            f"`python benchmarks/torture.py --kills {options.kills} --ranks {options.ranks} --seed {options.seed}`, "
            f"{platform.machine()}, {os.cpu_count()} cores, {seconds / 60:.0f} minutes. The last kills: {last}",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
