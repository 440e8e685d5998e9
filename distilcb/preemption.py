"""Stopping on request: a signal or a file, noticed on any rank, agreed by all at the end of one step.

Slurm's signals to a step reach every process of it, helpers included, and kill those that do not expect them; so
slurm/distill.sbatch passes the warning of the time limit on through a file (DISTILCB_STOP_FILE). A file STOP in the run
folder is the user's brake. SIGTERM (scancel, preemption) and SIGUSR1 ask for the same.
"""

import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distilcb.distributed import broadcast_object
from distilcb.errors import TrainingError
from distilcb.launcher import World

STOP = "STOP"
STOP_FILE_VARIABLE = "DISTILCB_STOP_FILE"
# A file system of a cluster is not asked at every step of a small model.
_LOOK_EVERY_SECONDS = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether the run is to stop, and after which step.

    Ranks agree without a collective of their own and without waiting for the device: rank zero announces, before it
    enters a step, that this step is to be the last. No rank leaves that step before rank zero has entered it, because
    its gradients are summed over all and DeepSpeed reads their norm; so every rank finds the announcement at its end.
    """

    def __init__(
        self,
        world: World,
        store: Any,
        run_dir: Path,
        environ: Mapping[str, str] = os.environ,
        *,
        beside: Sequence[Path] = (),
    ) -> None:
        """store: the ranks' common key-value store. beside: folders of runs that stop together with this one."""
        self.world, self.store = world, store
        self._files = {folder / STOP: f"{folder / STOP} is there" for folder in (run_dir, *beside)}
        if environ.get(STOP_FILE_VARIABLE):
            self._files[Path(environ[STOP_FILE_VARIABLE])] = "the time limit is near"
        self._reason: str | None = None
        self._heard = self._said = False
        self._agreed: tuple[int, str] | None = None
        self._looked_at: dict[str, float] = {}
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 for a request from now on; call it in the main thread."""
        self._before = {number: signal.signal(number, self._hear) for number in _SIGNALS}

    def stop_listening(self) -> None:
        """Let SIGTERM end the process again, as nothing is left to save."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked_here(self) -> str | None:
        """What this rank has heard of, at once and without a word to the others."""
        if self._reason is None and self.world.is_main and self._may_look("files"):
            self._reason = next((why for path, why in self._files.items() if path.exists()), None)
        return self._reason

    def heard(self) -> bool:
        """Whether this rank has heard of a request, its own or another's; cheap enough for every batch."""
        here = self.asked_here() is not None  # first: what comes after this is passed on before it is said to be heard
        self._pass_on()
        if self.world.size > 1 and not self._heard and self._may_look("store"):
            self._heard = bool(self.store.check(["stop/asked"]))
        return self._heard or here

    def agreed_now(self) -> str | None:
        """Why all ranks stop here, or None; every rank must call it, at a place where they may wait for each other."""
        self._pass_on()
        reason: str | None = broadcast_object(self._asked_anywhere() if self.world.is_main else None)
        return reason

    def agreed_after(self, step: int) -> str | None:
        """Why all ranks stop after `step` steps are done, or None; every rank must call it after every step.

        Raises:
            TrainingError: the others have stopped at a step that this rank has left behind.
        """
        if self.world.size == 1:
            return self.asked_here()
        self._pass_on()
        if self.world.is_main and self._agreed is None and (reason := self._asked_anywhere()):
            self.store.set("stop/after", f"{step + 1} {reason}")
        if self._agreed is None and self.store.check(["stop/after"]):
            last, _, reason = self.store.get("stop/after").decode().partition(" ")
            self._agreed = (int(last), reason)
        if self._agreed is None or step < self._agreed[0]:
            return None
        if step > self._agreed[0]:
            raise TrainingError(
                f"rank {self.world.rank} has taken step {step}, but all were to stop after {self._agreed[0]}."
            )
        return self._agreed[1]

    def _pass_on(self) -> None:
        """Tell the others what this rank has heard."""
        if self.world.size > 1 and not self._said and (reason := self.asked_here()):
            self.store.set("stop/asked", reason if self.world.is_main else f"rank {self.world.rank}: {reason}")
            self._said = True

    def _may_look(self, where: str) -> bool:
        if time.monotonic() - self._looked_at.get(where, -_LOOK_EVERY_SECONDS) < _LOOK_EVERY_SECONDS:
            return False
        self._looked_at[where] = time.monotonic()
        return True

    def _asked_anywhere(self) -> str | None:
        """What rank zero knows."""
        here = self.asked_here()
        if here is None and self.world.size > 1 and self.store.check(["stop/asked"]):
            return str(self.store.get("stop/asked").decode())
        return here

    def _hear(self, number: int, _frame: Any) -> None:
        self._reason = self._reason or f"{signal.Signals(number).name} came"


def ignore_in_helper(_worker: int = 0) -> None:
    """In a process that fetches batches: live on when Slurm signals every process of the step."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
