"""The teacher: frozen, half precision, inference only, and never part of engine or checkpoint."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from distilcb.models.families import Family, family_of
from distilcb.models.projections import outputs_of

Projections = tuple[Tensor, ...]
"""queries, keys and values of a layer, (blocks, tokens, hidden) each"""


@dataclass(frozen=True)
class TeacherOutput:
    """What the student learns from in one micro-batch; no gradient flows into it.

    hidden: (rows, hidden) last hidden states of every row, or None where no term needs them.
    features: (soft rows, hidden) what stands before the decoder, in the order of the rows asked for, or None.
    decoder: weight (vocab, hidden) and bias (vocab,) or None.
    logits: where several students learn from these features: what the first one's head makes of them, kept for the
        others (losses/head.py); None: nothing is kept.
    projections: of the layer that the student is to relate like, or None.
    """

    hidden: Tensor | None
    features: Tensor | None
    decoder: tuple[Tensor, Tensor | None]
    logits: dict[int, Tensor] | None = None
    projections: Projections | None = None


class Teacher:
    """Runs the teacher on a rank's own micro-batch.

    It holds the bare transformers model: `deepspeed.init_inference(..., replace_with_kernel_inject=False)` was tried
    and gave nothing measurable (docs/results/teacher_inference.md), and the bare module keeps the fast paths of its
    attention: SDPA's on CUDA, our own on a CPU (models/cpu_layers.py).
    """

    def __init__(self, model: Any) -> None:
        self.family: Family = family_of(model.config, where="teacher")
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()  # inference_mode's tensors cannot be saved for the cosine term's backward
    def hidden(self, input_ids: Tensor) -> Tensor:
        """(rows, hidden) last hidden states of (blocks, tokens) ids: nearly all of the teacher's work."""
        states = self.family.encode(self.model, input_ids)
        return states.reshape(-1, states.shape[-1])

    def hidden_and_projections(
        self, input_ids: Tensor, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Projections]]:
        """`hidden`, and by the same pass {layer: projections} of these layers, counted from 0."""
        modules = {
            (layer, kind): module
            for layer in layers
            for kind, module in enumerate(self.family.projections(self.model, layer))
        }
        with outputs_of(modules) as found:
            hidden = self.hidden(input_ids)
        return hidden, {layer: tuple(found[layer, kind] for kind in range(3)) for layer in layers}

    @torch.no_grad()
    def features(self, hidden: Tensor, soft_rows: Tensor) -> Tensor:
        """(soft rows, hidden) what stands before the decoder, for those rows of `hidden`."""
        return self.family.head_features(self.model, hidden.index_select(0, soft_rows))

    @property
    def nbytes(self) -> int:
        """Memory of its weights, which on a CPU may be packed and then are no parameters."""
        return sum(each.nbytes for each in chain(self.model.parameters(), self.model.buffers()))

    @property
    def decoder(self) -> tuple[Tensor, Tensor | None]:
        """Weight (vocab, hidden) and bias (vocab,) or None."""
        return self.family.decoder(self.model)
