"""A softmax on a CPU, dropout's chance kept in its signs, and the gradient of both: C++ (dropout.cpp), or torch.

torch draws a Bernoulli number on a CPU in 6 to 12 ns. Here 64 random bits serve four numbers, and which bits is a
function of one seed and the number's place, so that threads draw side by side and both ways draw the same.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from distilcb.native import library

# 15 bits of a random number choose: dropout is to the nearest of so many probabilities (0.1 is 0.100006).
_CHOICES = 1 << 15
_COUNT, _THREADS, _POINTER, _BITS = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint64
_SIGN = {torch.bfloat16: "16_bits", torch.float16: "16_bits", torch.float32: "32_bits"}
_ROWS = {torch.bfloat16: "bf16", torch.float32: "fp32"}
# SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014): its step, and the shifts
# and factors that mix a state.
_STEP = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def sign_dropped(values: Tensor, dropout: float) -> Tensor:
    """Give each number of `values`, none negative, a minus with probability `dropout`, in place.

    Takes one number of torch's generator, whatever the type and size.

    Args:
        values: contiguous, of any shape and floating type.
        dropout: from 0 to under 1.
    """
    seed = int(torch.empty((), dtype=torch.int64).random_())
    drops = _drops(dropout)
    count = values.numel()
    if sign := _compiled("sign", _SIGN.get(values.dtype), [_POINTER, _COUNT, _BITS, _BITS, _THREADS]):
        sign(values.data_ptr(), count, seed, drops, torch.get_num_threads())
        return values
    chances = _words(seed, (count + 3) // 4).view(torch.int16)[:count].view(values.shape)
    chances.bitwise_and_(_CHOICES - 1).sub_(drops)
    # A floating type of 16 bits has its sign where the integer has it; turning one into the other is slow.
    signs = chances.view(values.dtype) if values.itemsize == 2 else chances.to(values.dtype)
    return torch.copysign(values, signs, out=values)


def scale_of_kept(dropout: float) -> float:
    """What is kept is multiplied with, so that the mean stays."""
    return _CHOICES / (_CHOICES - _drops(dropout))


def softmax_in_place(scores: Tensor) -> Tensor:
    """The softmax over the last dimension, in place of `scores`: contiguous, of any floating type."""
    if softmax := _compiled("softmax", _ROWS.get(scores.dtype), [_POINTER, _COUNT, _COUNT, _THREADS]):
        length = scores.shape[-1]
        softmax(scores.data_ptr(), scores.numel() // length, length, torch.get_num_threads())
        return scores
    return torch.softmax(scores, -1, out=scores)


def softmax_backward(by_weight: Tensor, weights: Tensor) -> Tensor:
    """The gradient with respect to scores; that with respect to weights may be overwritten.

    Args:
        by_weight: (..., length) with respect to a softmax's results after dropout, before `scale_of_kept`; contiguous.
        weights: its results, likewise, after `sign_dropped`.
    """
    arguments = [_POINTER, _POINTER, _COUNT, _COUNT, _THREADS]
    if backward := _compiled("softmax_backward", _ROWS.get(weights.dtype), arguments):
        rows = (weights.numel() // weights.shape[-1], weights.shape[-1])
        backward(by_weight.data_ptr(), weights.data_ptr(), *rows, torch.get_num_threads())
        return by_weight
    kept = torch.ops.aten.threshold_backward(by_weight, weights, 0)
    return torch.ops.aten._softmax_backward_data(kept, weights.abs(), -1, weights.dtype)


def _compiled(what: str, numbers: str | None, arguments: list[Any]) -> Any | None:
    """A function of dropout.cpp; None where it is not compiled, or not for such numbers."""
    if numbers is None or (compiled := library()) is None:
        return None
    function = getattr(compiled, f"distilcb_{what}_{numbers}")
    function.argtypes, function.restype = arguments, None
    return function


def _drops(dropout: float) -> int:
    return min(round(dropout * _CHOICES), _CHOICES - 1)


def _words(seed: int, count: int) -> Tensor:
    """(count,) int64 random bits, as dropout.cpp has them; torch's integers overflow as C++'s unsigned ones do."""
    words = torch.arange(1, count + 1).mul_(_as_signed(_STEP)).add_(seed)
    for shift, factor in _MIXING:
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_as_signed(factor))
    return words


def _as_signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
