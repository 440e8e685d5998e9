"""The objective: named terms, their weights, the counts that they are divided by."""

from dataclasses import dataclass

from distilcb.config import LossConfig

TERMS = ("kl", "mlm", "cos", "mse", "clm", "relation")


@dataclass(frozen=True)
class Counts:
    """Rows of the global batch, the same in every step because blocks are full and masks of fixed size.

    labelled: masked rows; for a causal model the most that have a next token (`Batch.label_factor` has the rest).
    """

    attended: int
    labelled: int


@dataclass(frozen=True)
class Coefficients:
    """The factor of each term's sum: weight / global count, times the ranks over which DeepSpeed takes a mean."""

    kl: float
    mlm: float
    cos: float
    mse: float
    clm: float = 0.0
    relation: float = 0.0


def divisors(loss: LossConfig, counts: Counts) -> dict[str, int]:
    """The global count that each term's sum is divided by."""
    soft, labelled = counts.attended if loss.kl_positions == "attended" else counts.labelled, counts.labelled
    by = {"kl": soft, "mlm": labelled, "cos": counts.attended, "mse": soft, "clm": labelled}
    return by | {"relation": counts.attended}


def coefficients(loss: LossConfig, counts: Counts, *, world_size: int) -> Coefficients:
    """The factors for one global batch, known before any forward pass.

    DeepSpeed averages gradients over ranks, so `world_size` here makes the result the sum over ranks.
    """
    by = divisors(loss, counts)
    return Coefficients(**{term: getattr(loss, term) * world_size / by[term] for term in TERMS})


def weighted_loss(means: dict[str, float], loss: LossConfig) -> float:
    """The scalar that was optimised, from each term's mean."""
    return sum(getattr(loss, term) * means[term] for term in TERMS)


def active_terms(loss: LossConfig) -> tuple[str, ...]:
    """The terms whose weight is not zero, in the order of TERMS."""
    return tuple(term for term in TERMS if getattr(loss, term))
