"""The doctor's round: describe, measure, measure again what looks wrong, judge, advise."""

import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from distilcb.distributed import (
    configure_logging,
    gather_objects,
    is_lost_connection,
    on_main,
    open_store,
    start,
)
from distilcb.doctor import judgement
from distilcb.doctor.advice import advise, on_gradients
from distilcb.doctor.devices import describe_rank, measure_products
from distilcb.doctor.disk import measure_writes
from distilcb.doctor.judgement import Finding
from distilcb.doctor.links import Groups, measure_links, measure_sums
from distilcb.doctor.report import Report, listed
from distilcb.errors import MachineError, first_line
from distilcb.launcher import World, discover
from distilcb.machine import uses_cuda
from distilcb.train.preflight import blind_hosts, disagreements, layout_faults, nearest_folder, wrong_sums
from distilcb.watchdog import Place, Watchdog, at

log = logging.getLogger(__name__)

_TRIES = 3
_STORE_SECONDS = 60.0
_ON_LOSS = "Look at that machine, or start without it (sbatch --exclude)."

F = TypeVar("F")


def examine(run_dir: Path, *, wait_minutes: float) -> Report:
    """Examine the allocation that this process is a rank of. Every rank must call it.

    Args:
        run_dir: where runs will be written; the nearest folder above it where it is not there yet.
        wait_minutes: how long ranks wait for each other.

    Raises:
        MachineError, TrainingError: a rank does not come, is lost or stands still.
    """
    started = time.perf_counter()
    world = _meet(wait_minutes)
    store = open_store(world, timeout_seconds=_STORE_SECONDS)
    # Half of the collectives' time, so that the watchdog, which can name the rank, speaks first.
    watchdog = Watchdog(world, store, stall_minutes=wait_minutes / 2, advice=_ON_LOSS)
    watchdog.start()
    try:
        return _measure(world, run_dir, started)
    except RuntimeError as error:
        if is_lost_connection(error):
            raise watchdog.lost(error) from error
        raise
    finally:
        watchdog.stop()


def confirmed(measure: Callable[[], F], judge: Callable[[F], list[Finding]]) -> tuple[F, list[Finding]]:
    """The last figures, and what each of three measurements has found; one that finds nothing is the last.

    A machine that others use too is slow now and then; one with a fault is slow every time.
    """
    figures = measure()
    found = judge(figures)
    for _ in range(_TRIES - 1):
        if not found:
            break
        figures = measure()
        before = {(each.host, each.kind) for each in found}
        found = [each for each in judge(figures) if (each.host, each.kind) in before]
    return figures, found


def _meet(wait_minutes: float) -> World:
    world = discover()
    configure_logging(world)
    try:
        return start(timeout_minutes=wait_minutes)
    except RuntimeError as error:
        if is_lost_connection(error):
            what = f"not all of the {world.size} ranks came to {world.master_addr}:{world.master_port} within "
            what += f"{wait_minutes:g} minute(s) ({first_line(error)})"
            if world.is_local_main and not world.is_main:  # who speaks is not the one that is missed
                log.warning("%s is here, but %s", platform.node(), what)
            raise MachineError(f"{what}. Look for the node that says nothing here.") from error
        raise


def _measure(world: World, run_dir: Path, started: float) -> Report:
    _begin(Place.PRODUCTS, 1)
    ranks = gather_objects(describe_rank())
    names = [each["host"] for each in ranks]
    findings = [Finding("", "ranks", text) for text in _faults(world, names, disagreements(ranks))]
    findings += judgement.missing_compilers(ranks)
    products, slow = confirmed(lambda: gather_objects(measure_products()), lambda f: judgement.slow_devices(ranks, f))
    findings += slow

    _begin(Place.SUMS, 2)
    groups = Groups(names)
    # On a CPU it is the processor that moves the data, so that links of a slow one cannot be judged.
    hosts = set(names) - (set() if uses_cuda() else {each.host for each in slow})
    sums, slow = confirmed(lambda: measure_sums(groups), lambda f: judgement.slow_sums(f, hosts))
    findings += slow

    _begin(Place.LINKS, 3)
    links, slow = confirmed(lambda: measure_links(groups), lambda f: judgement.slow_links(f, hosts))
    findings += slow

    _begin(Place.DISK, 4)
    folder = on_main(lambda: nearest_folder(run_dir.absolute()))
    blind = blind_hosts(folder, names) if len(groups.hosts) > 1 else []
    if blind:
        what = f"{listed(blind)} cannot see what {names[0]} writes to {folder}: give a --run_dir that all nodes share"
        findings.append(Finding("", "folder", what))
    writes, slow = confirmed(lambda: measure_writes(folder, groups), judgement.slow_writes)
    findings += [each for each in slow if each.host not in blind]
    return Report(
        ranks=ranks,
        products=products,
        sums=sums,
        links=links,
        folder=str(folder),
        writes=writes,
        findings=findings,
        notes=_notes(ranks, sums),
        advice=advise(ranks, products, findings),
        seconds=time.perf_counter() - started,
    )


def _begin(place: Place, number: int) -> None:
    log.info("%d of 4: %s", number, place)
    at(place, step=number)


def _faults(world: World, names: list[str], differences: list[str]) -> list[str]:
    """What is wrong with how the ranks were started, and with what they compute together."""
    wrong, gpus = wrong_sums(world), os.environ.get("SLURM_GPUS_ON_NODE", "")
    return [*differences, *layout_faults(world, Counter(names), gpus), *([wrong] if wrong else [])]


def _notes(ranks: list[dict[str, Any]], sums: Mapping[str, Mapping[int, float]]) -> list[str]:
    notes = [on_gradients(sums["all ranks"], ranks=len(ranks))] if sums else []
    waiting = {each["host"] for each in ranks if not all(each["compiled"].values()) and each["compiler"]}
    if waiting:
        notes.append(f"{listed(sorted(waiting))}: compile DeepSpeed's operators first (make install)")
    if os.environ.get("SLURM_GPUS_ON_NODE") and not uses_cuda():
        notes.append("Slurm gave GPUs to this job, but this torch uses none: the figures are the CPU's")
    return notes
