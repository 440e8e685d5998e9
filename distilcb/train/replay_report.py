"""What a replay found: the samples of its step, what was compared with metrics.jsonl, as text and as JSON."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from distilcb.data.marked_text import MaskedWord, mark
from distilcb.data.masking import Masked, Masking
from distilcb.losses.triplet import TERMS, active_terms, weighted_loss
from distilcb.train.build import Run
from distilcb.train.by_sample import BySample

# Characters of a sample's text in the table.
_SHORT_TEXT = 80


@dataclass(frozen=True)
class Sample:
    """One sample of a step.

    sample: its row among the training blocks. epoch: from 0. figures: grad_norm, loss, and loss/TERM of active terms.
    text: with masked words in brackets.
    """

    sample: int
    epoch: int
    figures: dict[str, float]
    text: str
    masked: list[MaskedWord]


@dataclass(frozen=True)
class Comparison:
    """Figures of steps first .. last, counted from 1, as metrics.jsonl has them and as they came out again."""

    first: int
    last: int
    logged: dict[str, Any]
    replayed: dict[str, Any]

    @property
    def differing(self) -> list[str]:
        """The names of figures that are not equal to the last bit."""
        return [name for name, value in self.replayed.items() if value != self.logged[name]]


@dataclass
class ReplayReport:
    """Filled as a replay goes on.

    started_from: steps that were done where it started. dropout: of the step; samples are looked at without.
    samples: the largest gradient first. together: their mean figures; grad_norm there is that of their mean gradient.
    taken: the figures of the step as it was taken; None where it could not be, for the reason in `fault`.
    """

    run: str
    step: int
    started_from: int
    dropout: float
    samples: list[Sample] = field(default_factory=list)
    together: dict[str, float] = field(default_factory=dict)
    taken: dict[str, Any] | None = None
    comparison: Comparison | None = None
    fault: str | None = None

    def as_json(self) -> str:
        """All of it; a figure that is not finite is null."""
        document = asdict(self)
        if self.comparison:
            document["comparison"]["differing"] = self.comparison.differing
        return json.dumps(_without_infinity(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def as_table(self, *, worst: int | None = None, full: bool = False) -> str:
        """A line a sample, or of the worst few; full: with its whole text."""
        shown = self.samples[:worst]
        lines = [f"the {len(shown)} of {len(self.samples)} samples of step {self.step} with the largest gradients"]
        if len(shown) == len(self.samples):
            lines = [f"the {len(shown)} samples of step {self.step}, the largest gradient first"]
        if self.dropout:
            lines.append(f"without the step's dropout of {self.dropout:g}")
        lines.append("[word]: masked; [word→other]: another word in its place; [word=]: to be predicted as it stands")
        lines.append(_cells(self.together) + f"{'sample':>10}{'epoch':>7}  text")
        for each in shown:
            text = each.text if full or len(each.text) <= _SHORT_TEXT else f"{each.text[: _SHORT_TEXT - 1]}…"
            lines.append(_cells(self.together, each.figures) + f"{each.sample:>10}{each.epoch:>7}  {text}")
        lines.append(_cells(self.together, self.together) + "  all of them together")
        return "\n".join(lines)

    def verdict(self) -> str:
        """The figures of the step as it was taken, and what was compared."""
        assert self.taken is not None
        return "\n".join([_cells(self.together, self.taken) + f"  step {self.step} as taken", *self._compared()])

    def _compared(self) -> list[str]:
        c = self.comparison
        if c is None:
            return [f"nothing could be compared: metrics.jsonl has no line that holds step {self.step}"]
        said = f"DIFFERENT: {', '.join(c.differing)}" if c.differing else "all equal to the last bit"
        if c.first == c.last:
            return [f"compared with metrics.jsonl, where step {c.last} has its own line: {', '.join(c.replayed)}", said]
        of_last = [name for name in ("lr", "grad_norm", "loss_scale") if name in c.replayed]
        of_all = [name for name in c.replayed if name not in of_last]
        return [
            f"compared with metrics.jsonl, where steps {c.first} to {c.last} have one line: {', '.join(of_all)} of all "
            f"of them, {', '.join(of_last)} of step {c.last}",
            said,
        ]


def describe_samples(run: Run, figures: BySample, step: int) -> tuple[list[Sample], dict[str, float]]:
    """The samples of step `step`, counted from 1, the largest gradient first; and their figures together."""
    data, loss, size = run.micro_batches, run.config.loss, run.config.optim.global_batch
    positions = np.arange((step - 1) * size, step * size, dtype=np.int64)
    rows, epochs = data.order.row(positions), data.order.epoch(positions)
    blocks = data.blocks.read(rows)
    if isinstance(data.task, Masking):
        masked = data.task.apply(blocks, rows, epochs)
    else:  # a causal model reads the text as it is
        masked = Masked(blocks, np.empty((size, 0), dtype=np.int64), np.empty((size, 0), dtype=np.int64))

    def named(terms: Any, grad_norm: float) -> dict[str, float]:
        means = dict(zip(TERMS, terms.tolist(), strict=True))
        active = {f"loss/{term}": means[term] for term in active_terms(loss)}
        return {"grad_norm": grad_norm, "loss": weighted_loss(means, loss), **active}

    samples = []
    for i in range(size):
        text, words = mark(blocks[i], masked.input_ids[i], masked.positions[i], tokenizer=run.models.tokenizer)
        its_figures = named(figures.terms[i], float(figures.grad_norms[i]))
        samples.append(Sample(int(rows[i]), int(epochs[i]), its_figures, text, words))
    return worst_first(samples), named(figures.terms.mean(0), figures.grad_norm)


def worst_first(samples: list[Sample]) -> list[Sample]:
    """By the norm of their gradients, the largest first and before it what is not finite."""

    def badness(sample: Sample) -> float:
        grad_norm = sample.figures["grad_norm"]
        return grad_norm if math.isfinite(grad_norm) else math.inf

    return sorted(samples, key=badness, reverse=True)


def _cells(columns: dict[str, float], figures: dict[str, Any] | None = None) -> str:
    """A row of a table, or its head."""
    if figures is None:
        return "".join(f"{name:>10}" for name in columns)
    return "".join(f"{'-' if figures[name] is None else format(figures[name], '.4g'):>10}" for name in columns)


def _without_infinity(value: Any) -> Any:
    """The same with null for each number that JSON does not have."""
    if isinstance(value, dict):
        return {name: _without_infinity(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinity(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
