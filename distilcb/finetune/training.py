"""One fine-tuning with transformers' Trainer, with or without a teacher's soft targets."""

import inspect
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from distilcb.finetune.objective import OBJECTIVES, Batch, Objective, Weights
from distilcb.machine import uses_cuda

log = logging.getLogger(__name__)

_READ = ("input_ids", "attention_mask", "token_type_ids")
_EVALUATED_AT_A_TIME = 32


@dataclass(frozen=True)
class Recipe:
    """How a model is fine-tuned: AdamW (betas 0.9 and 0.999, eps 1e-8, no decay), lr falling to 0 in a line.

    The defaults are those of the script that made the published DistilBERT on SQuAD.

    Attributes:
        epochs: passes over the training rows; may be a part of one.
        batch: sequences a step.
        warmup: share of the steps in which lr rises from 0.
        clip: largest norm of the gradient.
        by_length: batches of rows of like lengths, in an order that is drawn anew each pass: less padding.
    """

    epochs: float = 3.0
    lr: float = 5e-5
    batch: int = 8
    warmup: float = 0.0
    clip: float = 1.0
    by_length: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a training ended. diverged_at: the step after which the loss or a weight was no number, else None."""

    steps: int
    seconds: float
    curve: list[tuple[int, float]]
    diverged_at: int | None


def train(
    kind: str,
    load: Callable[[], Any],
    data: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    recipe: Recipe,
    seed: int,
    teacher: Any | None,
    weights: Weights,
    folder: Path,
    name: str,
) -> tuple["TaskTrainer", Outcome]:
    """A model that has been trained on `data`, in the trainer that did it.

    The labels alone, where there is no teacher; with one its soft targets too, by `weights`. What depends on the seed
    (new weights, order, dropout) is the same in both.

    Args:
        kind: a key of OBJECTIVES.
        load: makes the model, after the seed has been set.
        folder: the trainer's, which writes nothing there.
        name: for log lines.
    """
    set_seed(seed)
    watch = Watch(name)
    trainer = TaskTrainer(
        kind,
        teacher,
        weights,
        model=load(),
        args=arguments(recipe, seed=seed, folder=folder, sequences=len(data)),
        data_collator=collate,
        train_dataset=data,
        callbacks=[watch],
        by_length=recipe.by_length,
    )
    started = time.monotonic()
    trainer.train()
    steps = trainer.state.global_step
    diverged_at = watch.diverged_at
    if diverged_at is None and not all(bool(value.isfinite().all()) for value in trainer.trained.parameters()):
        diverged_at = steps
    return trainer, Outcome(steps, time.monotonic() - started, watch.curve, diverged_at)


def precision() -> str:
    """In what models are fine-tuned here: bf16 on CUDA, fp32 on a CPU."""
    return "bf16" if uses_cuda() else "fp32"


def arguments(recipe: Recipe, *, seed: int, folder: Path, sequences: int) -> TrainingArguments:
    """transformers' settings for a recipe: one device, nothing saved."""
    steps = math.ceil(recipe.epochs * math.ceil(sequences / recipe.batch))
    made = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=_EVALUATED_AT_A_TIME,
        learning_rate=recipe.lr,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(recipe.warmup * steps),
        weight_decay=0.0,
        max_grad_norm=recipe.clip,
        seed=seed,
        bf16=precision() == "bf16",
        use_cpu=not uses_cuda(),
        logging_steps=max(1, steps // 20),
        logging_nan_inf_filter=False,  # it would show the last good loss in place of one that is no number
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # teacher and student read different ones
        dataloader_pin_memory=uses_cuda(),
        disable_tqdm=not sys.stderr.isatty(),
    )
    made._n_gpu = min(made.n_gpu, 1)  # several would be driven by one process, which is slow and sees no teacher
    return made


class TaskTrainer(Trainer):
    """A Trainer whose loss is that of the labels, and where there is a teacher that of its soft targets too."""

    loss_is_scaled_for_ga = False

    def __init__(
        self, kind: str, teacher: Any | None, weights: Weights, *, by_length: bool = False, **settings: Any
    ) -> None:
        super().__init__(**settings)
        self._by_length = by_length
        self.remove_callback(PrinterCallback)
        self.objective: Objective = OBJECTIVES[kind]
        self.weights = weights
        self.teacher = teacher
        if teacher is not None:
            # Only the student runs under autocast.
            dtype = torch.bfloat16 if uses_cuda() else torch.float32
            teacher.to(self.args.device, dtype).eval().requires_grad_(False)

    @property
    def trained(self) -> Any:
        """The model itself, whatever the Trainer has wrapped around it."""
        return self.model

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The Trainer's own, or one by lengths whose order is the seed's alone: transformers' takes what random numbers
        the making of a model has left, and would also mix up the rows that are predicted."""
        if not self._by_length:
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            self.args.train_batch_size,
            lengths=lengths_of(self.train_dataset),
            generator=torch.Generator().manual_seed(self.args.seed),
        )

    def logits_of(self, data: Any) -> Any:
        """What the model says of each row, in their order: an array, or a tuple of some.

        Read in the order of their lengths, so that little is padded.
        """
        order = np.argsort(lengths_of(data), kind="stable")[::-1]
        said = self.predict(data.select(order)).predictions
        back = np.argsort(order)
        return tuple(each[back] for each in said) if isinstance(said, tuple) else said[back]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of a batch; while training, with soft targets."""
        output = model(**read_by(self.trained, inputs))
        loss = self.objective.hard(output, inputs)
        if self.teacher is not None and model.training:
            with torch.no_grad():
                targets = self.teacher(**read_by(self.teacher, inputs))
            soft = self.objective.soft(output, targets, inputs, self.weights.temperature)
            loss = self.weights.hard * loss + self.weights.soft * soft
        return (loss, output) if return_outputs else loss


def lengths_of(data: Any) -> list[int]:
    """Tokens of each row of a datasets.Dataset."""
    return list(map(len, data["input_ids"]))


def read_by(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What of a batch a model reads: a DistilBERT knows no segments, a CamemBERT only one."""
    known = inspect.signature(model.forward).parameters
    several = getattr(model.config, "type_vocab_size", 0) > 1
    return {name: batch[name] for name in _READ if name in batch and name in known and (several or name != _READ[2])}


class Watch(TrainerCallback):
    """Keeps the loss curve, says how far it is, and ends a training whose loss is no number."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.curve: list[tuple[int, float]] = []
        self.diverged_at: int | None = None

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer."""
        loss = kwargs["logs"].get("loss")
        if loss is None:
            return
        self.curve.append((state.global_step, float(loss)))
        if not math.isfinite(float(loss)) and self.diverged_at is None:
            self.diverged_at = state.global_step
            control.should_training_stop = True
        if not sys.stderr.isatty():
            log.info("%s: step %d of %d, loss %.3f", self.name, state.global_step, state.max_steps, float(loss))
