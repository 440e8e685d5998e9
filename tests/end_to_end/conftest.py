"""The commands of launch/ in processes of their own, and runs that several tests look at."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from distilcb.config import DEFAULT_RECIPE, REPOSITORY

STEPS = 6
TIMEOUT_SECONDS = 240
# A whole run of the mini recipe in a few seconds, in fp32, so that it can be repeated to the last bit.
SMALL = (
    *("--deepspeed", "zero2_cpu"),
    *("--optim.global_batch", "8", "--optim.micro_batch", "4", "--data.seq_len", "32"),
    *("--optim.lr", "0.001", "--loss.kl", "0.5", "--loss.mlm", "0.2", "--loss.cos", "0.3"),
    *("--train.steps", str(STEPS), "--train.save_every", "2", "--train.log_every", "1"),
    *("--train.eval_every", "0", "--train.eval_maskings", "2"),
)


@dataclass(frozen=True)
class Commands:
    """Starts commands on a copy of the shipped text, with a cache of its own."""

    text: Path
    cache: Path

    @property
    def small(self) -> list[str]:
        """Options of a small run on the text."""
        return [*SMALL, *self.data, *("--data.train", f"{self.text}/train")]

    @property
    def data(self) -> list[str]:
        """Options for held-out text and cache."""
        return ["--data.heldout", f"{self.text}/heldout", "--data.cache", str(self.cache)]

    def python(
        self, program: str, *words: object, environ: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`python launch/PROGRAM.py words`, ended."""
        return _end(start([sys.executable, f"launch/{program}.py", *words], environ))

    def python_with_small_files(self, kilobytes: int, program: str, *words: object) -> subprocess.CompletedProcess[str]:
        """The same, where no file may grow over a size: what a full disk does, to one program."""
        shell = f'ulimit -f {kilobytes}; exec "$@"'
        return _end(start(["bash", "-c", shell, "bash", sys.executable, f"launch/{program}.py", *words]))

    def deepspeed(
        self, ranks: int, program: str, *words: object, port: int | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`deepspeed --num_gpus RANKS launch/PROGRAM.py words`, ended."""
        return _end(start(_deepspeed(ranks, program, words, port)))

    @contextmanager
    def training(self, *words: object, until_step: int, student: str = "") -> Iterator[subprocess.Popen[str]]:
        """A run that has taken some steps and goes on; killed where it is left. student: as below."""
        process = start([sys.executable, "launch/train.py", *words])
        run_dir = Path(str(words[words.index("--run_dir") + 1])) / student
        try:
            _wait_for_step(process, run_dir, until_step)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def train_until_killed(
        self,
        run_dir: Path,
        *words: object,
        after_step: int,
        ranks: int = 1,
        by: int = signal.SIGKILL,
        student: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """Train and send every process a signal once a step is in metrics.jsonl; returns how it ended.

        student: of several, in whose folder below run_dir the step is waited for.
        """
        words = ("--run_dir", run_dir, *words)
        program = [sys.executable, "launch/train.py", *words] if ranks == 1 else _deepspeed(ranks, "train", words)
        process = start(program)
        _wait_for_step(process, run_dir / student, after_step)
        os.killpg(process.pid, by)
        ended = _end(process)
        assert not (run_dir / student / "DONE").exists(), "it was done before it could be killed"
        return ended


def _wait_for_step(process: subprocess.Popen[str], run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(line["step"] >= step for line in lines(run_dir) if "loss" in line):
        if process.poll() is not None or time.monotonic() > deadline:
            ended = _end(process)
            raise AssertionError(f"no step {step}: exit code {ended.returncode}\n{ended.stdout}{ended.stderr}")
        time.sleep(0.005)


def start(words: list[Any], environ: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        list(map(str, words)),
        cwd=REPOSITORY,
        env=os.environ
        | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        | (environ or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has the commands that it starts in the background ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def _deepspeed(ranks: int, program: str, words: tuple[object, ...], port: int | None = None) -> list[object]:
    if port is None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [launcher, "--num_gpus", ranks, "--master_port", port, f"launch/{program}.py", *words]


def _end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    try:
        out, err = process.communicate(timeout=TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"took over {TIMEOUT_SECONDS} s\n{out}{err}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; one that is being written is left out."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


@pytest.fixture(scope="session")
def commands(tmp_path_factory) -> Commands:
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(DEFAULT_RECIPE.parent / "mini" / "text", folder / "text")
    return Commands(folder / "text", folder / "cache")


@pytest.fixture(scope="session")
def metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads a run's metrics.jsonl."""
    return lines


@pytest.fixture(scope="session")
def finished(commands, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed, on one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    ended = commands.python("train", "--run_dir", run_dir, *commands.small)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return run_dir
