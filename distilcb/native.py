"""Our own C++ for a CPU, every .cpp of the package in one library: compiled ahead of time, never while training.

distilcb.engine.operators compiles it with DeepSpeed's operators. What calls it has slower operations of torch for where
it is not compiled.
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

from distilcb.machine import compiled_operator, compiled_operators_folder

log = logging.getLogger("distilcb")

_FOLDER = Path(__file__).parent
_SOURCES, _HEADERS = sorted(_FOLDER.rglob("*.cpp")), sorted(_FOLDER.rglob("*.hpp"))
_FLAGS = ["-O3", "-march=native", "-fopenmp"]


def _name() -> str:
    """One of its own for each source, flags and kind of CPU, so that what another has left is not taken."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8").splitlines() if information.is_file() else []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    version = hashlib.sha256(" ".join([*_FLAGS, kind]).encode())
    for source in _SOURCES + _HEADERS:
        version.update(source.read_bytes())
    return f"distilcb_native_{version.hexdigest()[:8]}"


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
            [str(source) for source in _SOURCES],
            extra_cflags=_FLAGS,
            extra_ldflags=["-fopenmp"],
            build_directory=work,
            is_python_module=False,
        )
        (built,) = Path(work).glob("*.so")
        os.replace(built, folder / f"{OPERATOR}.so")


@cache
def library() -> Any | None:
    """What was compiled, or None where nothing was when it was first asked for."""
    file = compiled_operator(OPERATOR)
    try:
        return None if file is None else ctypes.CDLL(str(file))
    except OSError as error:
        log.warning("our C++ cannot be loaded: %s. Remove the file, and run make install.", error)
        return None
