"""The streamed head beside plain PyTorch, and beside Liger-Kernel's nearest where it is installed.

python benchmarks/head.py [--quick] [--json FILE] [--report FILE]

From features of student and teacher to the loss and its gradients: time, peak memory, error against float64, and how
both grow with tokens and with the vocabulary.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from side_by_side import median_peaks, medians, parser_of, table, tell
from torch import Tensor

from distilcb import distributed
from distilcb.losses import reference
from distilcb.losses.head import HeadCoefficients, rows_per_chunk, streamed_head

HIDDEN, VOCAB, MASKED, TEMPERATURE = 768, 32_005, 0.15, 2.0
# DistilCamemBERT's weights, as sums over rows.
KL, MLM = 0.5, 0.2


@dataclass
class Head:
    """Random features, decoders and labels; logits spread as trained models spread them."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    teacher: tuple[Tensor, Tensor, Tensor]
    labels: Tensor
    coefficients: HeadCoefficients

    @classmethod
    def of(cls, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> "Head":
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

        decoders = [(draw(vocab, HIDDEN, scale=2 / HIDDEN**0.5), draw(vocab)) for _ in range(2)]
        labels = torch.randint(0, vocab, (round(MASKED * rows),), generator=generator).to(device)
        (weight, bias), teacher = decoders[0], (draw(rows, HIDDEN), *decoders[1])
        leaves = [leaf.requires_grad_() for leaf in (draw(rows, HIDDEN), weight, bias)]
        coefficients = HeadCoefficients(kl=KL / rows, mlm=MLM / len(labels))
        return cls(*leaves, teacher, labels, coefficients)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.features, self.weight, self.bias]

    def streamed(self, *, masked_only: bool = False) -> tuple[Tensor, ...]:
        rows = len(self.labels) if masked_only else None
        loss, _ = streamed_head(
            *self.leaves,
            labels=self.labels,
            coefficients=self.coefficients,
            temperature=TEMPERATURE,
            teacher=self.teacher,
            soft_rows=rows,
        )
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def plain(self) -> tuple[Tensor, ...]:
        """All logits at once, in fp32 once they are made, through torch's own functions."""
        student = reference.logits(*self.leaves).float()
        with torch.no_grad():
            teacher = reference.logits(*self.teacher).float()
        kl = reference.soft_target_kl(student, teacher, temperature=TEMPERATURE)
        mlm = reference.masked_lm(student[: len(self.labels)], self.labels)
        loss = self.coefficients.kl * kl + self.coefficients.mlm * mlm
        return (loss.detach(), *torch.autograd.grad(loss, self.leaves))

    def exact(self) -> tuple[Tensor, ...]:
        """As `plain`, in float64."""
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        teacher = tuple(part.double() for part in self.teacher)
        double = Head(*leaves, (teacher[0], teacher[1], teacher[2]), self.labels, self.coefficients)
        student, soft = reference.logits(*double.leaves), reference.logits(*double.teacher)
        loss = self.coefficients.kl * reference.soft_target_kl(student, soft, temperature=TEMPERATURE)
        loss = loss + self.coefficients.mlm * reference.masked_lm(student[: len(self.labels)], self.labels)
        return (loss.detach(), *torch.autograd.grad(loss, double.leaves))


