"""distilcb.losses.logit_rows for a CPU in C++ (logit_rows.cpp), in a tenth of the vectorised operations' time.

It is compiled ahead of time, with DeepSpeed's operators (distilcb.engine.operators), never while training: where it is
not compiled, the vectorised operations do the same up to rounding.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilcb.losses.logit_rows import LogitTerms
from distilcb.machine import compiled_operator, compiled_operators_folder

log = logging.getLogger("distilcb")

_SOURCE = Path(__file__).with_name("logit_rows.cpp")
_FLAGS = ["-O3", "-march=native", "-fopenmp"]
_NAMES = {torch.bfloat16: "distilcb_take_rows_bf16", torch.float32: "distilcb_take_rows_fp32"}
_NUMBER, _COUNT, _POINTER, _REAL = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_float
_ARGUMENTS = [_POINTER, _NUMBER] * 2 + [_POINTER] + [_NUMBER] * 4 + [_REAL] * 4 + [_COUNT] * 2 + [_POINTER] * 2


def _name() -> str:
    """One of its own for each source, flags and kind of CPU, so that what another has left is not taken."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = hashlib.sha256(_SOURCE.read_bytes() + " ".join([*_FLAGS, kind]).encode())
    return f"distilcb_logit_rows_{version.hexdigest()[:8]}"


OPERATOR = _name()


def compile_here() -> None:
    """Compile it, where torch keeps the operators that it compiles.

    Raises:
        RuntimeError, OSError: no compiler, or what it made cannot be loaded.
    """
    from torch.utils.cpp_extension import load

    folder = compiled_operators_folder() / OPERATOR
    folder.mkdir(parents=True, exist_ok=True)
    # A build that is killed leaves half a library: only what could be loaded gets its name.
    with tempfile.TemporaryDirectory(dir=folder) as work:
        load(
            OPERATOR,
            [str(_SOURCE)],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=work,
            is_python_module=False,
        )
        (built,) = Path(work).glob("*.so")
        os.replace(built, folder / f"{OPERATOR}.so")


def takes(student: Tensor, teacher: Tensor | None, labels: Tensor, scale: Tensor | None) -> bool:
    """Whether `take_rows_in_cpp` takes these: on a CPU, logits alike and in bf16 or fp32; and it is compiled."""
    logits = [student] if teacher is None else [student, teacher]
    alike = all(
        each.device.type == "cpu" and each.dtype == student.dtype and (each.stride(1) == 1 or each.shape[1] == 1)
        for each in logits
    )
    return alike and student.dtype in _NAMES and labels.dtype == torch.int64 and scale is None and library() is not None


@cache
def library() -> Any | None:
    """What was compiled, or None where nothing was when it was first asked for."""
    file = compiled_operator(OPERATOR)
    try:
        return None if file is None else ctypes.CDLL(str(file))
    except OSError as error:
        log.warning("the head's pass over logits cannot be loaded: %s. Remove the file, and run make install.", error)
        return None


def take_rows_in_cpp(
    student: Tensor, teacher: Tensor | None, labels: Tensor, terms: LogitTerms, wants_gradient: bool
) -> Tensor:
    """As `take_rows`, of what `takes` says yes to; sums do not depend on the number of threads.

    Raises:
        IndexError: labels that are none of the vocabulary.
    """
    rows, vocab = student.shape
    soft_rows = 0 if teacher is None or not (terms.kl or terms.mse) else teacher.shape[0]
    hard_rows = labels.shape[0] if terms.mlm else 0
    threads = torch.get_num_threads()
    space = torch.empty(threads, 3, vocab, device=student.device, dtype=torch.float32)
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
    return by_row.sum(0)
