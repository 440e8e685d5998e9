"""How well masked or next words of held-out text are predicted, and how closely the student follows the teacher."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distilcb.data.loader import Batch, HeldoutBatches
from distilcb.distributed import all_reduce_sum
from distilcb.losses.head import rows_per_chunk
from distilcb.models.families import Family
from distilcb.watchdog import Place, at

Figures = dict[str, Any]
Rows = Callable[[slice], Tensor]
"""(rows, vocab) fp32 logarithms of probabilities, of some of a batch's labelled rows"""

# Columns of the sums that are reduced over ranks.
_COLUMNS = ("words", "student_nll", "student_right", "teacher_nll", "teacher_right", "kl", "agreement")


class InterruptedEvaluation(Exception):  # noqa: N818  (not an error)
    """The run is to stop, and an evaluation was not waited for."""


@torch.compiler.set_stance("force_eager")  # its shapes are not those that training compiled
@torch.no_grad()
def evaluate(
    student: Any,
    teacher: Any | None,
    family: Family,
    batches: HeldoutBatches,
    *,
    maskings: int,
    device: torch.device,
    interrupted: Callable[[], bool] = lambda: False,
    band_of: Tensor | None = None,
    answers: Callable[[Batch], Rows] | None = None,
) -> dict[str, Figures]:
    """Held-out figures of the student and, where there is one, of the teacher.

    Every figure is a mean over masked words under `maskings` fixed maskings of the same text; its standard error is
    that of the mean over maskings (it says nothing about other texts), of a ratio where they ask for unlike numbers of
    words, as a band's do. Of causal models it is a mean over the words that follow another one, and the text in so
    many parts gives the standard error. kl is KL(teacher || student) at temperature 1 in nats; agreement is the share
    of those words where both choose the same. Both models may be of different families; they are left in the mode
    they came in.

    Args:
        student, teacher: language models on `device`, both causal or neither.
        family: the student's.
        maskings: at least 2 for standard errors.
        interrupted: asked before each batch; where one rank is, all end together.
        band_of: (vocab,) int64 on `device`, from 0: the band in which each word counts. Then either's figures have
            "by_band", {band: figures} of those in which a word was asked for.
        answers: who answers in the student's place, such as its int8: the same vocabulary, on `device`.

    Raises:
        InterruptedEvaluation: on every rank.
    """
    was_training = student.training
    student.eval()
    parts = 1 + (0 if band_of is None else int(band_of.max()) + 1)  # all words, then each band
    asked = answers or partial(_answers, student, family)
    words = family.decoder(student)[0].shape[0]
    # One row more, whose first column counts the ranks that were interrupted.
    sums = torch.zeros(maskings * parts + 1, len(_COLUMNS), dtype=torch.float64, device=device)
    for number, batch in _numbered(batches, maskings):
        at(Place.EVALUATION)
        if interrupted():
            sums[-1, 0] = 1
            break
        own = sums[number * parts : (number + 1) * parts]
        own += _batch_sums(asked, words, teacher, batch.to(device), band_of, parts)
    student.train(was_training)
    at(Place.EVALUATION_SUMS)
    total = all_reduce_sum(sums).cpu()
    if total[-1, 0]:
        raise InterruptedEvaluation
    by_part = total[:-1].view(maskings, parts, -1).unbind(1)
    term = "clm" if family.causal else "mlm"
    found = _figures(by_part[0], with_teacher=teacher is not None, term=term)
    for band, of_band in enumerate(by_part[1:]):
        if of_band[:, 0].any():
            for who, figures in _figures(of_band, with_teacher=teacher is not None, term=term).items():
                found[who].setdefault("by_band", {})[band] = figures
    return found


def _numbered(batches: HeldoutBatches, maskings: int) -> Iterator[tuple[int, Batch]]:
    for number in range(maskings):
        for batch in batches.looking(number, of=maskings):
            yield number, batch


