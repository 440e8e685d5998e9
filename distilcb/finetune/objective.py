"""What a student learns from labels and from a teacher that has learnt the task: plain functions of logits.

Soft targets are T² KL(teacher || student) of distributions at temperature T, in nats, a mean over what is asked. All is
computed in fp32. Source: Sanh et al. 2019, arXiv:1910.01108, section 3, and their run_squad_w_distillation.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from distilcb.tasks.encoding import IGNORED

Batch = Mapping[str, Tensor]

# Tokens whose distributions over a vocabulary are compared at a time, and again in the backward pass: four copies of
# them in fp32, 0.4 GB with GPT-2's vocabulary.
_ROWS_AT_A_TIME = 512


@dataclass(frozen=True)
class Weights:
    """hard: of the labels; soft: of the teacher's targets; temperature: of those, above 0. The published ones."""

    hard: float = 0.5
    soft: float = 0.5
    temperature: float = 2.0


@dataclass(frozen=True)
class Objective:
    """The two losses of one kind of task, each (student's output, teacher's output or labels) -> a scalar.

    Attributes:
        hard: from the model's output and the batch.
        soft: from the outputs of student and teacher, the batch, and the temperature.
    """

    hard: Callable[[Any, Batch], Tensor]
    soft: Callable[[Any, Any, Batch, float], Tensor]


def soft_targets(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² KL(teacher || student) of each row, its mean over rows; 0 where there is none.

    Args:
        student, teacher: (rows, choices) logits, any float. A choice of -inf in both cannot be taken.
    """
    if not student.shape[0]:
        return student.sum() * 0.0
    lowest = torch.finfo(torch.float32).min  # of -inf the difference would be nan
    ours, theirs = ((each.float() / temperature).clamp(min=lowest).log_softmax(-1) for each in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def of_places(logits: Tensor, batch: Batch) -> Tensor:
    """(windows, tokens) logits in fp32, -inf at padding: no answer lies there."""
    return logits.float().masked_fill(batch["attention_mask"] == 0, -torch.inf)


def _hard_answer(output: Any, batch: Batch) -> Tensor:
    start = F.cross_entropy(of_places(output.start_logits, batch), batch["start_positions"])
    end = F.cross_entropy(of_places(output.end_logits, batch), batch["end_positions"])
    return (start + end) / 2


def _soft_answer(student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
    """Over all tokens that are there, those of the question too, as the labels' loss and the original have it."""
    start, end = (
        soft_targets(
            of_places(getattr(student, name), batch), of_places(getattr(teacher, name), batch), temperature=temperature
        )
        for name in ("start_logits", "end_logits")
    )
    return (start + end) / 2


def _hard_label(output: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(output.logits.float(), batch["labels"])


def _soft_label(student: Any, teacher: Any, _batch: Batch, temperature: float) -> Tensor:
    return soft_targets(student.logits, teacher.logits, temperature=temperature)


def _hard_score(output: Any, batch: Batch) -> Tensor:
    return F.mse_loss(output.logits.float()[:, 0], batch["labels"].float())


def _soft_score(student: Any, teacher: Any, _batch: Batch, _temperature: float) -> Tensor:
    """Squared distance to the teacher's score, which has no temperature."""
    return F.mse_loss(student.logits.float()[:, 0], teacher.logits.float()[:, 0])


def _hard_tag(output: Any, batch: Batch) -> Tensor:
    asked = batch["labels"] != IGNORED
    if not asked.any():  # words that a tokenizer makes nothing of
        return output.logits.sum() * 0.0
    return F.cross_entropy(output.logits[asked].float(), batch["labels"][asked])


def _soft_tag(student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
    """Over the tokens that have a label, one a word."""
    asked = batch["labels"] != IGNORED
    return soft_targets(student.logits[asked], teacher.logits[asked], temperature=temperature)


def _hard_next(output: Any, batch: Batch) -> Tensor:
    """labels: as a token's own label, so that the one before predicts it."""
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED)


def _soft_next(student: Any, teacher: Any, _batch: Batch, temperature: float) -> Tensor:
    """Over all tokens of the blocks, a few at a time."""
    ours, theirs = (each.logits.flatten(0, 1) for each in (student, teacher))
    compare = partial(soft_targets, temperature=temperature)
    total = ours.new_zeros((), dtype=torch.float32)
    for some, other in zip(ours.split(_ROWS_AT_A_TIME), theirs.split(_ROWS_AT_A_TIME), strict=True):
        total = total + checkpoint(compare, some, other, use_reentrant=False) * len(some)
    return total / len(ours)


OBJECTIVES = {
    "question_answering": Objective(_hard_answer, _soft_answer),
    "classification": Objective(_hard_label, _soft_label),
    "regression": Objective(_hard_score, _soft_score),
    "tagging": Objective(_hard_tag, _soft_tag),
    "causal": Objective(_hard_next, _soft_next),
}
