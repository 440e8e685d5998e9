"""LAMB for optimizers whose weights ZeRO has flattened and cut into shards.

DeepSpeed's own FusedLamb takes each tensor that it is given for a layer. Under ZeRO 2 that is a rank's shard of all
matrices, so its trust ratio would be that of a mixture, and change with the number of ranks. Here each rank knows
which stretch of its shard belongs to which matrix, and ranks add up the squares before the ratio is taken.

Source: You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity for phi.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilcb.distributed import all_reduce_sum, device


@dataclass(frozen=True)
class _Stretch:
    """Part of a rank's shard: `count` numbers from `start` on, of matrix number `matrix` of the model."""

    matrix: int
    start: int
    count: int


class ShardedLamb(torch.optim.Optimizer):
    """Adam with bias correction, whose step is as long for each matrix as the matrix itself times the rate.

    Vectors (biases, layer norms) take Adam's own step, as in the paper's code. Until `learn_layout` is called, each
    matrix it was given is taken for a whole one.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        """groups: as `parameter_groups` makes them; those named "matrices" are scaled."""
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        (matrices,) = [group["params"] for group in self.param_groups if group["name"] == "matrices"]
        self._stretches = [_Stretch(number, 0, matrix.numel()) for number, matrix in enumerate(matrices)]
        self._matrices, self._is_sharded = len(matrices), False

    def learn_layout(self, module: Any) -> None:
        """Learn from DeepSpeed, once it has made its shards, what this rank holds of each matrix.

        module: the nn.Module whose parameters the groups were made of.
        """
        matrices = [weight for weight in module.parameters() if weight.requires_grad and weight.dim() > 1]
        self._stretches = []
        for number, matrix in enumerate(matrices):
            if (mapping := matrix._hp_mapping) is not None:  # None: all of it lies on other ranks
                address = mapping.get_hp_fragment_address()
                self._stretches.append(_Stretch(number, address.start, address.numel))
        self._matrices, self._is_sharded = len(matrices), True

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; on every rank together. DeepSpeed calls it for a group at a time."""
        assert closure is None
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            updates = [self._adam(weight, group) for weight in weights]
            if group["name"] == "matrices":
                self._scale(weights, updates)
            for weight, update in zip(weights, updates, strict=True):
                weight.add_(update, alpha=-group["lr"])

    def _adam(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        """Adam's direction, with decoupled decay."""
        assert weight.grad is not None
        state, (beta1, beta2) = self.state[weight], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        state["step"] += 1
        step = state["step"].item()
        gradient = weight.grad.to(weight.dtype)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = state["exp_avg"].div(spread).mul_(1 / (1 - beta1**step))
        return update.add_(weight, alpha=group["weight_decay"])

    def _scale(self, weights: list[Tensor], updates: list[Tensor]) -> None:
        """Make each matrix's update as long as the matrix; one of zeros keeps Adam's.

        A matrix whose gradient is 0 all over, as the head's is once no term needs it, stays: what is left of its
        momentum would be made as long as any other step.
        """
        squares = torch.zeros(3, self._matrices, dtype=torch.float64, device=device())
        gradients = [weight.grad.to(weight.dtype) for weight in weights if weight.grad is not None]
        for each in self._stretches:
            for row, tensors in enumerate((weights, updates, gradients)):
                norm = torch.linalg.vector_norm(self._cut(tensors, each))
                squares[row, each.matrix] = norm.double().square()
        if self._is_sharded:
            all_reduce_sum(squares)
        length, step, gradient = squares.sqrt().unbind()
        ratio = torch.where((length > 0) & (step > 0), length / step, 1.0)
        ratio = torch.where(gradient > 0, ratio, 0.0).float()
        for each in self._stretches:
            self._cut(updates, each).mul_(ratio[each.matrix])

    def _cut(self, tensors: list[Tensor], stretch: _Stretch) -> Tensor:
        whole = tensors[0] if self._is_sharded else tensors[stretch.matrix]
        return whole.view(-1).narrow(0, stretch.start, stretch.count)
