"""The run folder: what a run is, what it has done, and whether it may go on.

config.yaml    resolved configuration and, under `provenance`, recipe, versions, commit, command line
checkpoints/   see engine/checkpoint.py
student/       the exported model
tensorboard/   curves
metrics.jsonl  a JSON object a logged step
summary.json   held-out and training figures
DONE           written last
STOP           yours: `touch` it, and the run saves and ends; until it is removed no start goes on
"""

import json
import logging
import os
import platform
import shlex
import time
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from distilcb.command_line import CommandLine
from distilcb.config import Config, differences, flatten, to_plain
from distilcb.durability import write_durably
from distilcb.errors import CheckpointError, writing
from distilcb.launcher import is_later_slice, slurm_job
from distilcb.preemption import STOP
from distilcb.surroundings import surroundings
from distilcb.train.run_lock import RunLock, refuse_if_held

log = logging.getLogger(__name__)


class RunState(Enum):
    """What was found in a run folder."""

    NEW = "new"
    RESUMED = "resumed"
    DONE = "done"
    STOPPED = "stopped"


def find_run(run_dir: Path) -> "RunFolder":
    """The folder of a run that has begun.

    Raises:
        CheckpointError: it is none.
    """
    folder = RunFolder(run_dir.absolute())
    if not folder.config.is_file():
        if not run_dir.is_dir():
            came = "is a file" if run_dir.exists() else "does not exist"
            raise CheckpointError(f"{run_dir} {came}. Give the folder of a run, as --run_dir named it.")
        hint = " Give the run folder, not the student in it." if (run_dir.parent / "config.yaml").is_file() else ""
        runs = sorted(path.parent for path in run_dir.glob("*/config.yaml"))
        hint = hint or (f" Give one of those in it: {', '.join(map(str, runs[:8]))}." if runs else "")
        raise CheckpointError(f"{run_dir} is no run folder: it has no config.yaml.{hint}")
    return folder


