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

# Bytes of one fp32 chunk of logits. On a CPU a chunk should stay near the caches, on a GPU it should fill the device.
CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}

# Leading dimension of the gradient buffer, in elements: the matrix products of CUDA want aligned rows, and
# CamemBERT's vocabulary of 32,005 is odd.
ROW_ALIGNMENT = 64

# Half-precision gradients of the logits are scaled so that their largest possible entry is about this. A row's
# entries add up to at most twice the largest, so the products back stay far below fp16's 65504, and probabilities
# down to 1e-10 do not vanish.
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


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows whose fp32 logits fill CHUNK_BYTES, at least 16."""
    return max(16, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


def streamed_head(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    labels: Tensor,
    coefficients: HeadCoefficients,
    temperature: float,
    teacher: tuple[Tensor, Tensor, Tensor | None] | None = None,
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
        soft_rows: kl and mse are taken on the first `soft_rows` rows; None: on all.
        chunk_rows: rows a chunk; None: by CHUNK_BYTES. The result depends on it by rounding only.

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
        chunk_rows or rows_per_chunk(weight.shape[0], features.device.type),
        torch.is_grad_enabled(),
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
        with torch.autocast(features.device.type, enabled=False):
            stream = _Stream(features, weight, bias, labels, teacher, pass_)
            for start in range(0, stream.rows, pass_.chunk_rows):
                stream.take_chunk(start, min(start + pass_.chunk_rows, stream.rows))
        if pass_.wants_gradient:
            bias_gradient = None if bias is None else stream.grad_bias
            ctx.save_for_backward(stream.grad_features, stream.grad_weight, bias_gradient)
            ctx.factor = stream.reference
            ctx.dtypes = (features.dtype, weight.dtype, None if bias is None else bias.dtype)
        sums = HeadSums(*stream.sums.unbind())
        ctx.mark_non_differentiable(sums.kl, sums.mlm, sums.mse)
        return pass_.coefficients.total(sums), sums.kl, sums.mlm, sums.mse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        # grad_loss carries the loss scale of fp16; applied here, in fp32, to gradients that had no count in them yet.
        factor = grad_loss.float() * ctx.factor
        gradients = [
            (gradient * factor).to(dtype) if needed and gradient is not None else None
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
        soft = pass_.soft_rows if c.kl or c.mse else 0
        hard = labels.numel() if c.mlm else 0
        self.soft_rows, self.hard_rows = soft, hard
        self.rows = max(soft, hard)  # rows beyond both need no product at all
        self.reference = max(c.kl, c.mlm, c.mse)
        device, fp32 = features.device, torch.float32
        self.sums = torch.zeros(3, device=device, dtype=fp32)
        if pass_.wants_gradient:
            self.grad_features = torch.zeros(features.shape, device=device, dtype=fp32)
            self.grad_weight = torch.zeros(weight.shape, device=device, dtype=fp32)
            self.grad_bias = torch.zeros(weight.shape[0], device=device, dtype=fp32)
            padded = -(-weight.shape[0] // ROW_ALIGNMENT) * ROW_ALIGNMENT
            shape = (min(pass_.chunk_rows, max(self.rows, 1)), padded)
            self.buffer = torch.empty(shape, device=device, dtype=features.dtype)

    def take_chunk(self, start: int, stop: int) -> None:
        """Add rows start..stop to the sums and the gradients."""
        student = _logits(self.features[start:stop], self.weight, self.bias)
        gradient = torch.zeros_like(student) if self.pass_.wants_gradient else None
        soft = min(stop, self.soft_rows) - start
        if soft > 0:
            assert self.teacher is not None
            features, weight, bias = self.teacher
            teacher = _logits(features[start : start + soft], weight, bias)
            self._add_soft_targets(student[:soft], teacher, gradient[:soft] if gradient is not None else None)
        hard = min(stop, self.hard_rows) - start
        if hard > 0:
            labels = self.labels[start : start + hard]
            self._add_labels(student[:hard], labels, gradient[:hard] if gradient is not None else None)
        if gradient is not None:
            self._carry_back(gradient, start, stop)

    def _add_soft_targets(self, student: Tensor, teacher: Tensor, gradient: Tensor | None) -> None:
        c, temperature = self.pass_.coefficients, self.pass_.temperature
        if c.mse:
            difference = student - teacher
            self.sums[2] += difference.square().sum()
            if gradient is not None:
                gradient.add_(difference, alpha=2 * c.mse / self.reference)
        if c.kl:
            student_log_probs = torch.log_softmax(student / temperature, dim=-1)
            teacher_log_probs = torch.log_softmax(teacher / temperature, dim=-1)
            teacher_probs = teacher_log_probs.exp()
            kl = torch.sum(teacher_probs * (teacher_log_probs - student_log_probs))
            self.sums[0] += temperature**2 * kl
            if gradient is not None:
                difference = student_log_probs.exp_().sub_(teacher_probs)
                gradient.add_(difference, alpha=temperature * c.kl / self.reference)

    def _add_labels(self, student: Tensor, labels: Tensor, gradient: Tensor | None) -> None:
        log_probs = torch.log_softmax(student, dim=-1)
        at_label = log_probs.gather(1, labels[:, None])
        self.sums[1] -= at_label.sum()
        if gradient is not None:
            share = self.pass_.coefficients.mlm / self.reference
            gradient.add_(log_probs.exp_(), alpha=share)
            gradient.scatter_add_(1, labels[:, None], torch.full_like(at_label, -share))

    def _carry_back(self, gradient: Tensor, start: int, stop: int) -> None:
        self.grad_bias += gradient.sum(0)
        scale = self._half_precision_scale(gradient)
        buffer = self.buffer[: stop - start, : gradient.shape[1]]
        buffer.copy_(gradient if scale is None else gradient * scale)
        back = _product(buffer, self.weight)
        weight_gradient = _product(buffer.t(), self.features[start:stop])
        self.grad_features[start:stop] = back if scale is None else back / scale
        self.grad_weight += weight_gradient if scale is None else weight_gradient / scale

    def _half_precision_scale(self, gradient: Tensor) -> Tensor | float | None:
        """A power of two that brings the largest possible entry near FP16_TARGET; None where range is no concern."""
        if self.features.dtype != torch.float16:
            return None
        c = self.pass_.coefficients
        if c.mse:  # unbounded, so the chunk itself must tell; stays on the device
            largest = gradient.abs().amax().clamp_min(1e-20)
            return torch.exp2(torch.floor(torch.log2(FP16_TARGET / largest)))
        bound = (self.pass_.temperature * c.kl + c.mlm) / self.reference
        return 2.0 ** int(torch.log2(torch.tensor(FP16_TARGET / bound)).floor())


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(rows, vocab) fp32. The product is rounded once to the models' dtype, as in the models themselves."""
    return torch.nn.functional.linear(features, weight, bias).float()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in fp32, from operands of any dtype: sums over rows or vocabulary may leave fp16's range."""
    if left.dtype == torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    if left.dtype == torch.float16:  # no CPU product of ours runs in fp16 but in tests
        return left.float() @ right.float()
    return (left @ right).float()
