"""Sums and counts, throughput, share of the device's peak, memory."""

import re
import resource
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilcb.gpus import GPUS


@dataclass(frozen=True)
class ModelShape:
    """Sizes that decide the work of one token."""

    layers: int
    hidden: int
    intermediate: int
    vocab: int

    @property
    def layer_parameters(self) -> int:
        """Weights of the matrices of all layers."""
        return self.layers * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)


def shape_of(config: Any, *, feed_forward_size: int) -> ModelShape:
    """Of a model's configuration; each family has its own name for the feed-forward size."""
    return ModelShape(config.num_hidden_layers, config.hidden_size, feed_forward_size, config.vocab_size)


def flops_per_token(
    student: ModelShape,
    teacher: ModelShape | None,
    *,
    seq_len: int,
    soft_share: float,
    head_share: float,
    relates: bool = False,
) -> float:
    """Floating-point operations of one training token: 2 a weight forward, 4 backward, and attention.

    Args:
        soft_share: share of the tokens on which the teacher's distribution is made.
        head_share: share of the tokens on which the student's is.
        relates: whether tokens' relations are learnt, whose scores are made again for the backward pass.

    Source: Kaplan et al. 2020, arXiv:2001.08361, table 1, with the vocabulary head and attention counted.
    """
    head = student.hidden * (student.vocab + student.hidden)
    total = 6.0 * (student.layer_parameters + head_share * head)
    total += 12.0 * student.layers * seq_len * student.hidden
    if teacher is not None:
        head = teacher.hidden * (teacher.vocab + teacher.hidden)
        total += 2.0 * (teacher.layer_parameters + soft_share * head)
        total += 4.0 * teacher.layers * seq_len * teacher.hidden
        if relates:
            total += relation_flops(student.hidden, teacher.hidden, seq_len=seq_len)
    return total


def relation_flops(student_hidden: int, teacher_hidden: int, *, seq_len: int) -> float:
    """Of a token's relations: three products of a row with every token, made twice, and the student's two back."""
    return 3 * 2.0 * seq_len * (4 * student_hidden + 2 * teacher_hidden)


def peak_flops(device: torch.device) -> float | None:
    """The device's half-precision peak in FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    words = set(re.split(r"[^A-Za-z0-9]", name))
    if words & {"PCIe", "NVL"}:  # slower than the SXM variants that the table holds
        return None
    return next((gpu.flops for part, gpu in GPUS.items() if part in words), None)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory used so far: of the CUDA device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Window:
    """What has gathered since the last logging step. Sums stay on the device until then."""

    def __init__(self, terms: int, device: torch.device) -> None:
        self.sums: Tensor = torch.zeros(terms, dtype=torch.float64, device=device)
        self.steps = self.skipped = 0
        self.data_wait_seconds = 0.0
        self._started = time.perf_counter()

    def state(self, rows: list[list[float]]) -> dict[str, Any]:
        """What a checkpoint keeps of an open window. rows: every rank's sums."""
        kept = {"sums": rows, "steps": self.steps, "skipped": self.skipped, "seconds": self.seconds()}
        return kept | {"data_wait_seconds": self.data_wait_seconds}

    def restore(self, state: dict[str, Any], *, rank: int, world_size: int) -> None:
        """Go on with a window that was open when the checkpoint was saved, on any number of ranks."""
        rows = torch.tensor(state["sums"], dtype=torch.float64)
        # A checkpoint of an earlier version knows fewer terms; new ones stand last.
        rows = torch.nn.functional.pad(rows, (0, self.sums.numel() - rows.shape[1]))
        if len(rows) == world_size:
            self.sums += rows[rank].to(self.sums.device)
        elif rank == 0:
            self.sums += rows.sum(0).to(self.sums.device)
        self.steps, self.skipped, self.data_wait_seconds = state["steps"], state["skipped"], state["data_wait_seconds"]
        self._started -= state["seconds"]

    def add(self, sums: Tensor, *, skipped: bool, data_wait_seconds: float) -> None:
        """Take in one step. sums: (terms,) on the device."""
        self.sums += sums
        self.steps += 1
        self.skipped += skipped
        self.data_wait_seconds += data_wait_seconds

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training (an evaluation, a save)."""
        self._started += seconds

    def seconds(self) -> float:
        """Training time since the window was opened."""
        return max(time.perf_counter() - self._started, 1e-9)
