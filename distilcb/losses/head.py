"""The vocabulary head, streamed: KL, cross-entropy and logit MSE without a tensor of rows x vocabulary.

Rows are taken a chunk at a time. For each chunk: two matrix products make the student's and the teacher's logits,
one pass turns them into loss sums and the gradient with respect to the student's logits, two products carry that
gradient back to the features and the decoder. So the gradients are ready when the forward pass ends, and backward
only scales them. docs/objective.md derives the formulas and the scaling.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from distilcb.losses.logit_rows import LogitTerms, few_rows, take_rows

# Bytes of one fp32 chunk of logits. On a CPU a chunk should stay near the caches, on a GPU it should fill the device.
CHUNK_BYTES = {"cpu": 96 << 20, "cuda": 256 << 20}

# Words whose decoder gradient is made at once on a CPU, so that no product as large as the decoder is held beside it.
WORDS_AT_ONCE = 8192

# Leading dimension of the gradient buffer, in elements: the matrix products of CUDA want aligned rows, and
# CamemBERT's vocabulary of 32,005 is odd.
ROW_ALIGNMENT = 64

# fp16 gradients of the logits are scaled so that their largest possible entry is about this: far below 65504, and
# probabilities down to 1e-10 do not vanish. The products back are in fp32.
FP16_TARGET = 1024.0


@dataclass(frozen=True)
class HeadCoefficients:
    """What each sum is multiplied with: weight x ranks / global count. Known before the forward pass."""

    kl: float = 0.0
    mlm: float = 0.0
    mse: float = 0.0

    def total(self, sums: "HeadSums") -> Tensor:
        """The weighted scalar that these sums stand for."""
        return self.kl * sums.kl + self.mlm * sums.mlm + self.mse * sums.mse


@dataclass(frozen=True)
class HeadSums:
    """Unweighted fp32 sums over rows, scalars on the device, detached."""

    kl: Tensor
    mlm: Tensor
    mse: Tensor


def rows_per_chunk(vocab_size: int, device_type: str, rows: int | None = None) -> int:
    """Rows whose fp32 logits fill CHUNK_BYTES, at least 16; given `rows`, no more than share them out evenly."""
    most = max(16, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))
    if not rows:
        return most
    chunks = -(-rows // most)
    return -(-rows // chunks)


def streamed_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    coefficients: HeadCoefficients,
    temperature: float,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
    teacher_logits: dict[int, Tensor] | None = None,
    soft_rows: int | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, HeadSums]:
    """The weighted loss of the head, differentiable, and its unweighted sums.

    Args:
        features: (rows, hidden) what stands before the student's decoder. The rows with a label come first.
        weight: (vocab, hidden) the student's decoder.
        bias: (vocab,) or None.
        labels: (labelled,) int64 targets of the first rows; may be empty.
        coefficients: the factor of each sum. A term whose factor is 0 costs nothing and its sum is 0.
        temperature: T > 0 of the KL term, whose sum includes T^2.
        teacher: features (rows, teacher hidden), decoder weight and bias; needed for kl and mse.
        teacher_logits: of each chunk by its first row, where heads of several students are given the same features and
            chunks: those that are there are taken, the others made and left there. Together a tensor of soft rows x
            vocab. None: nothing is kept.
        soft_rows: kl and mse are taken on the first `soft_rows` rows; None: on all.
        chunk_rows: rows a chunk; None: by CHUNK_BYTES and the number of features, whichever terms there are. The result
            depends on it by rounding only.

    Raises:
        ValueError: shapes that do not fit, or kl or mse without a teacher.
    """
    if (coefficients.kl or coefficients.mse) and teacher is None:
        raise ValueError("kl and mse need the teacher's features and decoder")
    if labels.numel() > features.shape[0]:
        raise ValueError(f"{labels.numel()} labels for {features.shape[0]} rows")
    if teacher is not None and (teacher[0].shape[0] != features.shape[0] or teacher[1].shape[0] != weight.shape[0]):
        raise ValueError(
            f"teacher: {teacher[0].shape[0]} rows, vocabulary {teacher[1].shape[0]}; "
            f"student: {features.shape[0]} rows, vocabulary {weight.shape[0]}"
        )
    pass_ = _Pass(
        coefficients,
        temperature,
        features.shape[0] if soft_rows is None else soft_rows,
        chunk_rows or rows_per_chunk(weight.shape[0], features.device.type, features.shape[0]),
        torch.is_grad_enabled(),
        teacher_logits,
    )
    loss, *sums = _StreamedHead.apply(features, weight, bias, labels, teacher, pass_)  # type: ignore[no-untyped-call]
    return loss, HeadSums(*sums)


@dataclass(frozen=True)
class _Pass:
    coefficients: HeadCoefficients
    temperature: float
    soft_rows: int
    chunk_rows: int
    wants_gradient: bool
    kept_logits: dict[int, Tensor] | None


class _StreamedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        pass_: _Pass,
    ) -> tuple[Tensor, ...]:
        """Loss and sums, scalars; the gradients are ready when it returns."""
        with torch.autocast(features.device.type, enabled=False):
            stream = _Stream(features, weight, bias, labels, teacher, pass_)
            for start in range(0, stream.rows, pass_.chunk_rows):
                stream.take_chunk(start, min(start + pass_.chunk_rows, stream.rows))
        if pass_.wants_gradient:
            ctx.save_for_backward(stream.grad_features, stream.grad_weight, stream.grad_bias)
            ctx.factor = stream.reference
            ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        sums = HeadSums(*stream.sums.unbind())
        ctx.mark_non_differentiable(sums.kl, sums.mlm, sums.mse)
        return pass_.coefficients.total(sums), sums.kl, sums.mlm, sums.mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        """Those of features, decoder and bias, scaled by the incoming one."""
        # grad_loss carries the loss scale of fp16; applied here, in fp32, to gradients that had no count in them yet.
        factor = grad_loss.float() * ctx.factor
        gradients = [
            _scaled(gradient, factor, dtype) if needed and dtype else None
            for gradient, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
        ]
        return (*gradients, None, None, None)


class _Stream:
    """The accumulators of one forward pass. Gradients are kept divided by `reference`, the largest coefficient."""

    def __init__(
        self,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: tuple[Tensor, Tensor, Tensor | None] | None,
        pass_: _Pass,
    ) -> None:
        self.features, self.weight, self.bias = features, weight, bias
        self.labels, self.teacher, self.pass_ = labels, teacher, pass_
        c = pass_.coefficients
        self.soft_rows = pass_.soft_rows if c.kl or c.mse else 0
        self.hard_rows = labels.numel() if c.mlm else 0
        self.rows = max(self.soft_rows, self.hard_rows)  # rows beyond both need no product at all
        self.reference = max(c.kl, c.mlm, c.mse)
        device, fp32 = features.device, torch.float32
        self.sums = torch.zeros(3, device=device, dtype=fp32)
        if not self.rows:
            self.reference = 0.0
        share = 1 / self.reference if self.reference else 0.0
        self.terms = LogitTerms(c.kl * share, c.mlm * share, c.mse * share, pass_.temperature)
        chunk = min(pass_.chunk_rows, self.rows)
        self.student_logits = _logit_buffer(chunk, weight)
        self.teacher_logits = _logit_buffer(0 if pass_.kept_logits is not None else min(chunk, self.soft_rows), weight)
        if pass_.wants_gradient:
            self.grad_features = torch.zeros(features.shape, device=device, dtype=fp32)
            self.grad_weight = None if self.rows else torch.zeros(weight.shape, device=device, dtype=fp32)
            self.grad_bias = None if bias is None else torch.zeros(weight.shape[0], device=device, dtype=fp32)

    def take_chunk(self, start: int, stop: int) -> None:
        """Add rows start..stop to the sums and the gradients."""
        student = _logits(self.features[start:stop], self.weight, self.bias, self.student_logits)
        soft, teacher = min(stop, self.soft_rows) - start, None
        if soft > 0:
            teacher = self._taught(start, soft)
        labels, wants = self.labels[start : min(stop, self.hard_rows)], self.pass_.wants_gradient
        scale = self._half_precision_scale(student, teacher) if wants else None
        columns = self.grad_bias if wants else None
        self.sums += take_rows(student, teacher, labels, self.terms, scale=scale, wants_gradient=wants, columns=columns)
        if wants:
            self._carry_back(student, scale, start, stop)

    def _taught(self, start: int, rows: int) -> Tensor:
        """(rows, vocab) the teacher's logits from row `start` on."""
        assert self.teacher is not None
        features, weight, bias = self.teacher
        kept = self.pass_.kept_logits
        if kept is None:
            return _logits(features[start : start + rows], weight, bias, self.teacher_logits)
        if start not in kept:
            kept[start] = _logits(features[start : start + rows], weight, bias, _logit_buffer(rows, weight))
        assert len(kept[start]) == rows  # as all students cut the same features alike
        return kept[start]

    def _carry_back(self, gradient: Tensor, scale: Tensor | None, start: int, stop: int) -> None:
        back = _product(gradient, self.weight)
        self.grad_features[start:stop] = back if scale is None else back.div_(scale)
        self._add_weight_gradient(gradient, self.features[start:stop], scale)

    def _add_weight_gradient(self, gradient: Tensor, features: Tensor, scale: Tensor | None) -> None:
        is_first = self.grad_weight is None
        if self.grad_weight is None:
            self.grad_weight = torch.empty(self.weight.shape, device=gradient.device, dtype=torch.float32)
        words = WORDS_AT_ONCE if gradient.device.type == "cpu" else len(self.weight)
        for total, part in zip(self.grad_weight.split(words), gradient.split(words, dim=1), strict=True):
            product = _product(part.t(), features)
            if scale is not None:
                product.div_(scale)
            if is_first:  # not added to zeros: at 100 MB each, that is seen on a CPU
                total.copy_(product)
            else:
                _add_in_place(total, product)

    def _half_precision_scale(self, student: Tensor, teacher: Tensor | None) -> Tensor | None:
        """A power of two that brings the largest possible entry near FP16_TARGET; None where range is no concern."""
        if student.dtype != torch.float16:
            return None
        bound = self.terms.temperature * self.terms.kl + self.terms.mlm
        largest = torch.full((), bound, device=student.device, dtype=torch.float32)  # a copy would wait for the device
        if self.terms.mse and teacher is not None:  # unbounded, so the chunk itself must tell; stays on the device
            distance = (student[: len(teacher)].float() - teacher.float()).abs().amax()
            largest = largest + 2 * self.terms.mse * distance
        return torch.exp2(torch.floor(torch.log2(FP16_TARGET / largest.clamp_min(1e-20))))


