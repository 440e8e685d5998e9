"""Checkpoints: saved whole or not at all, verified, the newest good one found, the last few kept.

    checkpoints/step_00000050/   DeepSpeed's files and manifest.json (sizes and checksums)
    checkpoints/latest           the name of the newest good one
    checkpoints/model/           config.json and tokenizer of the student: what turns a checkpoint into a model

A checkpoint is written under a hidden name and renamed when every file is on disk, so a folder called step_* is
complete whenever the process was killed.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from distilcb.distributed import barrier, is_lost_connection, is_main_process, on_main
from distilcb.durability import sync, write_durably
from distilcb.errors import CheckpointError

log = logging.getLogger(__name__)

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
# The other ranks wait for 30 minutes.
_CONVERTED_WITHIN_SECONDS = 1500.0
# A network file system may keep a directory's listing for as long.
_SHARDS_ARE_SEEN_WITHIN_SECONDS = 90.0
_NAME = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    world_size: int


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, engine: Any, *, step: int, world_size: int, state: dict[str, Any]) -> Path:
        """Save on every rank together; returns the checkpoint's folder.

        Args:
            engine: DeepSpeed's.
            step: optimizer steps done.
            state: what else the run needs to go on, fit for torch.save with weights_only loading.

        Raises:
            CheckpointError: the disk is full or not writable; earlier checkpoints stay as they were.
        """
        final = self._path(step)
        temporary = self.folder / f".{final.name}.tmp"
        on_main(self.remove_leftovers)
        client_state = state | {"step": step, "world_size": world_size, "format_version": FORMAT_VERSION}
        try:
            engine.save_checkpoint(str(self.folder), tag=temporary.name, client_state=client_state, save_latest=False)
        except (OSError, RuntimeError) as error:
            if is_lost_connection(error):
                raise
            if is_main_process():  # the others leave it alone: rank zero may still be writing there
                shutil.rmtree(temporary, ignore_errors=True)
            raise _unwritable(final, error) from error
        on_main(lambda: self._complete(temporary, final, step, world_size))
        return final

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending; damaged ones included."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def newest(self, *, before: int | None = None) -> Checkpoint | None:
        """The newest checkpoint (before a step) whose files are what its manifest says; damaged ones are named and
        passed over."""
        steps = [step for step in self.steps() if before is None or step < before]
        return next((found for step in reversed(steps) if (found := self.of_step(step))), None)

    def newest_or_none_at_all(self) -> Checkpoint | None:
        """As `newest`, but where there are checkpoints one must be good: else a run would begin anew over them.

        Raises:
            CheckpointError: all are damaged or cannot be read.
        """
        newest = self.newest()
        if newest is None and self.steps():
            raise CheckpointError(
                f"{self.folder}: of its {len(self.steps())} checkpoint(s) none can be used, as said above. See that "
                "they can be read from here; --fresh starts anew, and keeps them aside."
            )
        return newest

    def of_step(self, step: int) -> Checkpoint | None:
        """The checkpoint of a step, if its files are what its manifest says; a damaged one is named."""
        path = self._path(step)
        if not path.is_dir():
            return None
        fault = _fault(path)
        if fault is not None:
            log.warning("checkpoint %s is damaged (%s): passed over", path, fault)
            return None
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Checkpoint(path, manifest["step"], manifest["world_size"])

    def load(self, engine: Any, checkpoint: Checkpoint, *, world_size: int) -> dict[str, Any]:
        """Bring engine, optimizer and loss scaler to the checkpoint's state on every rank; returns the saved `state`.

        One that was saved on another number of ranks goes through DeepSpeed's universal format, made by rank zero
        and deleted again; the engine must have been built for it (engine/deepspeed_config.py, load_universal).

        Raises:
            CheckpointError: not loadable.
        """
        if checkpoint.world_size == world_size:
            return self._load(engine, checkpoint, checkpoint.path.name)
        log.info("%s: from %d ranks to %d", checkpoint.path, checkpoint.world_size, world_size)
        universal = self.folder / f".universal_{checkpoint.path.name}.tmp"
        on_main(lambda: _convert(checkpoint.path, universal))
        state = self._load(engine, checkpoint, universal.name)
        barrier()
        on_main(self.remove_leftovers)
        return state

    def _load(self, engine: Any, checkpoint: Checkpoint, tag: str) -> dict[str, Any]:
        path, state = engine.load_checkpoint(str(self.folder), tag=tag)
        if path is None:
            raise CheckpointError(f"{checkpoint.path} cannot be loaded. Move it aside to go on from the one before it.")
        return state

    def _complete(self, temporary: Path, final: Path, step: int, world_size: int) -> None:
        try:
            _see_shards(temporary, world_size)
            self._write_manifest(temporary, step, world_size)
            if final.exists():  # damaged, or from a start that died before it could go on
                shutil.rmtree(final)
            temporary.rename(final)
            sync(self.folder)
            write_durably(self.folder / "latest", final.name + "\n")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _unwritable(final, error) from error
        # Those of later steps are damaged, or they would have been gone on from: they do not count.
        for old in [each for each in self.steps() if each <= step][: -self.keep]:
            self._discard(self._path(old))

    def _discard(self, path: Path) -> None:
        """Delete a folder under a hidden name, so that a kill leaves no half of one under a complete name."""
        hidden = self.folder / f".{path.name}.tmp"
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Delete what a killed save, deletion or conversion has left."""
        for path in [*self.folder.glob(".step_*.tmp"), *self.folder.glob(".universal_*.tmp")]:
            shutil.rmtree(path, ignore_errors=True)

    @staticmethod
    def _write_manifest(temporary: Path, step: int, world_size: int) -> None:
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": world_size,
            "files": {str(p.relative_to(temporary)): _facts(p, sync=True) for p in files},
        }
        write_durably(temporary / MANIFEST, json.dumps(manifest, indent=1))

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"