class RunFolder:
    """Paths and small files of one run. Methods that write are for rank zero."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.model = self.checkpoints / "model"
        self.student = path / "student"
        self.tensorboard = path / "tensorboard"
        self.summary = path / "summary.json"
        self.done = path / "DONE"
        self.stop = path / STOP
        self._lock: RunLock | None = None

    def look(self, command: CommandLine) -> RunState:
        """How far the run got; changes nothing. --fresh holds for the first slice of a job: the others go on.

        Raises:
            CheckpointError: a folder made with other settings, in use, or that is no run folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise CheckpointError(f"{self.path} is a file, needed a folder. Give another --run_dir.")
        # Hidden files are what a first start has left that was killed while it made the folder.
        if not self.path.exists() or all(path.name.startswith(".") for path in self.path.iterdir()):
            return RunState.NEW
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} holds files but no config.yaml, so it is no run folder. Give another --run_dir."
            )
        refuse_if_held(self.path)
        if command.fresh and not self._was_begun_by_this_job():
            return RunState.NEW
        changed = self.changed_settings(command.config)
        if changed:
            raise self._other("settings", changed)
        if self.done.exists():
            return RunState.DONE
        return RunState.STOPPED if self.stop.exists() else RunState.RESUMED

    def begin_or_check(
        self, command: CommandLine, state: RunState, provenance: dict[str, Any], facts: dict[str, Any]
    ) -> None:
        """Make the folder of a new run, moving an old one aside; or see that a resumed one finds the same facts.

        Then the folder is this process's until `leave`.

        Args:
            provenance: where the run comes from; kept.
            facts: what must be the same at every start, such as precision and a hash of the text.

        Raises:
            CheckpointError: other facts than at the first start, or a process that trains there.
        """
        if state is RunState.RESUMED:
            changed = self.changed_facts(facts)
            if changed:
                raise self._other("text, teacher or DeepSpeed file", changed)
        with writing(self.path, CheckpointError, "Give a --run_dir that can be written to."):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            guard = FileLock(self.path.with_name(f".{self.path.name}.guard"))
            with guard:  # of two first starts at a time the second finds the folder taken
                try:
                    if state is RunState.NEW:
                        refuse_if_held(self.path)
                        self._make(command, provenance, facts)
                    self._lock = RunLock(self.path)
                    self._lock.acquire()
                finally:
                    Path(guard.lock_file).unlink(missing_ok=True)

    def begin_again(self, provenance: dict[str, Any]) -> None:
        """Keep where the run comes from now: no checkpoint is there to go on from, so this start takes the first steps.

        The facts that it was begun with stay, and so does the job that made the folder.
        """
        document = self._begun()
        stays = {name: document["provenance"].get(name) for name in ("facts", "slurm_job")}
        with writing(self.path, CheckpointError, "Give a --run_dir that can be written to."):
            self._write_config(document | {"provenance": provenance | stays})

    def _was_begun_by_this_job(self) -> bool:
        """Whether an earlier slice of this Slurm job has made the folder."""
        try:
            return is_later_slice(os.environ) and self.provenance().get("slurm_job") == slurm_job(os.environ)
        except CheckpointError:
            return False

    def leave(self) -> None:
        """Let other processes into the folder."""
        if self._lock is not None:
            self._lock.release()

    def _make(self, command: CommandLine, provenance: dict[str, Any], facts: dict[str, Any]) -> None:
        if self.config.exists():
            if not command.fresh:
                raise CheckpointError(f"{self.path} was begun by another start meanwhile: the same command goes on.")
            aside = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            log.info("--fresh: the run that was there is now %s", aside)
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_config(to_plain(command.config) | {"provenance": provenance | {"facts": facts}})

    def _write_config(self, document: dict[str, Any]) -> None:
        write_durably(self.config, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_durably(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def read_summary(self) -> dict[str, Any]:
        """What summary.json holds."""
        summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        return summary

    def write_done(self) -> None:
        """Write DONE, the last file of a run."""
        write_durably(self.done, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")

    def not_compared(self, command: CommandLine) -> list[str]:
        """Lines on teacher and text that are named otherwise than at the first start: of a run that is DONE they are
        not looked into."""
        before, now = flatten(self._begun()), flatten(to_plain(command.config))
        names = ("teacher.model", "data.train", "data.heldout")
        return [f"{name}: {before.get(name)} -> {now[name]}" for name in names if before.get(name) != now[name]]

    def changed_settings(self, config: Config) -> list[str]:
        """Lines on settings that decide the result and are not what they were at the first start."""
        return differences(self._begun(), config)

    def changed_facts(self, facts: dict[str, Any]) -> list[str]:
        """Lines on those of `facts` that are not what they were at the first start."""
        begun = self.provenance()["facts"]
        return [line for name in facts for line in _difference(name, begun.get(name), facts[name])]

    def provenance(self) -> dict[str, Any]:
        """Where the run comes from, as written at the start that took its first steps."""
        return self._begun()["provenance"]

    def micro_batch(self, world_size: int) -> int | None:
        """What a run that began on as many ranks has for a micro-batch; None on another number."""
        if self.provenance()["world_size"] != world_size:
            return None
        size = flatten(self._begun()).get("optim.micro_batch")
        return size if isinstance(size, int) else None

    def _begun(self) -> dict[str, Any]:
        try:
            document = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise CheckpointError(f"{self.config} cannot be read: {error}. Start anew with --fresh.") from error
        if not isinstance(document, dict) or "facts" not in document.get("provenance", {}):
            raise CheckpointError(f"{self.config} is not what a run writes. Start anew with --fresh.")
        return document

    def _other(self, what: str, changed: list[str]) -> CheckpointError:
        lines = [f"{self.path} was begun with other {what}:", *changed]
        lines.append("Put it back as it was, give another --run_dir, or start anew with --fresh.")
        return CheckpointError("\n  ".join(lines))


def _difference(name: str, before: Any, now: Any) -> list[str]:
    """Lines on a fact that is not what it was; hashes tell only that."""
    if before == now:
        return []
    if name == "text":
        before = before if isinstance(before, dict) else {}
        return [_other_text(part, before.get(part), now[part]) for part in now if before.get(part) != now[part]]
    if name == "deepspeed":
        before = before if isinstance(before, dict) else {}
        return [f"DeepSpeed file, {n}: {before.get(n)} -> {v}" for n, v in now.items() if before.get(n) != v]
    if name == "teacher":
        return ["teacher.model: another model than it was begun with"]
    return [f"{name}: {before} -> {now}"]


def _other_text(part: str, before: Any, now: Any) -> str:
    """before, now: a hash of the text, or one a language."""
    if isinstance(before, list) and isinstance(now, list) and sorted(before) == sorted(now):
        return f"data.{part}: the languages are in another order than it was begun with"
    return f"data.{part}: other text than it was begun with"


def provenance(command: CommandLine, world_size: int) -> dict[str, Any]:
    """Where a run comes from: recipe, command line, versions, commit, host."""
    return {
        "recipe": str(command.recipe),
        "command_line": shlex.join(
            ["launch/train.py", *(word for word in command.words if not word.startswith("--local_rank"))]
        ),
        **surroundings(),
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": world_size,
        "slurm_job": slurm_job(os.environ),
    }
