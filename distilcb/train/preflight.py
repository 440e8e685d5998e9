"""What is checked at every start, in seconds, before hours are spent: that the ranks are alike, that they add up, that
they see one run folder, and that its disk has room."""

import logging
import os
import platform
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash

from distilcb.command_line import CommandLine
from distilcb.config import to_plain
from distilcb.distributed import all_reduce_sum, barrier, device, gather_objects, on_main
from distilcb.errors import CheckpointError, LaunchError
from distilcb.launcher import World
from distilcb.machine import uses_cuda

log = logging.getLogger(__name__)

# Weights in the run's precision and in fp32, two moments.
_BYTES_A_PARAMETER = 4 + 4 + 4 + 4
_GIB = 2**30
# Directories of network file systems are looked up anew within about as long.
_SEEN_WITHIN_SECONDS = 5.0


def preflight(
    world: World,
    command: CommandLine,
    settings: dict[str, Any],
    *,
    beside: Sequence[CommandLine] = (),
    reads_only: bool = False,
) -> int:
    """Check the ranks against each other; returns the number of machines. Every rank must call it.

    Args:
        settings: DeepSpeed's.
        beside: those of the other students that this start trains.
        reads_only: write nothing into a run folder that is there.

    Raises:
        LaunchError: with every fault found, on every rank.
    """
    started = time.perf_counter()
    ranks = gather_objects(_facts([command, *beside], settings))
    hosts = Counter(facts["host"] for facts in ranks)
    faults = [*disagreements(ranks), *layout_faults(world, hosts, ranks[0]["gpus"])]
    if wrong := wrong_sums(world):
        faults.append(wrong)
    if len(hosts) > 1 and not faults:
        names = [facts["host"] for facts in ranks]
        for run_dir in [each.run_dir for each in (command, *beside)]:
            is_run = reads_only and on_main((run_dir / "config.yaml").is_file)
            faults += _unlike(run_dir, names) if is_run else _unseen(run_dir, names)
    if faults:
        raise LaunchError("\n  ".join(["the ranks of this start do not go together:", *faults]))
    devices = Counter(facts["device"] for facts in ranks)
    if len(devices) > 1 and world.is_main:
        log.warning("devices differ (%s): the slowest sets the pace", ", ".join(sorted(devices)))
    if os.environ.get("SLURM_GPUS_ON_NODE") and not uses_cuda() and world.is_main:
        log.warning("Slurm gave GPUs to this job, but torch %s uses none: training on the CPU", torch.__version__)
    if world.size > 1:
        log.info(
            "preflight: %d ranks on %d machine(s) agree (%.1f s)",
            *(world.size, len(hosts), time.perf_counter() - started),
        )
    return len(hosts)


