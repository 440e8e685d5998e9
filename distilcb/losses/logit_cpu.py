"""distilcb.losses.logit_rows for a CPU in C++ (logit_rows.cpp), in a tenth of the vectorised operations' time.

Where it is not compiled (distilcb.native), the vectorised operations do the same up to rounding.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from distilcb.losses.logit_rows import LogitTerms
from distilcb.native import library

_NAMES = {torch.bfloat16: "distilcb_take_rows_bf16", torch.float32: "distilcb_take_rows_fp32"}
_NUMBER, _COUNT, _POINTER, _REAL = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS = [_POINTER, _NUMBER] * 2 + [_POINTER] + [_NUMBER] * 4 + [_REAL] * 4 + [_COUNT] * 2 + [_POINTER] * 2


def takes(student: Tensor, teacher: Tensor | None, labels: Tensor, scale: Tensor | None) -> bool:
    """Whether `take_rows_in_cpp` takes these: on a CPU, logits alike and in bf16 or fp32; and it is compiled."""
    logits = [student] if teacher is None else [student, teacher]
    alike = all(
        each.device.type == "cpu" and each.dtype == student.dtype and (each.stride(1) == 1 or each.shape[1] == 1)
        for each in logits
    )
    return alike and student.dtype in _NAMES and labels.dtype == torch.int64 and scale is None and library() is not None


def take_rows_in_cpp(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    terms: LogitTerms,
    wants_gradient: bool,
    columns: Tensor | None = None,
) -> Tensor:
    """As `take_rows`, of what `takes` says yes to; its sums, other than the columns', do not depend on the threads.

    Raises:
        IndexError: labels that are none of the vocabulary.
    """
    rows, vocab = student.shape
    soft_rows = 0 if teacher is None or not (terms.kl or terms.mse) else teacher.shape[0]
    hard_rows = labels.shape[0] if terms.mlm else 0
    threads = torch.get_num_threads()
    space = torch.empty(threads, 4, vocab, device=student.device, dtype=torch.float32)
    column_sums = space[:, 3].zero_()
    by_row = torch.empty(rows, 3, device=student.device, dtype=torch.float32)
    other, labels = student if teacher is None else teacher, labels.contiguous()
    take = getattr(library(), _NAMES[student.dtype])
    take.argtypes, take.restype = _ARGUMENTS, _NUMBER
    wrong = take(
        *(student.data_ptr(), student.stride(0)),
        *(other.data_ptr(), other.stride(0)),
        labels.data_ptr(),
        *(rows, soft_rows, hard_rows, vocab),
        *(terms.kl, terms.mlm, terms.mse, 1 / terms.temperature),
        *(int(wants_gradient), threads),
        *(space.data_ptr(), by_row.data_ptr()),
    )
    if wrong:
        raise IndexError(f"{wrong} of {hard_rows} labels are not in a vocabulary of {vocab}")
    if columns is not None:
        columns += column_sums.sum(0)
    return by_row.sum(0)
