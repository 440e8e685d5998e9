"""The pass over a chunk of logits: loss sums, and in the student's place the gradient with respect to it.

Every row is taken by itself: log-sum-exps of student and teacher, KL at temperature T, cross-entropy at its label,
squared distance. On CUDA a Triton kernel takes a row a program, on a CPU compiled C++ a row at a time; elsewhere a few
rows at a time go through vectorised operations, so that what one of them writes is still in the cache when the next one
reads it. docs/objective.md derives the formulas.
"""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

# fp32 bytes of the rows that are worked on together, a thread: few enough to stay near the caches, and enough that
# waking the threads does not count (512 rows of CamemBERT's vocabulary on two threads: 66 ms, 161 at a quarter of it).
_BYTES_AT_ONCE = {"cpu": 2 << 20, "cuda": 64 << 20}

# Bytes of fp32 that stay in a CPU's caches while they are used once more.
_CACHED_BYTES = 4 << 20


@dataclass(frozen=True)
class LogitTerms:
    """Factors of the gradient of each term; a term whose factor is 0 is left out, and its sum is 0.

    kl, mlm, mse: what each term's sum is multiplied with, over the factor that is applied later.
    temperature: T > 0 of the KL term, whose sum includes T^2.
    """

    kl: float
    mlm: float
    mse: float
    temperature: float


def take_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    terms: LogitTerms,
    *,
    scale: Tensor | None = None,
    wants_gradient: bool = True,
    columns: Tensor | None = None,
) -> Tensor:
    """(3,) fp32 sums of kl, mlm and mse over the rows; `student` becomes the gradient where one is wanted.

    Args:
        student: (rows, vocab) logits of any float dtype, the last dimension contiguous; overwritten.
        teacher: (soft, vocab) logits for the first rows, which kl and mse are taken on; None: no such row.
        labels: (hard,) int64 targets of the first rows, for mlm.
        scale: scalar fp32 on the device that the gradient is multiplied with before it is rounded; None: 1.
        wants_gradient: otherwise `student` stays as it is.
        columns: (vocab,) fp32, to which the gradient's sums over the rows are added, without `scale`; None: not wanted.
    """
    from distilcb.losses import logit_cpu

    if logit_cpu.takes(student, teacher, labels, scale):
        return logit_cpu.take_rows_in_cpp(student, teacher, labels, terms, wants_gradient, columns)
    if student.is_cuda and _triton_is_here():
        from distilcb.losses.logit_kernel import take_rows_in_kernel

        sums = take_rows_in_kernel(student, teacher, labels, terms, scale, wants_gradient)
    else:
        sums = take_rows_vectorised(student, teacher, labels, terms, scale, wants_gradient)
    if columns is not None and wants_gradient:
        for part in few_rows(student):
            summed = part.sum(0, dtype=torch.float32)
            columns += summed if scale is None else summed.div_(scale)
    return sums


def few_rows(matrix: Tensor) -> tuple[Tensor, ...]:
    """The matrix in parts whose fp32 copies stay in a CPU's caches; on a GPU, which makes no copies, as it is."""
    rows = _CACHED_BYTES // (4 * matrix.shape[1]) if matrix.device.type == "cpu" else len(matrix)
    return matrix.split(max(1, rows))


@cache
def _triton_is_here() -> bool:
    """Whether there is a Triton that can compile: it makes a small C program of each kernel."""
    try:
        import triton
    except ImportError:
        return False
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    missing = "" if header.exists() else f"no {header}"
    if not any(map(shutil.which, compilers)):
        missing = f"no C compiler ({' or '.join(compilers)})"
    if missing:
        with suppress(Exception):  # what it compiled elsewhere may lie in its cache
            triton.runtime.driver.active.get_current_target()
            return True
        log.warning(
            "%s, which Triton needs: the head's pass over logits goes through torch's operations, slower", missing
        )
    return not missing


def take_rows_vectorised(
    student: Tensor, teacher: Tensor | None, labels: Tensor, terms: LogitTerms, scale: Tensor | None, wants: bool
) -> Tensor:
    """As `take_rows`, in torch's own operations on a few rows at a time."""
    rows, vocab = student.shape
    bytes_at_once = _BYTES_AT_ONCE["cuda"] if student.is_cuda else _BYTES_AT_ONCE["cpu"] * torch.get_num_threads()
    at_once = max(1, bytes_at_once // (4 * vocab))
    work = _Work(min(at_once, rows), vocab, student.device)
    sums = torch.zeros(3, device=student.device, dtype=torch.float32)
    soft_rows = 0 if teacher is None or not (terms.kl or terms.mse) else teacher.shape[0]
    hard_rows = labels.shape[0] if terms.mlm else 0
    for start in range(0, rows, at_once):
        stop = min(start + at_once, rows)
        logits = work.student[: stop - start].copy_(student[start:stop])
        gradient = work.gradient[: stop - start]
        soft, hard = max(0, min(stop, soft_rows) - start), max(0, min(stop, hard_rows) - start)
        if soft:
            assert teacher is not None
            _add_soft_targets(work, logits[:soft], teacher[start : start + soft], gradient[:soft], terms, sums)
        gradient[soft:].zero_()
        if hard:
            _add_labels(work, logits[:hard], labels[start : start + hard], gradient[:hard], terms, sums)
        if wants:
            student[start:stop].copy_(gradient if scale is None else gradient.mul_(scale))
    return sums


class _Work:
    """fp32 arrays of a few rows, used again and again while they are in the cache."""

    def __init__(self, rows: int, vocab: int, device: torch.device) -> None:
        space = torch.empty(4, rows, vocab, device=device, dtype=torch.float32)
        self.student, self.teacher, self.gradient, self.spare = space.unbind()


def _add_soft_targets(
    work: _Work, student: Tensor, teacher: Tensor, gradient: Tensor, terms: LogitTerms, sums: Tensor
) -> None:
    """`gradient` is written. Under it lies what the sums need on the way."""
    rows = len(student)
    target, spare = work.teacher[:rows].copy_(teacher), work.spare[:rows]
    distance = None
    if terms.mse:
        distance = student - target
        sums[2] += distance.square().sum()
    if terms.kl:
        student_log_probs = torch.log_softmax(torch.mul(student, 1 / terms.temperature, out=spare), -1, out=gradient)
        teacher_log_probs = torch.log_softmax(target.mul_(1 / terms.temperature), -1, out=spare)
        teacher_probs = torch.exp(teacher_log_probs, out=target)
        teacher_log_probs.sub_(student_log_probs).mul_(teacher_probs)
        sums[0] += terms.temperature**2 * teacher_log_probs.sum()
        student_log_probs.exp_().sub_(teacher_probs).mul_(terms.temperature * terms.kl)
    else:
        gradient.zero_()
    if distance is not None:
        gradient.add_(distance, alpha=2 * terms.mse)


def _add_labels(
    work: _Work, student: Tensor, labels: Tensor, gradient: Tensor, terms: LogitTerms, sums: Tensor
) -> None:
    log_probs = torch.log_softmax(student, -1, out=work.spare[: len(student)])
    at_label = log_probs.gather(1, labels[:, None])
    sums[1] -= at_label.sum()
    gradient.add_(log_probs.exp_(), alpha=terms.mlm)
    gradient.scatter_add_(1, labels[:, None], torch.full_like(at_label, -terms.mlm))