def _convert(checkpoint: Path, output: Path) -> None:
    """Write DeepSpeed's universal form of a checkpoint, with its own program."""
    shutil.rmtree(output, ignore_errors=True)
    words = ["--input_folder", str(checkpoint), "--output_folder", str(output), "--inject_missing_state"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *words],
            capture_output=True,
            text=True,
            check=False,
            timeout=_CONVERTED_WITHIN_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(
            f"{checkpoint} was not converted for another number of ranks within {error.timeout:.0f} s. Is the file "
            "system slow? Start on as many ranks as saved it."
        ) from error
    (output.parent / "latest_universal").unlink(missing_ok=True)  # which it writes beside, and nobody reads
    if done.returncode:
        shutil.rmtree(output, ignore_errors=True)
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CheckpointError(
            f"{checkpoint} cannot be converted for another number of ranks ({lines[-1] if lines else 'no output'}). "
            "Start on as many ranks as saved it, or free some disk space."
        )


def _see_shards(folder: Path, world_size: int) -> None:
    """Wait until rank zero sees what every rank has written; OSError where it does not come."""
    deadline = time.monotonic() + _SHARDS_ARE_SEEN_WITHIN_SECONDS
    while (shards := len(list(folder.glob("*_optim_states.pt")))) not in (0, world_size):  # none: not sharded
        if time.monotonic() > deadline:
            raise OSError(
                f"{shards} shards of {world_size} ranks are seen from rank 0 after "
                f"{_SHARDS_ARE_SEEN_WITHIN_SECONDS:.0f} s: is it one file system on all nodes?"
            )
        time.sleep(0.5)


def _unwritable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} cannot be written ({error}). The checkpoints before it are good; free some space and run the same "
        "command again."
    )


def _facts(path: Path, *, sync: bool = False) -> dict[str, Any]:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
        if sync:
            os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format {manifest['format_version']}, this version reads {FORMAT_VERSION}"
        for name, facts in manifest["files"].items():
            if _facts(path / name) != facts:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None
