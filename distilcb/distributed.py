"""The ranks of one run: how they meet and part, what they say to each other, and how a command ends on all of them.

torch and deepspeed are imported where they are used: they cost two seconds, and neither `--help` nor
a launch that is refused should wait for them.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from distilcb.errors import LaunchError, TrainingError, UserError
from distilcb.launcher import World, discover, export, says_rank_zero

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Launchers end the other ranks within a second or two of the first that ends.
_RANK_ZERO_SPEAKS_FIRST_SECONDS = 4.0
# As shells do for SIGINT.
_INTERRUPTED = 130
_COMPILATION_TAKES_AT_MOST_SECONDS = 600.0
# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_last_actions: list[Callable[[], None]] = []

_log = logging.getLogger("distilcb")


def start(*, use_mpi: bool = False, timeout_minutes: float = 30) -> World:
    """This process's place among the ranks, once all of them have met.

    Selects the CUDA device, or sizes torch's CPU threads where there is none, and starts DeepSpeed's
    communication (NCCL on CUDA, gloo on CPU) unless torch.distributed is already running.

    Args:
        use_mpi: ask mpi4py for the ranks, rather than the variables of the launcher.
        timeout_minutes: how long a rank waits for the others, here and in later collectives.

    Raises:
        LaunchError: as for `discover`; also too few CUDA devices, or a port that is taken.
    """
    world = discover(use_mpi=use_mpi)
    export(world, os.environ)
    use_own_tools()
    if uses_cuda():
        _select_cuda_device(world)
    else:
        _size_cpu_threads(world)
        _keep_freed_memory()
        _quiet_accelerator_search()
    if _process_group() is None:
        _meet(world, timeout=timedelta(minutes=timeout_minutes))
    return world


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
    """Whether torch has compiled an operator, such as fused_adam, for this environment."""
    folder = compiled_operators_folder()
    if os.environ.get("TORCH_EXTENSIONS_DIR"):
        return (folder / operator / f"{operator}.so").is_file()
    return any(folder.glob(f"py{sys.version_info.major}{sys.version_info.minor}*/{operator}/{operator}.so"))


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
            _log.info("another process compiles %s: waiting for it (%s)", operator, locks[0])
            told = True
        time.sleep(0.5)


def stop() -> None:
    """Leave the other ranks; does nothing where `start` was not called.

    For good: a second `start` under torchrun would find the addresses of the first in the launcher's store.
    """
    if group := _process_group():
        group.destroy_process_group()


def device() -> torch.device:
    """The device of this rank: its CUDA device once `start` has selected it, or the CPU."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if uses_cuda() else torch.device("cpu")


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, summed over all ranks in place; it must lie on `device()` and have one shape everywhere."""
    if group := _process_group_of_several():
        group.all_reduce(tensor)
    return tensor


def broadcast_object(obj: Any) -> Any:
    """What rank zero passes, on every rank; it must pickle. What other ranks pass is ignored."""
    if group := _process_group_of_several():
        box = [obj]
        group.broadcast_object_list(box, src=0)
        return box[0]
    return obj


def barrier() -> None:
    """Wait until every rank is here."""
    if group := _process_group_of_several():
        group.barrier()


def is_main_process() -> bool:
    """Whether this is rank zero; before `start`, as far as the launcher's variables tell without an error.

    Before `start` because a fault in the configuration, found before ranks meet, is to be printed once.
    """
    if group := _process_group():
        return bool(group.get_rank() == 0)
    return says_rank_zero(os.environ)


def configure_logging(world: World) -> None:
    """Let rank zero say INFO and above on stderr, in plain lines; the others only warnings, with their rank.

    For the logger "distilcb" and those below it. DeepSpeed, transformers and datasets keep their warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name("distilcb stderr")
    handler.setFormatter(logging.Formatter("%(message)s" if world.is_main else f"[rank {world.rank}] %(message)s"))
    for earlier in [each for each in _log.handlers if each.name == handler.name]:
        _log.removeHandler(earlier)
    _log.addHandler(handler)
    _log.setLevel(logging.INFO if world.is_main else logging.WARNING)
    # A library that configures the root logger (absl, through TensorBoard) would print each line again.
    _log.propagate = False
    for library in ("DeepSpeed", "transformers", "datasets"):
        logging.getLogger(library).setLevel(logging.WARNING)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one a model, for the second that its weights take
    if not uses_cuda():
        _quiet_accelerator_search()


