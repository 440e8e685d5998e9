"""The machine under a rank: its GPU or its CPU's threads and memory, and the operators compiled for it.

torch is imported where it is used: it costs a second.
"""

import ctypes
import importlib.util
import logging
import os
import runpy
import shutil
import sys
import time
from pathlib import Path

from distilcb.errors import LaunchError
from distilcb.launcher import World

_COMPILATION_TAKES_AT_MOST_SECONDS = 600.0
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_log = logging.getLogger("distilcb")


def uses_cuda() -> bool:
    """Whether ranks have a GPU each. DS_ACCELERATOR=cpu leaves GPUs alone, as it does for DeepSpeed."""
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def select_cuda_device(world: World) -> None:
    """Make the CUDA device of this rank's local number the current one; LaunchError where the machine has too few."""
    import torch

    devices = torch.cuda.device_count()
    if world.local_rank >= devices or world.local_size > devices:  # all ranks of the machine fail alike
        raise LaunchError(
            f"rank {world.rank} has local rank {world.local_rank} but sees {devices} CUDA device(s). Start "
            "one task per GPU, and let each see all GPUs of its machine: --ntasks-per-node=4 and "
            "--gres=gpu:4, without --gpus-per-task, --gpu-bind or a CUDA_VISIBLE_DEVICES of fewer."
        )
    torch.cuda.set_device(world.local_rank)


def size_cpu_threads(world: World) -> None:
    """Divide the cores among the ranks of this machine: left alone, each takes them all."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores_a_rank(world))


def cores_a_rank(world: World) -> int:
    """How many of this machine's cores are for each of its ranks; where the local size is unknown, all may be here."""
    return max(1, len(os.sched_getaffinity(0)) // (world.local_size or world.size))


def keep_freed_memory() -> None:
    """Let glibc keep what tensors free: given back and asked for again, as by default, every page is zeroed anew.

    A step of the demo spent a third of its time on that. MALLOC_* variables and GLIBC_TUNABLES go first.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def quiet_accelerator_search() -> None:
    """Tell DeepSpeed that it is to use the CPU; it warns, when it is imported, where it has to find out."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def use_own_tools() -> None:
    """Let DeepSpeed compile with this environment's `ninja`, and keep what it compiles in this environment.

    Where two environments share a folder, or a CPU and a GPU of one, each start compiles anew what the other has left.
    TORCH_EXTENSIONS_DIR goes first; an environment that cannot be written to leaves torch its own folder.
    """
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *(path for path in paths if path != own)])
    if not os.environ.get("TORCH_EXTENSIONS_DIR") and os.access(sys.prefix, os.W_OK):
        kind = "cuda" if uses_cuda() else "cpu"
        os.environ["TORCH_EXTENSIONS_DIR"] = str(Path(sys.prefix) / "torch_extensions" / kind)


def compiled_operators_folder() -> Path:
    """Where torch keeps the operators that it compiles, once `use_own_tools` has been called."""
    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(own)
    from torch.utils.cpp_extension import get_default_build_root

    return Path(get_default_build_root())


def is_compiled(operator: str) -> bool:
    """Whether an operator, such as fused_adam, is compiled for this environment: by torch, or with DeepSpeed itself."""
    return compiled_operator(operator) is not None or _came_with_deepspeed(operator)


def compiled_operator(operator: str) -> Path | None:
    """The file that torch has compiled an operator to, or None."""
    folder, file = compiled_operators_folder(), Path(operator, f"{operator}.so")
    if (folder / file).is_file():
        return folder / file
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return None
    return next(folder.glob(f"py{sys.version_info.major}{sys.version_info.minor}*/{file}"), None)


def _came_with_deepspeed(operator: str) -> bool:
    """Whether DeepSpeed was installed with it (DS_BUILD_OPS=1) and will load it, as its git_version_info says.

    The file is read by itself: importing DeepSpeed takes seconds, and is_compiled is asked before.
    """
    found = importlib.util.find_spec("deepspeed")
    file = Path(found.origin).with_name("git_version_info_installed.py") if found and found.origin else None
    if not file or not file.is_file():
        return False
    facts = runpy.run_path(str(file))
    same_device = facts.get("accelerator_name") == ("cuda" if uses_cuda() else "cpu")
    return same_device and bool(facts.get("installed_ops", {}).get(operator))


def find_compiler() -> str | None:
    """The path of what DeepSpeed's operators are compiled with: c++; for a GPU nvcc, in CUDA_HOME as torch finds it."""
    if not uses_cuda():
        return shutil.which("c++")
    from torch.utils.cpp_extension import CUDA_HOME

    return (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin"))) or shutil.which("nvcc")


def wait_for_compiler(operator: str) -> None:
    """Wait while another process compiles an operator; a lock that a killed one has left would be waited for for ever.

    Raises:
        LaunchError: the lock is older than any compilation takes.
    """
    folders = [compiled_operators_folder() / operator, *compiled_operators_folder().glob(f"*/{operator}")]
    told = False
    while locks := [folder / "lock" for folder in folders if (folder / "lock").exists()]:
        try:
            age = time.time() - locks[0].stat().st_mtime
        except FileNotFoundError:
            continue
        if age > _COMPILATION_TAKES_AT_MOST_SECONDS:
            raise LaunchError(
                f"{locks[0]} says that a process compiles {operator}, but it is {age / 60:.0f} minutes old: that "
                "process was killed. Remove the file and start again."
            )
        if not told:
            _log.warning(
                "another process compiles %s: waiting for it. If none does, one was killed in it: remove %s",
                operator,
                locks[0],
            )
            told = True
        time.sleep(0.5)
