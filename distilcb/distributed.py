"""Who this process is among the ranks, whoever started it, and the few things that ranks say to each other.

torch, deepspeed and mpi4py are imported where they are used: they cost two seconds, and neither `--help` nor
a launch that is refused should wait for them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from distilcb.errors import LaunchError, TrainingError, UserError

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
# Launchers end the other ranks within a second or two of the first that ends.
_RANK_ZERO_SPEAKS_FIRST_SECONDS = 4.0
# Below the ephemeral range (32768 and up), where the kernel may have given a port away already.
SLURM_FIRST_PORT = 10_000
SLURM_PORT_COUNT = 20_000
# Several ranks outside Slurm, and nothing that they share to make a port from.
DEFAULT_PORT = 29_500
# Slurm numbers its own steps (batch shell, interactive, extern) from here up.
FIRST_RESERVED_STEP_ID = 0xFFFF_FFF0

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4

_log = logging.getLogger("distilcb")


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and where they meet.

    Attributes:
        source: who told: "env" (torchrun, deepspeed), "mpi" (mpi4py), "openmpi", "mvapich", "hydra" (the
            variables of an MPI launcher), "srun", or "single" (one process that nobody launched).
        rank: 0 to size - 1.
        size: the number of processes on all machines.
        local_rank: this process's number on its machine; also its CUDA device.
        local_size: the number of processes on this machine; 0 when unknown.
        master_addr: host name or address of the machine of rank 0.
        master_port: the port on which rank 0 listens.
    """

    source: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that logs and writes."""
        return self.rank == 0

    @property
    def is_local_main(self) -> bool:
        """Whether this is the first rank of its machine."""
        return self.local_rank == 0


class _RankVariables(NamedTuple):
    """Where a launcher writes who a process is."""

    source: str
    rank: str
    size: str
    local_rank: str
    local_size: str


_LAUNCHER = _RankVariables("env", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_MPI_LAUNCHERS = (
    _RankVariables(
        "openmpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _RankVariables(
        "mvapich",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    # MPICH and Intel MPI. srun --mpi=pmi2 writes the PMI_ names too, but not the MPI_ ones: srun's own case.
    _RankVariables("hydra", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def discover(environ: Mapping[str, str] = os.environ, *, use_mpi: bool = False) -> World:
    """This process's place among the ranks, from whoever launched it.

    Asked in this order: torchrun or deepspeed; MPI itself, with `use_mpi`; the variables of mpirun and
    mpiexec; srun; and otherwise it is a single process. With `use_mpi` all ranks must call this: they talk.

    Raises:
        LaunchError: the environment contradicts itself, or it says that there are other ranks without saying
            which one this is.
    """
    world = (
        _from_launcher(environ)
        or (_from_mpi(environ) if use_mpi else None)
        # Before srun: under mpirun inside a Slurm job, all ranks of a node inherit one SLURM_PROCID.
        or _from_mpi_variables(environ)
        or _from_srun(environ)
        or _single(environ)
    )
    return _checked(world)


def export(world: World, environ: MutableMapping[str, str]) -> None:
    """Write `world` where torch and DeepSpeed look for it.

    All five variables, always: where one is missing, DeepSpeed's own MPI discovery overwrites the others.
    """
    environ["RANK"] = str(world.rank)
    environ["WORLD_SIZE"] = str(world.size)
    environ["LOCAL_RANK"] = str(world.local_rank)
    environ["MASTER_ADDR"] = world.master_addr
    environ["MASTER_PORT"] = str(world.master_port)
    if world.local_size:
        environ["LOCAL_WORLD_SIZE"] = str(world.local_size)
    # DeepSpeed's launcher sets it, and on CPU DeepSpeed then keeps 66 MiB a rank in /dev/shm for each address and
    # port, after clean exits too.
    environ.pop("LOCAL_SIZE", None)


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
    """Put this Python's folder first on PATH: DeepSpeed compiles with the `ninja` it finds there.

    Without it an environment that is not activated has none, or another one, for which all is compiled again.
    """
    own = str(Path(sys.executable).parent)
    paths = os.environ.get("PATH", os.defpath).split(os.pathsep)
    if paths[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, *(path for path in paths if path != own)])


def compiled_operators_folder() -> Path:
    """Where torch keeps the operators that it compiles."""
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")


def is_compiled(operator: str) -> bool:
    """Whether torch has compiled an operator, such as fused_adam, for this Python."""
    folder = compiled_operators_folder()
    if not os.environ.get("TORCH_EXTENSIONS_DIR"):  # torch keeps Pythons apart only in its own folder
        folders = folder.glob(f"py{sys.version_info.major}{sys.version_info.minor}*")
        return any((each / operator / f"{operator}.so").is_file() for each in folders)
    return (folder / operator / f"{operator}.so").is_file()


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
    names = [_LAUNCHER.rank, *(launcher.rank for launcher in _MPI_LAUNCHERS)]
    if _step_id(os.environ) is not None:
        names.append("SLURM_PROCID")
    return next((os.environ[name] for name in names if os.environ.get(name)), "0") == "0"


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
    if not uses_cuda():
        _quiet_accelerator_search()


def _from_launcher(environ: Mapping[str, str]) -> World | None:
    """torchrun, deepspeed, or a script that sets their variables."""
    if not _all_set(environ, _LAUNCHER):
        return None
    size = _number(environ, "WORLD_SIZE")
    if size > 1 and not environ.get("MASTER_ADDR"):
        raise LaunchError(
            f"RANK, LOCAL_RANK and WORLD_SIZE={size} are set but MASTER_ADDR is not: no place to meet. "
            "Set it to the host of rank 0 (torchrun and deepspeed do), or unset those and start with srun."
        )
    return World(
        source=_LAUNCHER.source,
        rank=_number(environ, "RANK"),
        size=size,
        local_rank=_number(environ, "LOCAL_RANK"),
        # deepspeed writes LOCAL_SIZE for torchrun's LOCAL_WORLD_SIZE.
        local_size=_number(environ, "LOCAL_WORLD_SIZE", default=0) or _number(environ, "LOCAL_SIZE", default=0),
        master_addr=environ.get("MASTER_ADDR") or LOOPBACK,
        # deepspeed always says 29500, so that two runs on one machine would collide; torchrun's agent listens on its.
        master_port=_free_port() if size == 1 and not _has_agent(environ) else _port(environ, size=size),
    )


def _has_agent(environ: Mapping[str, str]) -> bool:
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _from_mpi(environ: Mapping[str, str]) -> World:
    """What MPI itself says. Every rank must come here: they talk."""
    mpi = _import_mpi()
    comm = mpi.COMM_WORLD
    _refuse_lone_mpi(environ, size=comm.size, library=mpi.Get_library_version())
    node = comm.Split_type(mpi.COMM_TYPE_SHARED)
    if comm.rank == 0:
        address = environ.get("MASTER_ADDR") or (LOOPBACK if node.size == comm.size else _own_address())
        meeting_point = address, _shared_port(environ, step=_step_id(environ) or 0) or _free_port()
    else:
        meeting_point = None
    address, port = comm.bcast(meeting_point, root=0)
    return World("mpi", comm.rank, comm.size, node.rank, node.size, address, port)


def _from_mpi_variables(environ: Mapping[str, str]) -> World | None:
    """mpirun or mpiexec, without mpi4py where that can be."""
    names = next((each for each in _MPI_LAUNCHERS if _all_set(environ, each)), None)
    if names is None:
        return None
    size = _number(environ, names.size)
    local_size = _number(environ, names.local_size, default=0)
    address = environ.get("MASTER_ADDR")
    if not address and local_size == size:
        address = LOOPBACK
    if not address and environ.get("SLURM_JOB_NODELIST"):
        address = _first_host(environ, "SLURM_JOB_NODELIST")
    if not address:
        return _from_mpi(environ)  # several hosts, and nobody has named the first: rank zero has to tell
    return World(
        source=names.source,
        rank=_number(environ, names.rank),
        size=size,
        local_rank=_number(environ, names.local_rank),
        local_size=local_size,
        master_addr=address,
        # Without the step: on other nodes, mpirun's ranks carry its helper's step id, and on the first none.
        master_port=_port(environ, size=size),
    )


def _from_srun(environ: Mapping[str, str]) -> World | None:
    """A task of an srun step. The batch shell has SLURM_PROCID=0 as well, but no step of its own."""
    step = _step_id(environ)
    if step is None or not environ.get("SLURM_PROCID"):
        return None
    # The SLURM_STEP_ variables: a step may be smaller than its job.
    size = _number(environ, "SLURM_STEP_NUM_TASKS")
    return World(
        source="srun",
        rank=_number(environ, "SLURM_PROCID"),
        size=size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_size=_tasks_on_own_node(environ),
        # Never loopback instead: ranks on other nodes would each wait for themselves.
        master_addr=environ.get("MASTER_ADDR") or _first_host(environ, "SLURM_STEP_NODELIST"),
        master_port=_port(environ, size=size, step=step),
    )


def _single(environ: Mapping[str, str]) -> World:
    """One process, after making sure that nothing speaks of others."""
    _refuse_batch_shell(environ)
    _refuse_halves(environ)
    # Not the job's port: single processes may run side by side in one job.
    port = _number(environ, "MASTER_PORT", default=0) or _free_port()
    return World("single", 0, 1, 0, 1, LOOPBACK, port)


def _refuse_lone_mpi(environ: Mapping[str, str], *, size: int, library: str) -> None:
    """Raise where every rank would believe that it is alone, and train its own model."""
    if size > 1:
        return
    by_mpirun = next((each.size for each in _MPI_LAUNCHERS if environ.get(each.size)), None)
    in_srun = _step_id(environ) is not None
    if not by_mpirun and not in_srun:
        _refuse_batch_shell(environ)
        return
    expected = _number(environ, by_mpirun or "SLURM_STEP_NUM_TASKS")
    if expected == 1:
        return
    library = library.partition(",")[0].strip()[:60]
    if not in_srun:
        raise LaunchError(
            f"mpi4py's MPI ({library}) sees 1 process, but {by_mpirun}={expected}: it is not the MPI whose "
            "mpirun started this. Install mpi4py against that one, or leave mpi4py out (use_mpi=false)."
        )
    raise LaunchError(
        f"mpi4py's MPI ({library}) sees 1 process, but Slurm started {expected}: they do not speak the same "
        "protocol. Use srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH, Intel MPI), or leave mpi4py out "
        "(use_mpi=false)."
    )


def _refuse_batch_shell(environ: Mapping[str, str]) -> None:
    """Raise in a Slurm job of several tasks, outside srun: one process would hold all their machines."""
    job = environ.get("SLURM_JOB_ID")
    tasks_per_node = _number(environ, "SLURM_NTASKS_PER_NODE", default=1)
    tasks = _number(environ, "SLURM_NTASKS", default=tasks_per_node * _number(environ, "SLURM_NNODES", default=1))
    if job and tasks > 1:
        raise LaunchError(
            f"Slurm job {job} has {tasks} tasks, but this process was not started by srun and would train "
            "alone. Start it with srun, as slurm/distill.sbatch does, or ask Slurm for one task."
        )


def _refuse_halves(environ: Mapping[str, str]) -> None:
    """Raise where a launcher's variables are there in part and do not say "one process"."""
    for names in (_LAUNCHER, *_MPI_LAUNCHERS):
        needed = (names.rank, names.size, names.local_rank)
        there = [name for name in needed if environ.get(name)]
        if there and environ.get(names.size) != "1":
            missing = [name for name in needed if name not in there]
            raise LaunchError(
                f"{' and '.join(there)} set, but not {' and '.join(missing)}: there may be other ranks, and "
                "which one this is cannot be told. Start with torchrun, deepspeed, srun or mpirun, which set "
                f"all of them; for a single process, unset {' and '.join(there)}."
            )


