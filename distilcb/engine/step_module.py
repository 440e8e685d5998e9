"""The module that DeepSpeed wraps: student, then streamed head, to one scalar.

The head runs inside, so that DeepSpeed's hooks, casting and gradient partitioning see all of the student's weights
used in one forward pass. The teacher's tensors come in as arguments: as an attribute the teacher would enter ZeRO
and the checkpoint.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distilcb.config import LossConfig
from distilcb.data.loader import Batch
from distilcb.losses.head import HeadCoefficients, streamed_head
from distilcb.losses.hidden import cosine_distance_sum
from distilcb.losses.relation import relation_sum
from distilcb.losses.triplet import TERMS, Coefficients
from distilcb.models.families import Family
from distilcb.models.projections import outputs_of
from distilcb.models.teacher import TeacherOutput


def soft_rows(batch: Batch, loss: LossConfig) -> Tensor | None:
    """The flattened rows that kl and mse are taken on, masked ones first; None where neither has a weight."""
    if not (loss.kl or loss.mse):
        return None
    if loss.kl_positions == "masked":
        return batch.labelled_rows
    return torch.cat([batch.labelled_rows, batch.other_rows])


class StepModule(nn.Module):
    """Student and objective."""

    def __init__(self, student: Any, family: Family, loss: LossConfig) -> None:
        super().__init__()
        self.student, self.family, self.loss = student, family, loss

    def forward(self, batch: Batch, teacher: TeacherOutput | None, coefficients: Coefficients) -> tuple[Tensor, Tensor]:
        """The weighted loss of one micro-batch, and the detached fp32 sums of each term in the order of TERMS."""
        with outputs_of(self._related_modules(coefficients)) as projections:
            states = self.family.encode(self.student, batch.input_ids)
        hidden = states.reshape(-1, states.shape[-1])
        zero = torch.zeros((), device=hidden.device)
        cosine = zero
        if coefficients.cos:
            assert teacher is not None
            assert teacher.hidden is not None
            cosine = cosine_distance_sum(hidden, teacher.hidden)
        loss, sums = coefficients.cos * cosine, {"cos": cosine.detach()}
        if coefficients.relation:
            assert teacher is not None
            assert teacher.projections is not None
            ours = [projections[kind] for kind in range(len(teacher.projections))]
            relation = relation_sum(ours, teacher.projections, heads=self.loss.relation_heads)
            loss = loss + coefficients.relation * relation
            sums["relation"] = relation.detach()
        if coefficients.kl or coefficients.mlm or coefficients.mse or coefficients.clm:
            head_loss, head_sums = self._head(hidden, batch, teacher, coefficients)
            loss = loss + head_loss
            sums |= head_sums
        return loss, torch.stack([sums.get(term, zero) for term in TERMS])

    def _related_modules(self, coefficients: Coefficients) -> dict[int, nn.Module]:
        """What makes queries, keys and values in the student's last layer, where its relations are learnt."""
        if not coefficients.relation:
            return {}
        last = len(self.family.layers(self.student)) - 1
        return dict(enumerate(self.family.projections(self.student, last)))

    def _head(
        self, hidden: Tensor, batch: Batch, teacher: TeacherOutput | None, coefficients: Coefficients
    ) -> tuple[Tensor, dict[str, Tensor]]:
        rows = soft_rows(batch, self.loss) if coefficients.kl or coefficients.mse else None
        wanted = batch.labelled_rows if rows is None else rows
        features = self.family.head_features(self.student, hidden.index_select(0, wanted))
        weight, bias = self.family.decoder(self.student)
        soft = None
        if rows is not None:
            assert teacher is not None
            assert teacher.features is not None
            soft = (teacher.features, *teacher.decoder)
        causal, factor = self.family.causal, batch.label_factor
        soft_factor = factor if self.loss.kl_positions == "masked" else 1.0
        loss, sums = streamed_head(
            features,
            weight,
            bias,
            labels=batch.labels,
            coefficients=HeadCoefficients(
                kl=coefficients.kl * soft_factor,
                mlm=(coefficients.clm if causal else coefficients.mlm) * factor,
                mse=coefficients.mse * soft_factor,
            ),
            temperature=self.loss.temperature,
            teacher=soft,
            teacher_logits=teacher.logits if teacher else None,
        )
        return loss, {
            "kl": sums.kl * soft_factor,
            "clm" if causal else "mlm": sums.mlm * factor,
            "mse": sums.mse * soft_factor,
        }
