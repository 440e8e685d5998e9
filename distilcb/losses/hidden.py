"""Losses between hidden states."""

import torch
from torch import Tensor


def cosine_distance_sum(student_hidden: Tensor, teacher_hidden: Tensor) -> Tensor:
    """Sum over rows of 1 - cosine(student, teacher), in fp32.

    Args:
        student_hidden: (rows, hidden), any float.
        teacher_hidden: same shape, no gradient.

    Source: Sanh et al. 2019, arXiv:1910.01108, section 2.
    """
    if student_hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"student hidden states {tuple(student_hidden.shape)}, teacher's {tuple(teacher_hidden.shape)}"
        )
    similarity = torch.nn.functional.cosine_similarity(student_hidden.float(), teacher_hidden.float(), dim=-1)
    return (1 - similarity).sum()