def _checked(world: World) -> World:
    """`world` itself, where its numbers fit together."""
    faults = []
    if world.rank >= world.size:
        faults.append(f"rank {world.rank} is not below the world size {world.size}")
    if world.local_size and world.local_rank >= world.local_size:
        faults.append(f"local rank {world.local_rank} is not below the local size {world.local_size}")
    if world.local_size > world.size:
        faults.append(f"the local size {world.local_size} is above the world size {world.size}")
    if not 0 < world.master_port < 65_536:
        faults.append(f"port {world.master_port} is not between 1 and 65535")
    if faults:
        raise LaunchError(
            f"the launcher's variables ({world.source}) do not fit together: {'; '.join(faults)}. Some may "
            "be left from another launch: unset RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, LOCAL_SIZE "
            "and MASTER_PORT, and start again."
        )
    return world


def _import_mpi() -> Any:
    """mpi4py.MPI; importing it starts MPI."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there, and libmpi is not
        reason = str(error).partition("\n")[0]
        raise LaunchError(
            f"MPI has to say where rank 0 is, but mpi4py does not load: {reason}. Load your cluster's MPI "
            "module and install mpi4py; or do without it (use_mpi=false): start with srun, or with mpirun "
            "and MASTER_ADDR set to rank 0's host."
        ) from error
    return MPI


def _all_set(environ: Mapping[str, str], names: _RankVariables) -> bool:
    return all(environ.get(name) for name in (names.rank, names.size, names.local_rank))


def _text(environ: Mapping[str, str], name: str) -> str:
    if not environ.get(name):
        raise LaunchError(
            f"{name} is not set, and the ranks cannot be told without it. The launcher sets it: start this "
            "process with srun, mpirun, torchrun or deepspeed, and nothing between that clears variables."
        )
    return environ[name]


def _number(environ: Mapping[str, str], name: str, *, default: int | None = None) -> int:
    """The variable as a whole number from 0 up; an empty one counts as absent."""
    if default is not None and not environ.get(name):
        return default
    text = _text(environ, name)
    if not text.strip().isdecimal():
        raise LaunchError(
            f"{name}={text!r}: a whole number, 0 or more, was needed. Unset it, or set it as launchers do."
        )
    return int(text)


def _step_id(environ: Mapping[str, str]) -> int | None:
    """The number of the srun step that this process belongs to, if it does."""
    text = environ.get("SLURM_STEP_ID", "")
    return int(text) if text.isdecimal() and int(text) < FIRST_RESERVED_STEP_ID else None


def _first_host(environ: Mapping[str, str], name: str) -> str:
    """The first host of a Slurm list: "jz012" of "jz[012-015,020],x1". Containers have no scontrol to ask."""
    nodes = _text(environ, name)
    first = re.match(r"(?:[^\[\],\s]|\[\w[^\[\]]*\])+(?=,|$)", nodes)
    if first is None:
        raise LaunchError(
            f"{name}={nodes!r} is not a list of hosts such as node[01-04]. Set MASTER_ADDR to rank 0's host."
        )
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def _tasks_on_own_node(environ: Mapping[str, str]) -> int:
    """How many tasks the step has here: on node 1, 4 of "4(x2),1"."""
    spec = _text(environ, "SLURM_STEP_TASKS_PER_NODE")
    tasks: list[int] = []
    for part in spec.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise LaunchError(
                f"SLURM_STEP_TASKS_PER_NODE={spec!r}: numbers such as 4(x2),1 were needed. srun sets it: "
                "leave it alone."
            )
        tasks += [int(match[1])] * int(match[2] or 1)
    node = _number(environ, "SLURM_NODEID")
    if node >= len(tasks):
        raise LaunchError(
            f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={spec!r} counts {len(tasks)} nodes. srun "
            "sets both: leave them alone."
        )
    return tasks[node]


def _port(environ: Mapping[str, str], *, size: int, step: int = 0) -> int:
    """A port that all ranks arrive at without talking."""
    return _shared_port(environ, step=step) or (_free_port() if size == 1 else DEFAULT_PORT)


def _shared_port(environ: Mapping[str, str], *, step: int) -> int | None:
    """MASTER_PORT, or inside Slurm one that differs between jobs, steps and restarts on the same node."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    job = _number(environ, "SLURM_JOB_ID", default=0)
    restarts = _number(environ, "SLURM_RESTART_COUNT", default=0)
    # Times 7, so that the steps and restarts of one job keep off the next job's ports for a while.
    return SLURM_FIRST_PORT + (job * 7 + step + restarts) % SLURM_PORT_COUNT if job else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _own_address() -> str:
    """What other machines may call this one."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    # Debian's /etc/hosts gives a machine's own name as 127.0.1.1, which would be somebody else elsewhere.
    return name if address.startswith("127.") else address


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
    """Run a command's `main` on the words after its name: 0, 2 after a user's mistake, 1 where training failed.

    Rank zero prints the message, without a traceback. A mistake that only another rank meets is printed there, once
    rank zero has had time to end the job with the same one. Where there are several ranks the process ends here:
    leaving the group in good order would wait for ranks that may not come.
    """
    # Threads that wait should sleep: beside any other work, spinning ones make a step on a CPU ten times slower. Read
    # when torch is loaded, which comes later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        main(sys.argv[1:])
    except (UserError, TrainingError) as error:
        code = 2 if isinstance(error, UserError) else 1
        prefix = ""
        if not is_main_process():
            time.sleep(_RANK_ZERO_SPEAKS_FIRST_SECONDS)
            prefix = f"[rank {os.environ.get('RANK', '?')}] "
        if not prefix or isinstance(error, UserError):
            print(f"{prefix}{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if _process_group_of_several() is not None:
            sys.stdout.flush()
            os._exit(code)
        return code
    return 0