def _process_group() -> Any:
    """torch.distributed where it is running, else None. Loads no torch: what is not loaded does not run."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def _process_group_of_several() -> Any:
    """torch.distributed where there is another rank to talk to, else None."""
    group = _process_group()
    return group if group and group.get_world_size() > 1 else None


def uses_cuda() -> bool:
    """Whether ranks have a GPU each. DS_ACCELERATOR=cpu leaves GPUs alone, as it does for DeepSpeed."""
    import torch

    return os.environ.get("DS_ACCELERATOR", "cuda") == "cuda" and torch.cuda.is_available()


def _select_cuda_device(world: World) -> None:
    import torch

    devices = torch.cuda.device_count()
    if world.local_rank >= devices or world.local_size > devices:  # all ranks of the machine fail alike
        raise LaunchError(
            f"rank {world.rank} has local rank {world.local_rank} but sees {devices} CUDA device(s). Start "
            "one task per GPU, and let each see all GPUs of its machine: --ntasks-per-node=4 and "
            "--gres=gpu:4, without --gpus-per-task, --gpu-bind or a CUDA_VISIBLE_DEVICES of fewer."
        )
    torch.cuda.set_device(world.local_rank)


def _size_cpu_threads(world: World) -> None:
    """Divide the cores among the ranks of this machine: left alone, each takes them all."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        # Where the local size is unknown, all ranks may be here.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (world.local_size or world.size)))


def _keep_freed_memory() -> None:
    """Let glibc keep what tensors free: given back and asked for again, as by default, every page is zeroed anew.

    A step of the demo spent a third of its time on that. MALLOC_* variables and GLIBC_TUNABLES go first.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt") or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _quiet_accelerator_search() -> None:
    """Tell DeepSpeed that it is to use the CPU; it warns, when it is imported, where it has to find out."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _meet(world: World, *, timeout: timedelta) -> None:
    import deepspeed
    import torch

    backend = "nccl" if uses_cuda() else "gloo"
    if backend == "gloo":
        wait_for_compiler("deepspeed_shm_comm")
    if backend == "gloo" and not is_compiled("deepspeed_shm_comm"):
        _log.info("DeepSpeed compiles an operator, as it does at its first start on a machine: about a minute")
    if backend == "gloo" and not is_compiled("deepspeed_shm_comm") and shutil.which("c++") is None:
        _log.warning("no C++ compiler: ranks on one machine go without DeepSpeed's shared memory, which is slower")
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            # It would put its own port and address in the place of ours, and under srun --mpi=none make every
            # rank a world of one.
            auto_mpi_discovery=False,
            timeout=timeout,
            verbose=False,
        )
    except torch.distributed.DistNetworkError as error:
        if world.is_main and "EADDRINUSE" in str(error):
            raise LaunchError(
                f"port {world.master_port} of {world.master_addr} is taken, perhaps by another run. Set "
                "MASTER_PORT to a free one, the same for every rank; with deepspeed, --master_port N before the script."
            ) from error
        raise


def on_main(action: Callable[[], T]) -> T:
    """What `action` gives on rank zero, on every rank; a UserError there is raised on every rank.

    The others wait meanwhile. Of any other exception they hear no more than that rank zero failed.
    """
    if _process_group_of_several() is None:
        return action()
    result: Any = None
    fault: BaseException | None = None
    if is_main_process():
        try:
            result = action()
        except Exception as error:
            fault = error
    told = fault
    if fault is not None and not isinstance(fault, UserError):
        told = RuntimeError(f"rank 0 failed: {fault!r}")
    result, told = broadcast_object((result, told))
    if fault is not None:
        raise fault
    if told is not None:
        raise told
    return result


def exit_code(main: Callable[[list[str]], None]) -> int:
    """Run a command's `main` on the words after its name: 0, 2 after a user's mistake, 1 where training failed,
    130 where the user interrupted it.

    Rank zero prints the message, without a traceback. A mistake that only another rank meets is printed there, once
    rank zero has had time to end the job with the same one. Where there are several ranks the process ends here:
    leaving the group in good order would wait for ranks that may not come.
    """
    # Threads that wait should sleep: beside any other work, spinning ones make a step on a CPU ten times slower. Read
    # when torch is loaded, which comes later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        if is_main_process():
            print(
                "\ninterrupted: what was saved stays, the same command goes on from there", file=sys.stderr, flush=True
            )
        _end_at_once_among_ranks(_INTERRUPTED)
        return _INTERRUPTED
    except (UserError, TrainingError) as error:
        code = 2 if isinstance(error, UserError) else 1
        prefix = ""
        if not is_main_process():
            time.sleep(_RANK_ZERO_SPEAKS_FIRST_SECONDS)
            prefix = f"[rank {os.environ.get('RANK', '?')}] "
        if not prefix or isinstance(error, UserError):
            print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _end_at_once_among_ranks(code)
        return code
    return 0


def at_exit(action: Callable[[], None]) -> None:
    """Do this when the process ends, also where ranks end at once."""
    atexit.register(action)
    _last_actions.append(action)


def _end_at_once_among_ranks(code: int) -> None:
    if _process_group_of_several() is not None:
        for action in _last_actions:
            action()
        sys.stdout.flush()
        os._exit(code)
