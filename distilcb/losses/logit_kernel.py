"""distilcb.losses.logit_rows as a Triton kernel: a program a row, logits read twice and the gradient written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from distilcb.losses.logit_rows import LogitTerms

_BLOCK = 4096
_WARPS = 8


def take_rows_in_kernel(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    terms: LogitTerms,
    scale: Tensor | None,
    wants_gradient: bool,
) -> Tensor:
    """As `take_rows`; sums over rows do not depend on the order in which programs end."""
    rows, vocab = student.shape
    soft_rows = 0 if teacher is None or not (terms.kl or terms.mse) else teacher.shape[0]
    hard_rows = labels.shape[0] if terms.mlm else 0
    by_row = torch.empty(3, rows, device=student.device, dtype=torch.float32)
    other = student if teacher is None else teacher
    _rows[(rows,)](
        student,
        other,
        labels,
        student if scale is None else scale,
        by_row,
        vocab,
        student.stride(0),
        other.stride(0),
        rows,
        soft_rows,
        hard_rows,
        1 / terms.temperature,
        terms.kl,
        terms.mlm,
        terms.mse,
        HAS_KL=bool(terms.kl) and soft_rows > 0,
        HAS_MSE=bool(terms.mse) and soft_rows > 0,
        HAS_SCALE=scale is not None,
        WANTS_GRADIENT=wants_gradient,
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocab)),
        num_warps=_WARPS,
    )
    return by_row.sum(1)


@triton.jit
def _rows(  # type: ignore[no-untyped-def]  # Triton's own types
    student,
    teacher,
    labels,
    scale,
    sums,
    vocab,
    student_stride,
    teacher_stride,
    rows,
    soft_rows,
    hard_rows,
    inverse_temperature,
    kl_factor,
    mlm_factor,
    mse_factor,
    HAS_KL: tl.constexpr,
    HAS_MSE: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    WANTS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    is_soft = row < soft_rows
    is_hard = row < hard_rows
    label = tl.load(labels + row, mask=is_hard, other=-1)
    largest, exps, soft_exps, teacher_largest, teacher_exps, crossed, squares, at_label = _statistics(
        student, teacher, label, vocab, is_soft, is_hard, inverse_temperature, HAS_KL, HAS_MSE, BLOCK
    )
    kl = 0.0
    if HAS_KL:
        if is_soft:
            # Sum of p (log p - log q): the distance of the logits less that of the log-sum-exps.
            kl = (crossed / teacher_exps + largest - teacher_largest) * inverse_temperature
            kl = (kl + tl.log(soft_exps) - tl.log(teacher_exps)) / (inverse_temperature * inverse_temperature)
    mlm = 0.0
    if is_hard:
        mlm = tl.log(exps) + largest - at_label
    tl.store(sums + row, kl)
    tl.store(sums + rows + row, mlm)
    tl.store(sums + 2 * rows + row, squares)
    if not WANTS_GRADIENT:
        return

    factor = 1.0
    if HAS_SCALE:
        factor = tl.load(scale)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, vocab, BLOCK):
        columns = first + lanes
        inside = columns < vocab
        logits = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
        gradient = tl.zeros([BLOCK], dtype=tl.float32)
        if HAS_KL or HAS_MSE:
            if is_soft:
                targets = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
                if HAS_KL:
                    ours = tl.exp((logits - largest) * inverse_temperature) / soft_exps
                    theirs = tl.exp((targets - teacher_largest) * inverse_temperature) / teacher_exps
                    gradient += (ours - theirs) * (kl_factor / inverse_temperature)
                if HAS_MSE:
                    distance = tl.where(inside, logits, 0.0) - tl.where(inside, targets, 0.0)
                    gradient += 2 * mse_factor * distance
        if is_hard:
            gradient += mlm_factor * (tl.exp(logits - largest) / exps - tl.where(columns == label, 1.0, 0.0))
        tl.store(student + columns, (gradient * factor).to(student.dtype.element_ty), mask=inside)


@triton.jit
def _statistics(  # type: ignore[no-untyped-def]
    student,
    teacher,
    label,
    vocab,
    is_soft,
    is_hard,
    inverse_temperature,
    HAS_KL: tl.constexpr,
    HAS_MSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest logits and sums over a row. Sums of exponentials are kept relative to the largest logit so far."""
    largest, exps, soft_exps = -float("inf"), 0.0, 0.0
    teacher_largest, teacher_exps, crossed = -float("inf"), 0.0, 0.0
    squares, at_label = 0.0, 0.0
    lanes = tl.arange(0, BLOCK)
    for first in range(0, vocab, BLOCK):
        columns = first + lanes
        inside = columns < vocab
        logits = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
        before = largest
        largest = tl.maximum(largest, tl.max(logits, 0))
        if is_hard:
            exps = exps * tl.exp(before - largest) + tl.sum(tl.exp(logits - largest), 0)
            at_label += tl.sum(tl.where(columns == label, logits, 0.0), 0)
        if HAS_KL or HAS_MSE:
            if is_soft:
                targets = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
                distance = tl.where(inside, targets, 0.0) - tl.where(inside, logits, 0.0)
                if HAS_MSE:
                    squares += tl.sum(distance * distance, 0)
                if HAS_KL:
                    teacher_before = teacher_largest
                    teacher_largest = tl.maximum(teacher_largest, tl.max(targets, 0))
                    shrinks = tl.exp((teacher_before - teacher_largest) * inverse_temperature)
                    weights = tl.exp((targets - teacher_largest) * inverse_temperature)
                    teacher_exps = teacher_exps * shrinks + tl.sum(weights, 0)
                    crossed = crossed * shrinks + tl.sum(weights * distance, 0)
                    shrinks = tl.exp((before - largest) * inverse_temperature)
                    soft_exps = soft_exps * shrinks + tl.sum(tl.exp((logits - largest) * inverse_temperature), 0)
    return largest, exps, soft_exps, teacher_largest, teacher_exps, crossed, squares, at_label
