"""How fast each node writes to the file system of the run folder."""

import os
import tempfile
import time
from pathlib import Path

from distilcb.distributed import gather_objects
from distilcb.doctor.links import Groups
from distilcb.watchdog import Place, at

_BLOCK_BYTES = 32 * 2**20
_BLOCKS = 8
_LONGEST_SECONDS = 20.0


def measure_writes(folder: Path, groups: Groups) -> dict[str, float | str]:
    """GB/s of each node, or why it cannot write; all nodes at the same time, a rank each. Every rank must call it."""
    at(Place.DISK)
    rates = gather_objects(write_rate(folder) if groups.is_leader else 0.0)
    at(Place.DISK)
    return {host: rates[leader] for host, leader in zip(groups.hosts, groups.leaders, strict=True)}


def write_rate(folder: Path) -> float | str:
    """GB/s at which random bytes reach the disk (each block with fsync), or why they cannot.

    The file has no name, or loses it at once, so that nothing stays of it.
    """
    block = os.urandom(_BLOCK_BYTES)
    written, started = 0, time.perf_counter()
    try:
        with tempfile.TemporaryFile(dir=folder, prefix=".distilcb_doctor_", buffering=0) as file:
            while written < _BLOCKS * _BLOCK_BYTES and time.perf_counter() - started < _LONGEST_SECONDS:
                written += file.write(block)
                os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    return written / (time.perf_counter() - started) / 1e9
