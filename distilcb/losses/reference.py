"""Each loss term in the plainest PyTorch there is: what the tests compare the fast code with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_kl(student_logits: Tensor, teacher_logits: Tensor, *, temperature: float) -> Tensor:
    """Sum over rows of T^2 KL(teacher || student), in nats.

    Args:
        student_logits: (rows, vocab), any float.
        teacher_logits: same shape, no gradient.
        temperature: T > 0; the factor T^2 keeps the size of gradients when it changes.

    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    teacher_log_probs = F.log_softmax(teacher_logits / temperature, dim=-1)
    student_log_probs = F.log_softmax(student_logits / temperature, dim=-1)
    per_token = teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)
    return temperature**2 * per_token.sum()


def masked_lm(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over rows of -log softmax(student_logits)[label], in nats. labels: (rows,) token ids."""
    return F.cross_entropy(student_logits, labels, reduction="sum")


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Sum over rows of the squared distance of raw logits."""
    return ((student_logits - teacher_logits) ** 2).sum()


def relation(student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int) -> Tensor:
    """Sum over tokens and kinds of KL(teacher's relations || student's), mean over heads.

    student, teacher: queries, keys and values of a layer, (blocks, tokens, hidden) each.

    Source: Wang et al. 2020, arXiv:2012.15828, section 3.1.
    """
    total = torch.zeros((), dtype=student[0].dtype)
    for ours, theirs in zip(student, teacher, strict=True):
        for one, other in zip(ours.chunk(heads, -1), theirs.chunk(heads, -1), strict=True):
            q, p = (F.softmax(x @ x.transpose(1, 2) / x.shape[-1] ** 0.5, -1) for x in (one, other))
            total = total + (p * (p.log() - q.log())).sum() / heads
    return total


def hidden_cosine(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Sum over rows of 1 - cosine of hidden states, (rows, hidden) each."""
    products = (student_hidden * teacher_hidden).sum(-1)
    norms = student_hidden.norm(dim=-1) * teacher_hidden.norm(dim=-1)
    return (1 - products / norms).sum()


def logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The whole (rows, vocab) matrix that the streamed head never makes."""
    return torch.nn.functional.linear(features, weight, bias)
