"""distilcb.losses.logit_rows for a CPU in C++ (logit_rows.cpp): a ninth of the vectorised operations' time.

It is compiled ahead of time with DeepSpeed's operators (distilcb.engine.operators), never while training: where it is
not compiled, the vectorised operations do the same.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilcb.losses.logit_rows import LogitTerms
from distilcb.machine import compiled_operator

SOURCE = Path(__file__).with_name("logit_rows.cpp")
# Its version is in its name, so that what an older one has left is not taken.
OPERATOR = f"distilcb_logit_rows_{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:8]}"
_FLAGS = ["-O3", "-march=native", "-fopenmp"]
_NAMES = {torch.bfloat16: "distilcb_take_rows_bf16", torch.float32: "distilcb_take_rows_fp32"}
_NUMBER, _COUNT, _POINTER, _REAL = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS = [_POINTER, _NUMBER] * 2 + [_POINTER] + [_NUMBER] * 4 + [_REAL] * 4 + [_COUNT] * 2 + [_POINTER]


def compile_here(folder: Path | None = None) -> None:
    """Compile it, in `folder` or where torch keeps the operators that it compiles."""
    from torch.utils.cpp_extension import load

    directory = None if folder is None else str(folder)
    load(
        OPERATOR,
        [str(SOURCE)],
        extra_cflags=_FLAGS,
        extra_ldflags=["-fopenmp"],
        build_directory=directory,
        is_python_module=False,
    )


def takes(student: Tensor, scale: Tensor | None) -> bool:
    """Whether these logits can be taken here: on a CPU, in bf16 or fp32, and the C++ is compiled."""
    return student.device.type == "cpu" and student.dtype in _NAMES and scale is None and library() is not None


@cache
def library() -> Any | None:
    """What was compiled, or None where nothing was when it was first asked for."""
    file = compiled_operator(OPERATOR)
    return None if file is None else ctypes.CDLL(str(file))


def take_rows_in_cpp(
    student: Tensor, teacher: Tensor | None, labels: Tensor, terms: LogitTerms, wants_gradient: bool
) -> Tensor:
    """As `take_rows`, of logits that `takes` says yes to; sums do not depend on the number of threads.

    Raises:
        IndexError: labels that are none of the vocabulary.
    """
    rows, vocab = student.shape
    soft_rows = 0 if teacher is None or not (terms.kl or terms.mse) else teacher.shape[0]
    hard_rows = labels.shape[0] if terms.mlm else 0
    by_row = torch.empty(rows, 3, dtype=torch.float32)
    other, labels = student if teacher is None else teacher, labels.contiguous()
    take = getattr(library(), _NAMES[student.dtype])
    take.argtypes, take.restype = _ARGUMENTS, _NUMBER
    wrong = take(
        *(student.data_ptr(), student.stride(0)),
        *(other.data_ptr(), other.stride(0)),
        labels.data_ptr(),
        *(rows, soft_rows, hard_rows, vocab),
        *(terms.kl, terms.mlm, terms.mse, 1 / terms.temperature),
        *(int(wants_gradient), torch.get_num_threads(), by_row.data_ptr()),
    )
    if wrong:
        raise IndexError(f"{wrong} of {hard_rows} labels are not in a vocabulary of {vocab}")
    return by_row.sum(0)