def _logit_buffer(rows: int, weight: Tensor) -> Tensor:
    """(rows, vocab) in the models' dtype, with rows that begin at multiples of ROW_ALIGNMENT."""
    padded = -(-weight.shape[0] // ROW_ALIGNMENT) * ROW_ALIGNMENT
    return torch.empty(rows, padded, device=weight.device, dtype=weight.dtype)[:, : weight.shape[0]]


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None, buffer: Tensor) -> Tensor:
    """(rows, vocab) in `buffer`: the product rounded once to the models' dtype, as in the models themselves."""
    out = buffer[: len(features)]
    if bias is None:
        return torch.mm(features, weight.t(), out=out)
    return torch.addmm(bias, features, weight.t(), out=out)


def _add_in_place(total: Tensor, addend: Tensor) -> None:
    """total += addend, of fp32 and any dtype; (rows, columns) each."""
    # On a CPU torch first writes a whole fp32 copy of a half-precision addend: a few rows' stays in the cache.
    for part, more in zip(few_rows(total), few_rows(addend), strict=True):
        part.add_(more)


def _scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, of fp32, rounded once to `dtype`."""
    scaled = torch.empty_like(gradient, dtype=dtype)
    if gradient.dim() == 1:
        return torch.mul(gradient, factor, out=scaled)
    # A few rows at a time, as `_add_in_place`: torch makes a whole fp32 product first.
    for part, out in zip(few_rows(gradient), few_rows(scaled), strict=True):
        torch.mul(part, factor, out=out)
    return scaled


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, to be added to an fp32 tensor; in fp16 too its entries, sums over many, stay in range."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:  # no CPU product of ours runs in fp16 but in tests
        return left.float() @ right.float()
    return left @ right
