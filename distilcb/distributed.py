"""The ranks of one run: how they meet and part, what they say to each other, and how a command ends on all of them.

torch and deepspeed are imported where they are used: they cost two seconds, and neither `--help` nor
a launch that is refused should wait for them.
"""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from distilcb.errors import LaunchError, RankZeroLostError, TrainingError, UserError, first_line
from distilcb.launcher import World, discover, export, is_task_of_several, says_rank_zero
from distilcb.machine import (
    is_compiled,
    keep_freed_memory,
    quiet_accelerator_search,
    select_cuda_device,
    size_cpu_threads,
    use_own_tools,
    uses_cuda,
    wait_for_compiler,
)

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Launchers end the other ranks within a second or two of the first that ends.
_RANK_ZERO_SPEAKS_FIRST_SECONDS = 4.0
# As shells do for SIGINT.
_INTERRUPTED = 130
_INTERRUPTED_MESSAGE = "\ninterrupted: what was saved stays, the same command goes on from there"
_INTERRUPTED_ENDS_WITHIN_SECONDS = 10.0

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
        select_cuda_device(world)
    else:
        size_cpu_threads(world)
        keep_freed_memory()
        quiet_accelerator_search()
    if _process_group() is None:
        if is_task_of_several(os.environ):
            # While torch waits for the others no handler of Python's runs, so srun could not end this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _meet(world, timeout=timedelta(minutes=timeout_minutes))
    return world


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


def gather_objects(obj: Any) -> list[Any]:
    """What each rank passes, in the order of ranks, on every rank; it must pickle."""
    if group := _process_group_of_several():
        found = [None] * group.get_world_size()
        group.all_gather_object(found, obj)
        return found
    return [obj]


def open_store(world: World, *, timeout_seconds: float) -> Any:
    """A connection of one's own to the key-value store on which the ranks met: nothing that waits there delays it.

    Args:
        timeout_seconds: how long an answer may take.
    """
    from torch.distributed import HashStore, PrefixStore, TCPStore

    if world.size == 1:
        return HashStore()
    patience = timedelta(seconds=timeout_seconds)
    # Under torchrun the store outlives the ranks; those that it starts again find nothing of the first ones.
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"distilcb/{restart}", TCPStore(world.master_addr, world.master_port, timeout=patience))


def barrier() -> None:
    """Wait until every rank is here."""
    if group := _process_group_of_several():
        group.barrier()


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another rank did not answer."""
    import torch

    lost = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in lost)


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
    # DeepSpeed calls what torch 2.13 has given another name, and torch says so on every rank.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*deprecated", category=FutureWarning)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one a model, for the second that its weights take
    if not uses_cuda():
        quiet_accelerator_search()


def _process_group() -> Any:
    """torch.distributed where it is running, else None. Loads no torch: what is not loaded does not run."""
    distributed = sys.modules.get("torch.distributed")
    return distributed if distributed and distributed.is_available() and distributed.is_initialized() else None


def _process_group_of_several() -> Any:
    """torch.distributed where there is another rank to talk to, else None."""
    group = _process_group()
    return group if group and group.get_world_size() > 1 else None


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
    # Where a rank is lost, torch prints a page of C++ frames beside our line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if is_task_of_several(os.environ):
        # Where one has failed, srun ends the others, of which some have not come as far as to find the same fault. It
        # reports the largest exit code, and that of SIGTERM would hide what the first one said. Until ranks meet.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        if is_main_process():
            print(_INTERRUPTED_MESSAGE, file=sys.stderr, flush=True)
        _end_at_once_among_ranks(_INTERRUPTED)
        return _INTERRUPTED
    except (UserError, TrainingError) as error:
        return _tell_and_end(error)
    except RuntimeError as error:
        if not is_lost_connection(error):
            _show_and_end_among_ranks()
            raise
        return _tell_and_end(TrainingError(f"another rank is gone, which may say why ({first_line(error)})."))
    except Exception:
        _show_and_end_among_ranks()
        raise
    _end_without_finalizing()
    return 0


def _interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt, and see to it that the process ends.

    Python raises it anywhere, between taking a lock and the code that gives it back too: whoever wants that lock while
    things are put in order, such as the queue of a TensorBoard writer that is closed, would wait for ever.
    """
    ending = threading.Timer(_INTERRUPTED_ENDS_WITHIN_SECONDS, _end_interrupted)
    ending.daemon = True
    ending.start()
    raise KeyboardInterrupt


def _end_interrupted() -> None:
    if is_main_process():
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{_INTERRUPTED_MESSAGE}\n".encode())
    os._exit(_INTERRUPTED)


def _show_and_end_among_ranks() -> None:
    """A fault of ours: Python's own end could wait for the other ranks in collectives that no longer come."""
    if _process_group_of_several() is not None:
        traceback.print_exc()
        _end_at_once_among_ranks(1)


def _tell_and_end(error: Exception) -> int:
    code = 2 if isinstance(error, UserError) else 1
    prefix = ""
    rank = os.environ.get("RANK", "?")
    # Rank 1, and where it went with rank 0's machine the first rank of the next one.
    if isinstance(error, RankZeroLostError) and rank in ("1", os.environ.get("LOCAL_WORLD_SIZE")):
        print(f"[rank {rank}] TrainingError: {error}", file=sys.stderr, flush=True)
    if not is_main_process():
        # Launchers end the others with SIGTERM once rank zero has failed, and srun reports the largest exit code.
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(_RANK_ZERO_SPEAKS_FIRST_SECONDS)
        prefix = f"[rank {rank}] "
    if not prefix or isinstance(error, UserError):
        print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    _end_at_once_among_ranks(code)
    return code


def _end_without_finalizing() -> None:
    """End one of several ranks once all is done: gloo's threads now and then abort a process that Python tears down."""
    if int(os.environ.get("WORLD_SIZE") or 1) == 1 or "torch" not in sys.modules:
        return
    logging.shutdown()
    atexit._run_exitfuncs()
    if (mpi := sys.modules.get("mpi4py.MPI")) and not mpi.Is_finalized():
        mpi.Finalize()  # mpirun calls it a failure to end without
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


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
