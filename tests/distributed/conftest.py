"""Real ranks for tests."""

import inspect
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RANK_PROGRAM = Path(__file__).with_name("rank.py")
# How long the others may take to notice that a rank has died, before they are killed.
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class Rank:
    """How a rank's process ended: what its function returned (None where it did not), exit code, and what it said."""

    result: Any
    exit_code: int
    output: str


@pytest.fixture(scope="session")
def run_on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Rank]]]:
    """Calls a function of a test module in real processes that form one DeepSpeed world.

    run_on_ranks(function, ranks, fails=False, timeout_seconds=300, **arguments) -> what became of each rank.
    Processes meet over a file, so no ports collide; they are killed when the time is up. Unless `fails`, a rank
    that ends with another exit code than 0 fails the test with what it said.
    """
    alive: list[subprocess.Popen[bytes]] = []

    def run(
        function: Callable[..., Any],
        ranks: int,
        *,
        fails: bool = False,
        timeout_seconds: float = 300.0,
        **arguments: Any,
    ) -> list[Rank]:
        import torch

        folder = tmp_path_factory.mktemp(function.__name__)
        torch.save(arguments, folder / "arguments.pt")
        processes = [_start(function, folder, rank, ranks) for rank in range(ranks)]
        alive.extend(processes)
        try:
            in_time = _wait(processes, timeout_seconds)
        finally:
            _kill(processes)
        ended = [_ended(process, folder, rank) for rank, process in enumerate(processes)]
        said = "\n".join(f"--- rank {i}, exit code {rank.exit_code}:\n{rank.output}" for i, rank in enumerate(ended))
        assert in_time, f"{function.__name__} took over {timeout_seconds:.0f} s\n{said}"
        assert fails or all(rank.exit_code == 0 for rank in ended), said
        return ended

    yield run
    _kill(alive)


def _start(function: Callable[..., Any], folder: Path, rank: int, ranks: int) -> subprocess.Popen[bytes]:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_", "PMI_"))
    }
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        # They are asked for, and nothing listens there.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": "1",
    }
    words = [inspect.getfile(function), function.__name__, folder]
    with (folder / f"output_{rank}.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, RANK_PROGRAM, *words],
            cwd=REPOSITORY,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait(processes: list[subprocess.Popen[bytes]], timeout_seconds: float) -> bool:
    """Whether all ended in time; once one has failed, the others get a while to notice."""
    deadline = time.monotonic() + timeout_seconds
    one_has_failed = False
    while any(process.poll() is None for process in processes):
        if not one_has_failed and any(process.poll() for process in processes):
            one_has_failed = True
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            return one_has_failed
        time.sleep(0.05)
    return True


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _ended(process: subprocess.Popen[bytes], folder: Path, rank: int) -> Rank:
    import torch

    path = folder / f"result_{rank}.pt"
    result = torch.load(path, weights_only=False) if path.exists() else None
    return Rank(result, process.returncode, (folder / f"output_{rank}.txt").read_text(errors="replace"))
