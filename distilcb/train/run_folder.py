"""The run folder: what a run is, what it has done, and whether it may go on.

config.yaml    resolved configuration and, under `provenance`, recipe, versions, commit, command line
checkpoints/   see engine/checkpoint.py
student/       the exported model
tensorboard/   curves
metrics.jsonl  a JSON object a logged step
summary.json   held-out and training figures
DONE           written last
"""

import json
import platform
import shlex
import subprocess
import time
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from distilcb.config import REPOSITORY, CommandLine, differences, to_plain
from distilcb.engine.checkpoint import write_durably
from distilcb.errors import CheckpointError


class RunState(Enum):
    """What was found in a run folder."""

    NEW = "new"
    RESUMED = "resumed"
    DONE = "done"


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

    def open(self, command: CommandLine, provenance: dict[str, Any]) -> RunState:
        """Make the folder, or find out how far it got.

        Raises:
            CheckpointError: a folder made with other settings, or that is no run folder.
        """
        if command.fresh and self.path.exists() and any(self.path.iterdir()):
            aside = self.path.with_name(f"{self.path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            self.path.rename(aside)
            print(f"--fresh: the run that was there is now {aside}", flush=True)
        if not self.path.exists() or not any(self.path.iterdir()):
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_config(command, provenance)
            return RunState.NEW
        if not self.config.is_file():
            raise CheckpointError(
                f"{self.path} holds files but no config.yaml, so it is no run folder. Give another --run_dir."
            )
        self._refuse_other_settings(command)
        return RunState.DONE if self.done.exists() else RunState.RESUMED

    def refuse_other_text(self, contents: dict[str, str]) -> None:
        """Raise CheckpointError where the run was begun on other text; contents: 'train', 'heldout' -> hash."""
        document = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        begun = document["provenance"].setdefault("text", contents)
        changed = [name for name in contents if begun.get(name) != contents[name]]
        if changed:
            raise CheckpointError(
                f"{self.path} was begun on other text: {', '.join('data.' + name for name in changed)} has changed "
                "since. Put the text back, give another --run_dir, or start anew with --fresh."
            )
        write_durably(self.config, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        write_durably(self.summary, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def write_done(self) -> None:
        """Write DONE, the last file of a run."""
        write_durably(self.done, time.strftime("%Y-%m-%dT%H:%M:%S%z") + "\n")

    def _write_config(self, command: CommandLine, provenance: dict[str, Any]) -> None:
        document = to_plain(command.config) | {"provenance": provenance}
        write_durably(self.config, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))

    def _refuse_other_settings(self, command: CommandLine) -> None:
        try:
            before = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            before.pop("provenance", None)
            changed = differences(before, command.config)
        except (OSError, yaml.YAMLError, AttributeError) as error:
            raise CheckpointError(f"{self.config} cannot be read: {error}. Start anew with --fresh.") from error
        if changed:
            raise CheckpointError(
                f"{self.path} was begun with other settings:\n  "
                + "\n  ".join(changed)
                + "\n  Use the same settings, another --run_dir, or start anew with --fresh."
            )


def provenance(command: CommandLine, **facts: Any) -> dict[str, Any]:
    """Where a run comes from: recipe, command line, versions, commit, host; and `facts`."""
    import datasets
    import deepspeed
    import torch
    import transformers

    import distilcb

    libraries = {"distilcb": distilcb, "torch": torch, "deepspeed": deepspeed}
    libraries |= {"transformers": transformers, "datasets": datasets}
    return {
        "recipe": str(command.recipe),
        "command_line": shlex.join(command.words),
        "git_commit": _git_commit(),
        "versions": {"python": platform.python_version()}
        | {name: str(module.__version__) for name, module in libraries.items()},
        "host": platform.node(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **facts,
    }


def _git_commit() -> str | None:
    """The commit of this code, '+changes' where the tree differs from it; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
