"""The relation term: how alike a layer finds the tokens of a text, by its queries, keys and values.

Source: MiniLMv2, Wang et al. 2020, arXiv:2012.15828, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_PAIRS_AT_ONCE = 1 << 25
"""numbers of the matrices that are worked on together, about 22 bytes each"""


def relation_sum(student: Sequence[Tensor], teacher: Sequence[Tensor], *, heads: int) -> Tensor:
    """Sum over tokens of KL(teacher's relations || student's), mean over heads, sum over kinds; a scalar, fp32.

    A token's relations are softmax(a a' / sqrt(size of a head)) over the tokens of its block. The matrices, heads x
    tokens x tokens a block, are made again for the backward pass and not kept.

    Args:
        student: queries, keys and values of one layer, (blocks, tokens, hidden) each, hidden a multiple of `heads`.
        teacher: likewise of another layer, whose hidden size may differ; no gradient.
        heads: into how many parts hidden is cut, whatever the layers' attention has.
    """
    total = torch.zeros((), device=student[0].device)
    for ours, theirs in zip(student, teacher, strict=True):
        if ours.shape[:2] != theirs.shape[:2]:
            raise ValueError(f"student's projections {tuple(ours.shape)}, teacher's {tuple(theirs.shape)}")
        blocks = blocks_at_once(heads, ours.shape[1])
        for some, others in zip(ours.split(blocks), theirs.split(blocks), strict=True):
            total = total + checkpoint(_one_kind, some, others, heads, use_reentrant=False, preserve_rng_state=False)
    return total


def blocks_at_once(heads: int, tokens: int) -> int:
    """How many blocks' matrices are there together: what they take does not grow with the micro-batch."""
    return max(1, _PAIRS_AT_ONCE // (heads * tokens**2))


def _one_kind(student: Tensor, teacher: Tensor, heads: int) -> Tensor:
    with torch.no_grad():
        exact = _log_relations(teacher, heads)
    ours = _log_relations(student, heads)
    return torch.nn.functional.kl_div(ours, exact, reduction="sum", log_target=True) / heads


def _log_relations(states: Tensor, heads: int) -> Tensor:
    """(blocks, heads, tokens, tokens) fp32 logarithms of each token's relations."""
    parts = states.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = (parts * parts.shape[-1] ** -0.5) @ parts.transpose(-1, -2)
    return scores.float().log_softmax(-1)
