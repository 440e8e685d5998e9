"""The compiled operators, DeepSpeed's and our own, built once ahead of time: python -m distilcb.engine.operators

DeepSpeed builds its own at first use otherwise, for about a minute and in every rank at once. Run by `make` after the
installation; on a cluster, once on a node of the kind that will train.
"""

import os
import subprocess
import sys
import time

from distilcb import native
from distilcb.distributed import exit_code
from distilcb.errors import LaunchError
from distilcb.machine import compiled_operators_folder, is_compiled, use_own_tools, uses_cuda, wait_for_compiler

FUSED_ADAM, CPU_COMMUNICATION = "fused_adam", "deepspeed_shm_comm"
TIMEOUT_SECONDS = 900

_BUILD = "import sys; from distilcb.engine.operators import build_here; build_here(sys.argv[1])"
_BUILDERS = {FUSED_ADAM: "FusedAdamBuilder", CPU_COMMUNICATION: "ShareMemCommBuilder"}


def needed_operators() -> tuple[str, ...]:
    """DeepSpeed's operators that training uses on this machine."""
    return (FUSED_ADAM,) if uses_cuda() else (FUSED_ADAM, CPU_COMMUNICATION)


def build_operators(*, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
    """Build what is not built yet, each in a process of its own, saying so.

    Raises:
        LaunchError: no compiler, a build that fails, or one that takes too long (a lock that a killed build left).
    """
    use_own_tools()
    waiting = [name for name in needed_operators() if not is_compiled(name)]
    if not waiting:
        print("DeepSpeed's operators are compiled already", flush=True)
        return
    print(f"compiling DeepSpeed's operators ({', '.join(waiting)}): about a minute, once", flush=True)
    started = time.perf_counter()
    for name in waiting:
        wait_for_compiler(name)
        if not is_compiled(name):
            _build(name, timeout_seconds)
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)


def _build(name: str, timeout_seconds: float) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _BUILD, name],
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise LaunchError(
            f"compiling {name} took over {timeout_seconds:.0f} s. A build that was killed leaves a file "
            f"'lock' under {compiled_operators_folder()}: remove it and try again."
        ) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise LaunchError(
            f"DeepSpeed's {name} cannot be compiled: {lines[-1] if lines else 'no output'}. Needed: ninja and a C++ "
            "compiler (apt-get install g++, or module load gcc); for a GPU also nvcc, of torch's CUDA version."
        )


def build_own() -> None:
    """Build our own C++, which is for a CPU alone and has slower stand-ins."""
    use_own_tools()
    if uses_cuda() or is_compiled(native.OPERATOR):
        return
    print("compiling our own C++: a few seconds, once", flush=True)
    try:
        native.compile_here()
    except (OSError, RuntimeError) as error:
        print(f"it cannot be compiled, and steps will take longer: {error}", file=sys.stderr)


def build_here(name: str) -> None:
    """Build and load an operator in this process."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder(_BUILDERS[name]).load(verbose=False)


def _main(_words: list[str]) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    build_own()
    try:
        build_operators()
    except LaunchError as error:
        if not uses_cuda():
            raise
        print(f"{error}\nUntil then train with --optim.name adamw_torch.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(exit_code(_main))
