"""What the students of one step learn from: the teacher sees a micro-batch once, however many they are."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from distilcb.config import LossConfig
from distilcb.data.loader import Batch
from distilcb.engine.step_module import soft_rows
from distilcb.models.teacher import Projections, Teacher, TeacherOutput
from distilcb.watchdog import Place, at

# A micro-batch's teacher logits, rows x vocabulary, are kept for the students that follow up to here. Beyond it each
# head makes them again, which is less than a quarter of the teacher's work at CamemBERT's size.
_MOST_KEPT_BYTES = 1 << 30


def lessons(teacher: Teacher | None, losses: Sequence[LossConfig], batch: Batch) -> list[TeacherOutput | None]:
    """What students with these objectives learn from in a micro-batch, by one pass of the teacher; None where no term
    of theirs needs it."""
    if teacher is None or not any(loss.needs_teacher for loss in losses):
        return [None] * len(losses)
    at(Place.TEACHER)
    layers = {_relation_layer(teacher, loss) for loss in losses if loss.relation}
    hidden, projections = teacher.hidden_and_projections(batch.input_ids, layers)
    soft = {loss.kl_positions: loss for loss in losses if loss.kl or loss.mse}
    # Rows of another choice go through the teacher's head apart, though they are a part of the same ones: a product of
    # more rows may round otherwise, and every student is to learn what it would alone.
    by_positions: dict[str, _Soft] = {
        positions: _soft(teacher, hidden, batch, losses, loss) for positions, loss in soft.items()
    }
    return [
        _lesson(teacher, loss, hidden, by_positions, projections) if loss.needs_teacher else None for loss in losses
    ]


_Soft = tuple[Tensor, dict[int, Tensor] | None]


def _soft(teacher: Teacher, hidden: Tensor, batch: Batch, losses: Sequence[LossConfig], one: LossConfig) -> _Soft:
    """Features of the rows that `one` takes, and where several take them a place to keep their logits."""
    rows = soft_rows(batch, one)
    assert rows is not None
    features = teacher.features(hidden, rows)
    takers = [loss for loss in losses if (loss.kl or loss.mse) and loss.kl_positions == one.kl_positions]
    weight, _bias = teacher.decoder
    kept_bytes = len(rows) * weight.shape[0] * weight.itemsize
    return features, {} if len(takers) > 1 and kept_bytes <= _MOST_KEPT_BYTES else None


def _lesson(
    teacher: Teacher,
    loss: LossConfig,
    hidden: Tensor,
    by_positions: Mapping[str, _Soft],
    projections: Mapping[int, Projections],
) -> TeacherOutput:
    features, logits = by_positions[loss.kl_positions] if loss.kl or loss.mse else (None, None)
    related = projections[_relation_layer(teacher, loss)] if loss.relation else None
    return TeacherOutput(hidden if loss.cos else None, features, teacher.decoder, logits, related)


def _relation_layer(teacher: Teacher, loss: LossConfig) -> int:
    """Counted from 0."""
    return (loss.relation_layer or len(teacher.family.layers(teacher.model))) - 1