def ligers_nearest(head: Head) -> Callable[[], Any] | None:
    """KL(teacher || student) and cross-entropy by Liger's chunked loss, hard labels on every row; None without it."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
    except ImportError:
        return None
    compiled = head.features.is_cuda
    loss_of = LigerFusedLinearJSDLoss(
        weight_hard_loss=MLM, weight_soft_loss=KL, beta=0.0, temperature=TEMPERATURE, compiled=compiled
    )
    target = torch.zeros(len(head.features), dtype=torch.int64, device=head.features.device)
    target[: len(head.labels)] = head.labels
    features, weight, bias = head.teacher

    def call() -> None:
        loss = loss_of(head.features, head.weight, features, weight, target, head.bias, bias)
        torch.autograd.grad(loss[0] if isinstance(loss, tuple) else loss, head.leaves)

    return call


def main(words: list[str]) -> None:
    options = parser_of(__doc__ or "").parse_args(words)
    distributed.start()
    device = distributed.device()
    on_cuda = device.type == "cuda"
    dtype = torch.float16 if on_cuda else torch.bfloat16
    rounds = 3 if options.quick else 5
    sizes = (4096, 12_288) if on_cuda else (512, 1024) if options.quick else (1024, 2048, 4096)
    figures: dict[str, Any] = {"dtype": str(dtype), "hidden": HIDDEN}
    parts = [_sizes(sizes, VOCAB, dtype, device, rounds, figures), _errors(dtype, device, figures)]
    if not options.quick:
        parts.append(_vocabularies(sizes[0], dtype, device, rounds, figures))
    text = "\n\n".join(parts)
    tell("The streamed head", text, figures, options, "python benchmarks/head.py " + " ".join(words))
    distributed.stop()


def _sizes(
    sizes: tuple[int, ...],
    vocab: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    figures: dict[str, Any],
) -> str:
    rows = []
    for tokens in sizes:
        head = Head.of(tokens, vocab, dtype, device)
        contenders: dict[str, Callable[[], Any]] = {
            "plain": head.plain,
            "streamed": head.streamed,
            "streamed, masked rows": lambda head=head: head.streamed(masked_only=True),
        }
        if liger := ligers_nearest(head):
            contenders["Liger, hard labels on all rows"] = liger
        seconds = medians(contenders, rounds=rounds)
        memory = median_peaks(contenders)
        for name in contenders:
            speed, share = seconds["plain"] / seconds[name], memory[name] / memory["plain"]
            figures[f"{name}, {tokens} tokens"] = {
                "seconds": seconds[name],
                "peak_bytes": memory[name],
                "speed_over_plain": speed,
                "memory_share_of_plain": share,
            }
            cells = (f"{seconds[name] * 1e3:,.0f}", f"{speed:.2f}", f"{memory[name] / 1e6:,.0f}", f"{share:.2f}")
            rows.append((f"{tokens:,} tokens, {name}", *cells))
    chunk = rows_per_chunk(vocab, device.type)
    return (
        f"KL on all tokens and cross-entropy on {MASKED:.0%} of them, hidden {HIDDEN}, vocabulary {vocab:,}, {dtype}, "
        f"at most {chunk:,} rows a chunk; loss and gradients, median of {rounds} in turn (memory: 3).\n\n"
        + table(["", "ms", "speed, plain = 1", "peak MB beyond inputs", "memory, plain = 1"], rows)
    )


def _errors(dtype: torch.dtype, device: torch.device, figures: dict[str, Any]) -> str:
    head = Head.of(256, VOCAB, dtype, device)
    exact = head.exact()
    names = ("loss", "features", "decoder", "bias")
    rows = []
    for name, found in (("plain", head.plain()), ("streamed", head.streamed())):
        errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        figures[f"error, {name}"] = dict(zip(names, errors, strict=True))
        rows.append((name, *(f"{error:.1e}" for error in errors)))
    return f"Relative error against float64, 256 tokens, {dtype}:\n\n" + table(["", *names], rows)


def _vocabularies(tokens: int, dtype: torch.dtype, device: torch.device, rounds: int, figures: dict[str, Any]) -> str:
    rows = []
    for vocab in (32_005, 64_001, 119_547):
        head = Head.of(tokens, vocab, dtype, device)
        seconds = medians({"streamed": head.streamed}, rounds=rounds)["streamed"]
        memory = median_peaks({"streamed": head.streamed})["streamed"]
        figures[f"streamed, vocabulary {vocab}"] = {"seconds": seconds, "peak_bytes": memory}
        rows.append((f"{vocab:,}", f"{seconds * 1e3:,.0f}", f"{memory / 1e6:,.0f}"))
    return f"Growth with the vocabulary, {tokens:,} tokens:\n\n" + table(["vocabulary", "ms", "peak MB"], rows)


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
