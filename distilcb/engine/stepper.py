"""One optimizer step; the only place that normalises.

Each micro-batch's loss is a sum times weight x ranks / global count, and DeepSpeed takes the mean over ranks, so the
gradient is that of the global batch's mean however it is cut into ranks and micro-batches.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilcb.config import LossConfig, OptimConfig
from distilcb.data.loader import Batch, Cut
from distilcb.data.order import key
from distilcb.distributed import all_reduce_sum
from distilcb.engine.lessons import lessons
from distilcb.engine.optimizer import learning_rate
from distilcb.errors import TrainingError
from distilcb.losses.triplet import TERMS, Counts, coefficients
from distilcb.models.teacher import Teacher, TeacherOutput
from distilcb.watchdog import Place, at


@dataclass
class StepResult:
    """What a step leaves, without waiting for the device.

    sums: (terms,) float64 on the device, this rank's unweighted sums in the order of TERMS.
    lr: the rate that was used.
    grad_norm: of the whole gradient before clipping; a tensor or number, None where DeepSpeed gives none.
    skipped: whether fp16 overflowed and the loss scaler skipped the update.
    data_wait_seconds: how long this rank waited for batches.
    """

    sums: Tensor
    lr: float
    grad_norm: Any
    skipped: bool
    data_wait_seconds: float


@dataclass
class OpenStep:
    """A step that is being taken.

    step: counted from 0. sums: as in StepResult, of the micro-batches so far. skipped_before: DeepSpeed's counter.
    """

    step: int
    lr: float
    sums: Tensor
    skipped_before: int


class Stepper:
    """Takes optimizer steps on a DeepSpeed engine around a StepModule."""

    def __init__(
        self,
        engine: Any,
        teacher: Teacher | None,
        *,
        loss: LossConfig,
        optim: OptimConfig,
        counts: Counts,
        cut: Cut,
        steps: int,
        seed: int,
        dropout: float,
        may_overflow: bool,
        device: torch.device,
        student: str = "",
    ) -> None:
        """counts: of the global batch. dropout: the student's largest. steps: of the whole run. may_overflow: fp16.

        student: its name, told in messages; empty where there is but one.
        """
        self.student = student
        self.may_overflow = may_overflow
        self.engine, self.teacher, self.loss, self.optim = engine, teacher, loss, optim
        self._whole_loss, self._counts = loss, counts
        self.cut, self.steps, self.seed, self.dropout, self.device = cut, steps, seed, dropout, device
        self.coefficients = coefficients(loss, counts, world_size=cut.world_size)
        # For each term the first step in which it was not finite on this rank; stays on the device.
        self._first_bad_step = torch.full((len(TERMS),), math.inf, dtype=torch.float64, device=device)

    def step(self, step: int, batches: Iterator[Batch]) -> StepResult:
        """Take step `step`, counted from 0, on this rank's next `cut.accumulation` batches.

        Raises:
            TrainingError: DeepSpeed skipped the step because a loss term was not finite on some rank.
        """
        (result,) = step_together([self], step, batches)
        return result

    def begin(self, step: int) -> OpenStep:
        """Set the rate of step `step`, and count its figures from here."""
        self.turn_to(step)
        lr = learning_rate(self.optim, step=step, steps=self.steps)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self.device)
        return OpenStep(step, lr, sums, self.engine.skipped_steps)

    def turn_to(self, step: int) -> None:
        """Have `loss` and `coefficients` be those of step `step`, counted from 0; `loss.kl_until` ends some terms."""
        if self._whole_loss.kl_until < 1:
            self.loss = self._whole_loss.at(step, self.steps)
            self.coefficients = coefficients(self.loss, self._counts, world_size=self.cut.world_size)

    def learn(self, opened: OpenStep, micro: int, batch: Batch, taught: TeacherOutput | None, *, move: int) -> None:
        """Take a micro-batch of the step, and after the last one the update.

        Args:
            taught: what `lessons` gives for the batch.
            move: of the step's micro-batches, those of every student counted, which one this is.
        """
        if self.dropout:  # dropout as a function of its place, so that a checkpoint holds no generator
            torch.manual_seed(int(key(self.seed, opened.step, self.cut.global_index(micro))) >> 1)
        at(Place.FORWARD, micro=move)
        loss, sums = self.engine(batch, taught, self.coefficients)
        self.engine.set_gradient_accumulation_boundary(micro == self.cut.accumulation - 1)
        at(Place.BACKWARD)
        # A new tensor: given the module's own output, DeepSpeed outside ZeRO 2 divides the gradient by the accumulation
        # steps in spite of scale_wrt_gas.
        self.engine.backward(loss.clone(), scale_wrt_gas=False)
        at(Place.UPDATE)
        try:
            self.engine.step()
        except Exception as error:
            if "loss scale already at minimum" in str(error):  # a bare Exception of DeepSpeed's scaler
                raise TrainingError(
                    f"{self._step(opened.step + 1)}: fp16 overflows at the smallest loss scale. Lower optim.lr, or "
                    "use bf16."
                ) from error
            raise
        opened.sums += sums

    def end(self, opened: OpenStep, *, data_wait_seconds: float) -> StepResult:
        """What the step leaves.

        Raises:
            TrainingError: as `step`.
        """
        skipped = self.engine.skipped_steps > opened.skipped_before
        bad_here = torch.where(torch.isfinite(opened.sums), math.inf, opened.step + 1.0)
        self._first_bad_step = torch.minimum(self._first_bad_step, bad_here)
        if skipped:  # DeepSpeed skips NaN in silence, as it does an overflow; all ranks see the same counter
            self.refuse_non_finite()
            if not self.may_overflow:
                where = self._step(opened.step + 1)
                raise TrainingError(f"{where}: the gradient is not finite, though every loss term is.")
        return StepResult(opened.sums, opened.lr, self.engine.get_global_grad_norm(), skipped, data_wait_seconds)

    def teach(self, batch: Batch) -> TeacherOutput | None:
        """What the student learns from in these blocks at the step turned to; None where no term needs a teacher."""
        (taught,) = lessons(self.teacher, [self.loss], batch)
        return taught

    def _step(self, step: int | float) -> str:
        """A step, and which student's where there are several."""
        return f"{self.student}, step {step:.0f}" if self.student else f"step {step:.0f}"

    def refuse_non_finite(self) -> None:
        """Raise TrainingError on every rank where a loss term was not finite on one; waits for the device.

        Called at logging steps, before every save and where DeepSpeed skipped a step, so that no other step waits.
        """
        at(Place.FIGURES)
        steps = torch.zeros(self.cut.world_size, len(TERMS), dtype=torch.float64, device=self.device)
        steps[self.cut.rank] = torch.where(torch.isinf(self._first_bad_step), 0.0, self._first_bad_step)
        found = all_reduce_sum(steps).tolist()
        bad = [(step, rank) for rank, row in enumerate(found) for step in row if step]
        if bad:
            step, rank = min(bad)
            terms = [term for term, at in zip(TERMS, found[rank], strict=True) if at == step]
            raise TrainingError(
                f"{self._step(step)}: loss term {', '.join(terms)} is not finite on rank {rank}. The weights of the "
                "last checkpoint are good. Lower optim.lr, raise optim.warmup, or look at the step's text."
            )