def disagreements(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each fact in which ranks differ, naming the odd ones out.

    Args:
        ranks: each rank's host, and under "same" what must be the same on all.
    """
    lines = []
    for name in ranks[0]["same"]:
        values = [facts["same"].get(name) for facts in ranks]
        usual, count = Counter(values).most_common(1)[0]
        if count == len(ranks):
            continue
        if count * 2 <= len(ranks):
            usual = values[0]
        odd = [f"rank {rank} on {ranks[rank]['host']} ({value})" for rank, value in enumerate(values) if value != usual]
        more = f" and {len(odd) - 4} more" if len(odd) > 4 else ""
        lines.append(f"{name} is {usual}, but not on {', '.join(odd[:4])}{more}")
    return lines


def layout_faults(world: World, hosts: Mapping[str, int], gpus: str) -> list[str]:
    """What is wrong with how many ranks each machine has.

    Args:
        gpus: of a node, as Slurm says to rank zero; the same on every rank, so that all find the same.
    """
    if len(set(hosts.values())) > 1:
        counts = ", ".join(f"{host} {count}" for host, count in sorted(hosts.items())[:8])
        return [f"machines have different numbers of ranks ({counts}): ask for --nodes=N --ntasks-per-node=M"]
    per_host = next(iter(hosts.values()))
    if world.source == "srun" and gpus.isdecimal() and int(gpus) > per_host:
        return [
            f"{per_host} task(s) and {gpus} GPUs a node: {int(gpus) - per_host} of them would idle. Ask for one task a "
            f"GPU: --ntasks-per-node={gpus} --gres=gpu:{gpus}, or both {per_host}"
        ]
    return []


def check_free_disk(*run_dirs: Path, parameters: int, keep: int) -> None:
    """See that the disk of a run folder, or of several beside each other, has room for checkpoints. For rank zero.

    A quota cannot be seen from here.

    Args:
        parameters: of the student, or of all together.
        keep: checkpoints that stay; one more is there while it is written.

    Raises:
        CheckpointError: not even for one.
    """
    one = parameters * _BYTES_A_PARAMETER
    free = shutil.disk_usage(nearest_folder(run_dirs[0])).free
    files = (path for run_dir in run_dirs for path in run_dir.rglob("*"))  # of a folder that is not there none
    held = sum(path.stat().st_size for path in files if path.is_file())
    where = ", ".join(map(str, run_dirs))
    if free < one:
        raise CheckpointError(
            f"{where}: {free / _GIB:.2f} GiB are free on its disk, and one checkpoint of {parameters:,} parameters "
            f"needs {one / _GIB:.2f}. Free some, or give a --run_dir elsewhere."
        )
    if free + held < one * (keep + 1):
        log.warning(
            "%s: %.1f GiB are free, and %d checkpoints need %.1f: free some, or lower train.keep_checkpoints",
            *(where, free / _GIB, keep + 1, one * (keep + 1) / _GIB),
        )


def versions() -> dict[str, str]:
    """What must be the same on all ranks, whatever they are to do."""
    import deepspeed
    import transformers

    import distilcb

    return {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "distilcb": distilcb.__version__,
        "the kind of device": device().type,
    }


def device_name() -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device()) if uses_cuda() else "CPU"


def _facts(commands: Sequence[CommandLine], settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "host": platform.node(),
        "device": device_name(),
        "gpus": os.environ.get("SLURM_GPUS_ON_NODE", ""),
        "same": {
            **versions(),
            "the resolved recipe": ", ".join(_digest(to_plain(command.config)) for command in commands),
            "the DeepSpeed file": _digest(settings),
            "the run folder": ", ".join(str(command.run_dir) for command in commands),
        },
    }


def _digest(settings: dict[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(repr(settings).encode())


def wrong_sums(world: World) -> str | None:
    """Sum small whole numbers over all ranks: any order of adding gives the exact sum."""
    numbers = torch.arange(1, 4097, dtype=torch.float32, device=device()) % 64
    total = all_reduce_sum(numbers * (world.rank % 64))
    expected = numbers * sum(rank % 64 for rank in range(world.size))
    wrong = int((total != expected).sum())
    found = sorted(rank for rank, bad in enumerate(gather_objects(wrong)) if bad)
    if not found:
        return None
    return (
        f"a sum over ranks is wrong on rank {', '.join(map(str, found[:8]))}: the network or its library corrupts data"
    )


def blind_hosts(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Machines that do not see a file that rank zero writes to a folder. Every rank must call it.

    Args:
        hosts: each rank's.
    """
    beacon = folder / on_main(lambda: f".distilcb_{uuid.uuid4().hex}")
    written = on_main(lambda: _touch(beacon))
    seen = gather_objects(_appears(beacon)) if written else [True] * len(hosts)
    barrier()
    on_main(lambda: beacon.unlink(missing_ok=True))
    return sorted({host for host, sees in zip(hosts, seen, strict=True) if not sees})


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    return next(each for each in (path, *path.parents) if each.is_dir())


def _unseen(run_dir: Path, hosts: list[str]) -> list[str]:
    folder = on_main(lambda: nearest_folder(run_dir))
    blind = blind_hosts(folder, hosts)
    if not blind:
        return []
    return [
        f"{run_dir} is not the same folder everywhere: {', '.join(blind[:8])} cannot see what {hosts[0]} writes to "
        f"{folder}. Give a --run_dir on a file system that all nodes share"
    ]


def _unlike(run_dir: Path, hosts: list[str]) -> list[str]:
    """A line where machines do not read rank zero's config.yaml in a run folder."""
    read = gather_objects(_hash_of(run_dir / "config.yaml"))
    blind = sorted({host for host, found in zip(hosts, read, strict=True) if found is None or found != read[0]})
    if not blind:
        return []
    return [
        f"{run_dir} is not the same folder everywhere: {', '.join(blind[:8])} cannot see the run that {hosts[0]} sees "
        "there. Name a run folder on a file system that all nodes share"
    ]


def _hash_of(path: Path) -> str | None:
    try:
        return xxhash.xxh3_64_hexdigest(path.read_bytes())
    except OSError:
        return None


def _touch(path: Path) -> bool:
    """Whether the file could be made; a folder that cannot be written to is told where the run folder is made."""
    try:
        path.touch()
    except OSError:
        return False
    return True


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
