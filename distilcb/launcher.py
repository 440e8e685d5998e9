"""Who this process is among the ranks, whoever started it: torchrun, deepspeed, srun, mpirun or nobody.

mpi4py is imported where it is used: importing it starts MPI.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from distilcb.errors import LaunchError

LOOPBACK = "127.0.0.1"
# Below the ephemeral range (32768 and up), where the kernel may have given a port away already.
SLURM_FIRST_PORT = 10_000
SLURM_PORT_COUNT = 20_000
# Several ranks outside Slurm, and nothing that they share to make a port from.
DEFAULT_PORT = 29_500
# Slurm numbers its own steps (batch shell, interactive, extern) from here up.
FIRST_RESERVED_STEP_ID = 0xFFFF_FFF0


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


def says_rank_zero(environ: Mapping[str, str]) -> bool:
    """Whether this is rank zero, as far as the launcher's variables tell without an error."""
    names = [_LAUNCHER.rank, *(launcher.rank for launcher in _MPI_LAUNCHERS)]
    if _step_id(environ) is not None:
        names.append("SLURM_PROCID")
    return next((environ[name] for name in names if environ.get(name)), "0") == "0"


def has_agent(environ: Mapping[str, str]) -> bool:
    """Whether torchrun's agent listens on the port where ranks meet, and not rank zero."""
    return environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def is_started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether mpirun or mpiexec started this process."""
    return any(_all_set(environ, each) for each in _MPI_LAUNCHERS) and not _all_set(environ, _LAUNCHER)


def is_later_slice(environ: Mapping[str, str]) -> bool:
    """Whether this Slurm job goes on with what it began: requeued, or not the first of a job array."""
    restarts = _number(environ, "SLURM_RESTART_COUNT", default=0)
    first = _number(environ, "SLURM_ARRAY_TASK_MIN", default=0)
    return restarts > 0 or _number(environ, "SLURM_ARRAY_TASK_ID", default=first) > first


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """The number of this Slurm job, the same for all slices of a job array; None outside one."""
    return environ.get("SLURM_ARRAY_JOB_ID") or environ.get("SLURM_JOB_ID") or None


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
        master_port=free_port() if size == 1 and not has_agent(environ) else _port(environ, size=size),
    )


def _from_mpi(environ: Mapping[str, str]) -> World:
    """What MPI itself says. Every rank must come here: they talk."""
    _refuse_unreached_mpi(environ)
    mpi = _import_mpi()
    comm = mpi.COMM_WORLD
    _refuse_lone_mpi(environ, size=comm.size, library=mpi.Get_library_version())
    node = comm.Split_type(mpi.COMM_TYPE_SHARED)
    if comm.rank == 0:
        address = environ.get("MASTER_ADDR") or (LOOPBACK if node.size == comm.size else _own_address())
        meeting_point = address, _shared_port(environ, step=_step_id(environ) or 0) or free_port()
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
    port = _number(environ, "MASTER_PORT", default=0) or free_port()
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
    if in_srun:
        raise _unreached(f"mpi4py's MPI ({library}) sees 1 process", expected)
    raise LaunchError(
        f"mpi4py's MPI ({library}) sees 1 process, but {by_mpirun}={expected}: it is not the MPI whose "
        "mpirun started this. Install mpi4py against that one, or leave mpi4py out (use_mpi=false)."
    )


def _refuse_unreached_mpi(environ: Mapping[str, str]) -> None:
    """Raise where srun has left nothing that an MPI could find its ranks by: some libraries then abort the process."""
    tasks = _number(environ, "SLURM_STEP_NUM_TASKS", default=1)
    by_mpirun = any(environ.get(each.size) for each in _MPI_LAUNCHERS)
    if _step_id(environ) is None or tasks == 1 or by_mpirun:
        return
    if not any(name.startswith(("PMIX_", "PMI_", "PMI2_")) for name in environ):
        raise _unreached("srun tells MPI nothing of the ranks", tasks)


def _unreached(what: str, tasks: int) -> LaunchError:
    return LaunchError(
        f"{what}, but Slurm started {tasks}: they do not speak the same protocol. Use srun --mpi=pmix (Open MPI) or "
        "--mpi=pmi2 (MPICH, Intel MPI), or leave mpi4py out (use_mpi=false)."
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
    return _shared_port(environ, step=step) or (free_port() if size == 1 else DEFAULT_PORT)


def _shared_port(environ: Mapping[str, str], *, step: int) -> int | None:
    """MASTER_PORT, or inside Slurm one that differs between jobs, steps and restarts on the same node."""
    if environ.get("MASTER_PORT"):
        return _number(environ, "MASTER_PORT")
    job = _number(environ, "SLURM_JOB_ID", default=0)
    restarts = _number(environ, "SLURM_RESTART_COUNT", default=0)
    # Times 7, so that the steps and restarts of one job keep off the next job's ports for a while.
    return SLURM_FIRST_PORT + (job * 7 + step + restarts) % SLURM_PORT_COUNT if job else None


def free_port() -> int:
    """A port of this machine on which nobody listens yet."""
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