def _batch_sums(
    answers: Callable[[Batch], Rows],
    vocab_size: int,
    teacher: Any | None,
    batch: Batch,
    band_of: Tensor | None,
    parts: int,
) -> Tensor:
    """(parts, columns): the first row is of all words, the others are of each band; answers: the student's."""
    student_rows, device = answers(batch), batch.labels.device
    teacher_rows = None if teacher is None else _answers(teacher.model, teacher.family, batch)
    chunk = rows_per_chunk(vocab_size, device.type, batch.labels.numel())
    sums = torch.zeros(parts, len(_COLUMNS), dtype=torch.float64, device=device)
    for start in range(0, batch.labels.numel(), chunk):
        rows = slice(start, start + chunk)
        labels = batch.labels[rows]
        student_logs = student_rows(rows)
        nll, right, choice = _word_scores(student_logs, labels)
        zero = torch.zeros_like(nll)
        scores = [torch.full_like(nll, labels.numel()), nll, right, zero, zero, zero, zero]
        if teacher_rows is not None:
            teacher_logs = teacher_rows(rows)
            scores[3], scores[4], teacher_choice = _word_scores(teacher_logs, labels)
            scores[5] = (teacher_logs.exp() * (teacher_logs - student_logs)).sum()
            scores[6] = (choice == teacher_choice).sum()
        sums[0] += torch.stack([score.double() for score in scores])
        if band_of is not None:
            each = _own_scores(student_logs, None if teacher_rows is None else teacher_logs, labels)
            sums[1:].index_add_(0, band_of[labels], each)
    return sums


def _answers(model: Any, family: Family, batch: Batch) -> Rows:
    states = family.encode(model, batch.input_ids)
    rows = states.reshape(-1, states.shape[-1]).index_select(0, batch.labelled_rows)
    features = family.head_features(model, rows)
    weight, bias = family.decoder(model)
    return lambda some: torch.nn.functional.linear(features[some], weight, bias).float().log_softmax(-1)


def _word_scores(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Summed negative log-likelihood, number right, and the (rows,) choices."""
    choice = log_probs.argmax(-1)
    return -log_probs.gather(1, labels[:, None]).sum(), (choice == labels).sum(), choice


def _own_scores(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    """(rows, columns) fp64: what each row adds to the sums, of (rows, vocab) logarithms of probabilities."""
    found = torch.zeros(len(labels), len(_COLUMNS), dtype=torch.float64, device=labels.device)
    found[:, 0] = 1
    for column, logs in ((1, student), (3, teacher)):
        if logs is not None:
            found[:, column] = -logs.gather(1, labels[:, None])[:, 0]
            found[:, column + 1] = logs.argmax(-1) == labels
    if teacher is not None:
        found[:, 5] = (teacher.exp() * (teacher - student)).sum(-1)
        found[:, 6] = student.argmax(-1) == teacher.argmax(-1)
    return found


def _figures(sums: Tensor, *, with_teacher: bool, term: str) -> dict[str, Figures]:
    if term == "clm":
        sums = sums[sums[:, 0] > 0]  # a short text has less than a block for each part
    words = sums[:, 0]
    # A masking that asks for no word of a band has a share of nothing, and counts as one in the error.
    means = {name: sums[:, column] / words.clamp(min=1) for column, name in enumerate(_COLUMNS) if column}
    shares = words / words.sum()
    student = _prediction(means["student_nll"], means["student_right"], shares, term)
    if not with_teacher:
        return {"student": student}
    for name in ("kl", "agreement"):
        student[name] = _mean(means[name], shares)
        student["standard_error"][name] = _standard_error(means[name], shares)
    return {"student": student, "teacher": _prediction(means["teacher_nll"], means["teacher_right"], shares, term)}


def _mean(values: Tensor, shares: Tensor) -> float:
    return (values.mean() if _alike(shares) else (values * shares).sum()).item()


def _alike(shares: Tensor) -> bool:
    """Then torch's own mean and deviation are taken, whose last bits logged figures have."""
    return bool((shares == shares[0]).all())


def _prediction(nll: Tensor, right: Tensor, shares: Tensor, term: str) -> Figures:
    loss, error = _mean(nll, shares), _standard_error(nll, shares)
    perplexity = math.exp(min(loss, 700.0))
    return {
        f"{term}_loss": loss,
        "perplexity": perplexity,
        f"{term}_accuracy": _mean(right, shares),
        "standard_error": {
            f"{term}_loss": error,
            "perplexity": perplexity * error,
            f"{term}_accuracy": _standard_error(right, shares),
        },
    }


def _standard_error(values: Tensor, shares: Tensor) -> float:
    """That of a ratio of sums over parts (Cochran, Sampling Techniques, 6.4), which for like parts is a mean's."""
    count = len(values)
    if count < 2:
        return math.nan
    if _alike(shares):
        return (values.std(correction=1) / math.sqrt(count)).item()
    apart = shares * (values - (shares * values).sum())
    return (apart.square().sum() * count / (count - 1)).sqrt().item()
