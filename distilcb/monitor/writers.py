"""Where figures go: progress bar, metrics.jsonl, TensorBoard. Only rank zero makes one."""

import json
import logging
import os
import sys
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from distilcb.errors import CheckpointError, writing

log = logging.getLogger(__name__)

# metrics.jsonl's names -> TensorBoard's, where they are not just prefixed with train/.
_NOT_CURVES = {"step", "window_steps", "tokens", "epoch", "seconds"}
METRICS = "metrics.jsonl"


def logged_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The training records of metrics.jsonl by rising step; evaluations, and what is no whole line, are left out."""
    path = run_dir / METRICS
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # being written, or cut by a kill
        if isinstance(record, dict) and isinstance(record.get("step"), int) and "loss" in record:
            records.append(record)
    return sorted(records, key=lambda record: record["step"])


class StepBar:
    """How far a training has come: a bar on the console, or where stderr is no terminal a line a logged step."""

    def __init__(self, *, steps: int, first_step: int) -> None:
        self._steps, self._first_step = steps, first_step
        self._losses: dict[str, str] = {}

    @cached_property
    def _bar(self) -> Any:
        return tqdm(
            total=self._steps,
            initial=self._first_step,
            unit=" steps",
            dynamic_ncols=True,
            desc="training",
            disable=not sys.stderr.isatty(),  # in a file every move of a bar is a line
        )

    def advance(self) -> None:
        """One optimizer step is done."""
        self._bar.update()

    def start_clock(self) -> None:
        """Show the bar; or leave what was not training (an evaluation, a save) out of its times."""
        self._bar.unpause()

    def end(self) -> None:
        """Leave the last state of a bar that was shown on the console, and end its line."""
        if "_bar" in vars(self):
            self._bar.close()

    def tell(self, student: str, record: dict[str, Any]) -> None:
        """A student's logged step; its name is empty where there is but one."""
        loss, rate = f"{record['loss']:.3f}", f"{record['tokens_per_second']:,.0f}"
        if self._bar.disable:
            log.info(
                "%sstep %d of %d, loss %s, %s tokens/s, %s",
                *(f"{student}: " if student else "", record["step"], self._steps, loss, rate, self._left(record)),
            )
        else:
            self._losses[student or "loss"] = loss
            self._bar.set_postfix(self._losses | {"tokens_per_s": rate}, refresh=False)

    def _left(self, record: dict[str, Any]) -> str:
        """The time that the steps which are left take at the rate of the last ones."""
        step_tokens = record["tokens"] / record["step"]
        seconds = (self._steps - record["step"]) * step_tokens / record["tokens_per_second"]
        return f"{tqdm.format_interval(seconds)} left"


class RunWriter:
    """Writes a run's figures to console, metrics.jsonl and TensorBoard."""

    def __init__(
        self, run_dir: Path, *, steps: int, first_step: int, bar: StepBar | None = None, student: str = ""
    ) -> None:
        """Lines and curves after `first_step`, which a killed start may have left, are dropped.

        Args:
            bar: that of all students, where several are trained together; None: one of its own.
            student: its name among them.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / METRICS
        last_kept = first_step or -1  # what is resumed at 0 had no checkpoint, and evaluates step 0 again
        _keep_lines_up_to(self.path, last_kept, and_evaluation=first_step < steps)
        self._lines = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_kept + 1)
        self.bar, self._student = bar or StepBar(steps=steps, first_step=first_step), student

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.end()
        self._lines.close()
        self._board.close()

    def training(self, record: dict[str, Any]) -> None:
        """One logged step: a line, curves under train/, and the bar's figures."""
        self._write_line(record)
        for name, value in record.items():
            if name not in _NOT_CURVES and value is not None:
                self._board.add_scalar(f"train/{name}", value, record["step"])
        self.bar.tell(self._student, record)

    def evaluation(self, step: int, figures: dict[str, Any]) -> None:
        """Held-out figures, as in summary.json: a line and curves under eval/."""
        flat = {
            f"eval/{who}/{name}": value
            for who, values in figures.items()
            for name, value in values.items()
            if isinstance(value, int | float)
        }
        self._write_line({"step": step} | flat)
        for name, value in flat.items():
            self._board.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """A Markdown text in TensorBoard's text tab."""
        self._board.add_text(tag, text, step)

    def results(self, settings: dict[str, Any], results: dict[str, float]) -> None:
        """The configuration and what came of it, in TensorBoard's hparams tab."""
        plain = {n: v if isinstance(v, bool | int | float | str) else json.dumps(v) for n, v in settings.items()}
        self._board.add_hparams(plain, results, run_name=".")

    def finish(self) -> None:
        """Bring every curve to disk."""
        self._board.flush()

    def sync(self) -> None:
        """Bring every line to disk: a checkpoint that outlives a power failure must not be ahead of them."""
        with self._writing():
            os.fsync(self._lines.fileno())

    def _write_line(self, record: dict[str, Any]) -> None:
        with self._writing():
            self._lines.write(json.dumps(record) + "\n")
            self._lines.flush()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(self.path, CheckpointError, "Free some space and run the same command again.")


def _keep_lines_up_to(path: Path, step: int, *, and_evaluation: bool) -> None:
    """and_evaluation: whether evaluations of that very step stay; the last step's is made again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # a kill may have cut the last line
        if record["step"] < step or (record["step"] == step and (and_evaluation or "loss" in record)):
            kept.append(line)
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in kept)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
