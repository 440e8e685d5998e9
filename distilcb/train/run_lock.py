"""One process at a time in a run folder: a file that says who is there, and is kept fresh while it is.

A lock is left over where its process is gone from this machine, where it belongs to an earlier start of this same Slurm
job or to a job that Slurm says is not running, or where Slurm says nothing and nobody has freshened it for a while: of
a process on another machine nothing else can be known.
"""

import json
import os
import platform
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from distilcb.distributed import at_exit
from distilcb.errors import CheckpointError

LOCK = ".lock"
_FRESHEN_EVERY_SECONDS = 20.0
_LEFT_OVER_AFTER_SECONDS = 300.0
_SQUEUE_SECONDS = 20.0
_ENDING_IS_LOOKED_AT_EVERY_SECONDS = 5.0
_ON_NODES = {"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT"}


class RunLock:
    """Held from `acquire` to `release`, or to the end of the process."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._written = ""
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the lock of a folder that is there, in place of one that is left over.

        Raises:
            CheckpointError: another process trains in the folder.
        """
        with FileLock(self.path.with_name(f"{LOCK}.guard")):  # of two that find one left over, the first takes it
            refuse_if_held(self.path.parent)
            self._written = json.dumps(_who_we_are())
            self.path.write_text(self._written, encoding="utf-8")
        at_exit(self.release)
        threading.Thread(target=self._keep_fresh, daemon=True, name="run lock").start()

    def release(self) -> None:
        """Leave the folder to others; a second time does nothing."""
        if not self._released.is_set():
            self._released.set()
            with suppress(OSError):
                if self.path.read_text(encoding="utf-8") == self._written:
                    self.path.unlink(missing_ok=True)
                    self.path.with_name(f"{LOCK}.guard").unlink(missing_ok=True)

    def _keep_fresh(self) -> None:
        while not self._released.wait(_FRESHEN_EVERY_SECONDS):
            try:
                if self.path.read_text(encoding="utf-8") != self._written:
                    self._end_as_another_has_it()
                os.utime(self.path)
            except FileNotFoundError:
                return  # the folder was moved or deleted: nothing left to guard
            except OSError:
                continue  # a network file system may come back

    def _end_as_another_has_it(self) -> None:
        """This process stood still for so long that its folder was taken over: whatever it writes now does harm."""
        who = _read(self.path) or {}
        print(
            f"\nTrainingError: {self.path.parent} was taken over by process {who.get('pid', '?')} on "
            f"{who.get('host', '?')} while this one stood still: it ends here.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def refuse_if_held(folder: Path) -> None:
    """Raise CheckpointError where a process trains in the folder."""
    path = folder / LOCK
    holder = _read(path)
    _wait_while_ending(holder)
    if holder is not None and _is_there(path, holder):
        raise _held(path, holder)


def _who_we_are() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "pid": os.getpid(),
        "process_started": _start_of(os.getpid()),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_cluster": os.environ.get("SLURM_CLUSTER_NAME"),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _read(path: Path) -> dict[str, Any] | None:
    """What a lock says; an unreadable one says nothing but that it is there."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _is_there(path: Path, holder: dict[str, Any]) -> bool:
    if holder.get("host") == platform.node():
        return holder.get("pid") != os.getpid() and _start_of(holder.get("pid")) == holder.get("process_started")
    if holder.get("slurm_job") and holder["slurm_job"] == os.environ.get("SLURM_JOB_ID"):
        return False  # this job, before it was requeued
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    states = _states_of(holder, age)
    return age < _LEFT_OVER_AFTER_SECONDS if states is None else bool(states & _ON_NODES)


def _wait_while_ending(holder: dict[str, Any] | None) -> None:
    """Wait for a job that Slurm is taking from its nodes: the slice before this one, as a rule."""
    deadline = time.monotonic() + _LEFT_OVER_AFTER_SECONDS
    while holder and time.monotonic() < deadline and _states_of(holder, 0.0) == {"COMPLETING"}:
        time.sleep(_ENDING_IS_LOOKED_AT_EVERY_SECONDS)


def _states_of(holder: dict[str, Any], age: float) -> set[str] | None:
    """What Slurm says of the job that holds a lock, nothing where it is over; None where Slurm does not say.

    age: seconds since the lock was freshened.
    """
    job = str(holder.get("slurm_job") or "")
    if not job or job == os.environ.get("SLURM_JOB_ID") or _is_of_another_cluster(holder):
        return None
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format=%T"],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SQUEUE_SECONDS,
        )
    except (OSError, subprocess.SubprocessError):  # no squeue in a container, or a controller that is busy
        return None
    if done.returncode:
        # It ended long ago; or, where its lock is fresh, runs on another cluster or is not for us to see.
        return set() if "Invalid job id" in done.stderr and age > 3 * _FRESHEN_EVERY_SECONDS else None
    return set(done.stdout.split())


def _is_of_another_cluster(holder: dict[str, Any]) -> bool:
    """Whether squeue here would speak of another job of that number."""
    ours, theirs = os.environ.get("SLURM_CLUSTER_NAME"), holder.get("slurm_cluster")
    return bool(ours and theirs and ours != theirs)


def _start_of(pid: Any) -> str | None:
    """When a process of this machine started, in ticks since boot (its number may come again); None if it is gone."""
    try:
        # The name, in brackets, may hold anything; the 20th field after it is the start.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _held(path: Path, holder: dict[str, Any] | None) -> CheckpointError:
    holder = holder or {}
    job = f", Slurm job {holder['slurm_job']}" if holder.get("slurm_job") else ""
    who = f"process {holder.get('pid', '?')} on {holder.get('host', '?')}{job}, since {holder.get('since', '?')}"
    return CheckpointError(
        f"{path.parent}: {who}, trains there. Wait for it, end it, or give another --run_dir. Should it be gone for "
        f"good, the folder is free {_LEFT_OVER_AFTER_SECONDS / 60:.0f} minutes after its last sign of life."
    )