def step_together(steppers: Sequence[Stepper], step: int, batches: Iterator[Batch]) -> list[StepResult]:
    """Take step `step`, counted from 0, with each of these students on the same next batches of this rank.

    The teacher sees a micro-batch once, and all learn from what it says there; then that is dropped, so that never more
    than one lesson is kept. Each student computes what it would alone. All have one teacher, cut and device.

    Raises:
        TrainingError: as `Stepper.step`.
    """
    opened, waited = [stepper.begin(step) for stepper in steppers], 0.0
    for micro in range(steppers[0].cut.accumulation):
        at(Place.READING, step=step + 1, micro=micro * len(steppers))
        started = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - started
        _learn_together(steppers, opened, micro, batch.to(steppers[0].device))
    ended = zip(steppers, opened, strict=True)
    return [stepper.end(own, data_wait_seconds=waited) for stepper, own in ended]


def _learn_together(steppers: Sequence[Stepper], opened: Sequence[OpenStep], micro: int, batch: Batch) -> None:
    taught = lessons(steppers[0].teacher, [stepper.loss for stepper in steppers], batch)
    first = micro * len(steppers)
    for number, (stepper, own) in enumerate(zip(steppers, opened, strict=True)):
        stepper.learn(own, micro, batch, taught[number], move=first + number)
