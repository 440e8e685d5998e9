"""Parameter groups, the optimizer, and the learning rate as a function of the step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distilcb.config import OptimConfig
from distilcb.distributed import device
from distilcb.engine.lamb import ShardedLamb
from distilcb.errors import LaunchError, first_line


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and biases and layer norms, which do not. Frozen weights are left out."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]


def build_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer that `optim.name` asks for.

    Raises:
        LaunchError: DeepSpeed's fused Adam cannot be compiled.
    """
    groups = parameter_groups(model, optim.weight_decay)
    settings: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps}
    if optim.name == "adamw_torch":
        return torch.optim.AdamW(groups, fused=True, **settings)
    if optim.name == "lamb":
        return ShardedLamb(groups, **settings)
    from deepspeed.ops.adam import FusedAdam

    try:
        optimizer = FusedAdam(groups, adam_w_mode=True, **settings)
    except Exception as error:  # DeepSpeed raises many kinds while it compiles
        raise LaunchError(
            f"DeepSpeed's fused Adam cannot be compiled or loaded here ({first_line(error)}). Needed: ninja and a C++ "
            "compiler (apt-get install g++, or module load gcc); for a GPU also nvcc, of torch's CUDA version. Or take "
            "torch's own optimizer: --optim.name adamw_torch."
        ) from error
    if device().type == "cpu":
        optimizer.multi_tensor_adam = _forgetful(optimizer.multi_tensor_adam)
    return optimizer


def _forgetful(kernel: Callable[..., None]) -> Callable[..., None]:
    """DeepSpeed's CPU kernel of Adam, made a function of its arguments.

    It carries beta^step along as a running product, in a place that all optimizers of a process share; a resumed run
    starts from the power, which differs in the last bit (tests/distributed/test_engine.py). Asked for step 0 in
    between, here on a number that nobody reads, it takes the power every time. The CUDA kernel does so by itself.
    """
    nobody = [[torch.zeros(1)] for _ in range(4)]

    def step(chunk_size: int, noop_flag: Tensor, tensors: list[list[Tensor]], *settings: Any) -> None:
        lr, beta1, beta2, eps, _step, mode, _bias_correction, weight_decay = settings
        kernel(chunk_size, noop_flag, nobody, lr, beta1, beta2, eps, 0, mode, 0, weight_decay)
        kernel(chunk_size, noop_flag, tensors, *settings)

    return step


def warmup_steps(optim: OptimConfig, steps: int) -> int:
    """Steps over which the rate rises: a share of all where optim.warmup is below 1, else their number."""
    return round(optim.warmup * steps) if optim.warmup < 1 else round(optim.warmup)


def learning_rate(optim: OptimConfig, *, step: int, steps: int) -> float:
    """The rate of optimizer step `step`, counted from 0, of `steps`.

    A function of the step, not a scheduler with state: DeepSpeed's does not advance on steps that an fp16 overflow
    skips, and a resumed run would have to trust what it saved.
    """
    warmup = warmup_steps(optim, steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, steps - warmup)
    return optim.lr * (1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
