"""Layers on a CPU: dropout of our own, attention in plain products, weights packed once.

torch draws dropout's numbers slowly on a CPU and has no fused attention with dropout there, which took a fifth of a
step at 512 tokens a sequence; its fused attention without dropout is slower in bf16 than the products it stands
for; and at each product oneDNN brings a weight into an order of its own, though a teacher's never changes. CUDA has
better of all three, and torch.compile writes its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from distilcb.models.dropout import scale_of_kept, sign_dropped, softmax_backward, softmax_in_place

_ATTENTION = "distilcb_cpu"


def use_cpu_training(model: Any) -> None:
    """Have a transformers model on a CPU drop hidden states and attention weights this way.

    Its weights stay as they are, and so does what it computes without dropout, but for bf16's rounding.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is torch.nn.Dropout:
                setattr(parent, name, Dropout(child.p))
    _use_attention(model)


def use_cpu_inference(model: Any, layers: torch.nn.ModuleList) -> None:
    """Have a frozen transformers model on a CPU compute its `layers` this way for good; without bf16 it stays as it is.

    Packed weights take the place of the plain ones. From then on the layers can only be run: not copied, hashed, saved
    or moved.
    """
    if model.dtype != torch.bfloat16 or not _packs_bf16():
        return
    for layer in layers:  # one at a time, so that no more than its plain weights lie beside the packed ones
        for parent in list(layer.modules()):
            for name, child in parent.named_children():
                if type(child) is torch.nn.Linear:
                    setattr(parent, name, PackedLinear(child.weight, child.bias))
                elif type(child) is Conv1D:
                    setattr(parent, name, PackedLinear(child.weight.t(), child.bias))
    _use_attention(model)


def _packs_bf16() -> bool:
    """Whether this torch, on this CPU, has the operators that torch.compile too puts in a frozen Linear's place."""
    operators = torch.ops.mkldnn
    wanted = ("_is_mkldnn_bf16_supported", "_reorder_linear_weight", "_linear_pointwise")
    return all(hasattr(operators, name) for name in wanted) and bool(operators._is_mkldnn_bf16_supported())


def _use_attention(model: Any) -> None:
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(_ATTENTION, _attention_of_a_model)
        AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
        model.set_attn_implementation(_ATTENTION)


class PackedLinear(torch.nn.Module):
    """A bf16 Linear that is never trained, its weight in the order in which oneDNN multiplies."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """weight: (out, in). bias: (out,) or None. Neither is kept."""
        super().__init__()
        self.register_buffer("packed", torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, values: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        return torch.ops.mkldnn._linear_pointwise(values, self.packed, self.bias, "none", [], "")


class Dropout(torch.nn.Dropout):
    """torch.nn.Dropout with another source of chance."""

    def forward(self, values: Tensor) -> Tensor:
        """`values`, of any shape and floating type."""
        if not self.training or self.p == 0:
            return values
        kept = torch.full_like(
            values, scale_of_kept(self.p), requires_grad=False, memory_format=torch.contiguous_format
        )
        return values * sign_dropped(kept, self.p).clamp_(min=0)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float, causal: bool = False
) -> Tensor:
    """softmax(query key' scaling) with dropout, times value; of shape (sequences, heads, tokens, size of a head) all.

    causal: a token looks at itself and those before. The weights are kept for the backward pass, and nothing else of
    their size: 2 bytes a pair of tokens in bf16.
    """
    return _Attention.apply(query, key, value, dropout, scaling, causal)


class _Attention(torch.autograd.Function):
    """The sign of a kept weight says whether it was dropped, so that one tensor holds both."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float, causal: bool
    ) -> Tensor:
        """As `attention`."""
        weights = sign_dropped(_weights(query, key, scaling, causal=causal), dropout)
        ctx.save_for_backward(query, key, value, weights)
        ctx.scale, ctx.scaling = scale_of_kept(dropout), scaling
        return (weights.relu() @ value).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Those of query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        gradient = gradient * ctx.scale
        by_value = weights.relu().transpose(-1, -2) @ gradient
        by_score = softmax_backward(gradient @ value.transpose(-1, -2), weights)
        by_query = (by_score @ key).mul_(ctx.scaling)
        by_key = (by_score.transpose(-1, -2) @ query).mul_(ctx.scaling)
        return by_query, by_key, by_value, None, None, None


def _attention_of_a_model(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; whatever this room has no faster way for takes transformers' own.

    others: no supported family hands over any that changes what is computed.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if attention_mask is None and query.shape == key.shape:
        if dropout > 0:
            return attention(query, key, value, dropout=dropout, scaling=scale, causal=causal).transpose(1, 2), None
        if query.dtype == torch.bfloat16 and not causal and not torch.is_grad_enabled():
            return (_weights(query, key, scale) @ value).transpose(1, 2), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **others
    )


def _weights(query: Tensor, key: Tensor, scaling: float, *, causal: bool = False) -> Tensor:
    """Each token's shares in those that it looks at; (sequences, heads, tokens, tokens)."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if causal:
        scores += torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu_(1)
    return softmax_in_place(scores)
