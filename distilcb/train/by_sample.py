"""What each sample of a step contributes: its loss terms and the norm of its gradient, one sample at a time.

On a spare copy of the module, so that DeepSpeed's engine, which takes the step itself, is not touched.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from distilcb.config import LossConfig
from distilcb.data.loader import MicroBatches
from distilcb.distributed import all_reduce_sum
from distilcb.engine.step_module import StepModule
from distilcb.engine.stepper import Stepper
from distilcb.losses.triplet import TERMS, Counts, divisors
from distilcb.train.models import Models
from distilcb.watchdog import Place, at


@dataclass(frozen=True)
class BySample:
    """Figures of each sample of a global batch, in its order, and of all of them together; the same on every rank.

    terms: (samples, terms) float64 mean of each term over the sample's own rows, in the order of TERMS; as samples
        have equally many rows, the mean over samples is the step's.
    grad_norms: (samples,) float64 norm of the gradient of the sample's loss; the step's gradient is the mean of these
        gradients.
    grad_norm: the norm of that mean.
    """

    terms: Tensor
    grad_norms: Tensor
    grad_norm: float


def spare_module(models: Models, loss: LossConfig) -> StepModule:
    """A copy of the module before DeepSpeed wraps it; `take_weights` gives it those of a step."""
    return StepModule(copy.deepcopy(models.student), models.family, loss)


def take_weights(spare: StepModule, module: StepModule) -> None:
    """Bring a spare module to another's device, precision and weights, without dropout."""
    weight = next(module.student.parameters())
    spare.to(device=weight.device, dtype=weight.dtype).eval()
    spare.student.load_state_dict(module.student.state_dict())


@torch.compiler.set_stance("force_eager")  # one sample is another shape than what training compiled
def figures_by_sample(
    spare: StepModule,
    stepper: Stepper,
    micro_batches: MicroBatches,
    counts: Counts,
    *,
    step: int,
    loss_scale: float = 1.0,
) -> BySample:
    """Figures of step `step`, counted from 0, at the spare module's weights; every rank takes its own samples.

    Args:
        loss_scale: fp16's, which keeps gradients in range here as it does in the step itself.
    """
    cut, device = stepper.cut, stepper.device
    stepper.turn_to(step)
    weights = [weight for weight in spare.parameters() if weight.requires_grad]
    total = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    figures = torch.zeros(cut.global_batch, len(TERMS) + 1, dtype=torch.float64, device=device)
    for micro in range(cut.accumulation):
        for position in cut.positions(step, micro):
            batch = micro_batches.at(position[None]).to(device)
            taught = stepper.teach(batch)
            at(Place.FORWARD, step=step + 1, micro=micro)  # a move for the watchdog, also where nobody teaches
            loss, sums = spare(batch, taught, stepper.coefficients)
            gradient = torch.autograd.grad(loss * loss_scale, weights, allow_unused=True, materialize_grads=True)
            for whole, part in zip(total, gradient, strict=True):
                whole += part
            figures[position % cut.global_batch, :-1] = sums
            figures[position % cut.global_batch, -1] = _norm(gradient)
    # The coefficients are those of one rank's share of the global batch, times the ranks over which DeepSpeed takes
    # the mean.
    to_step = 1.0 / (loss_scale * cut.world_size)
    by = divisors(stepper.loss, counts)
    rows = torch.tensor([by[term] for term in TERMS], dtype=torch.float64) / cut.global_batch
    figures = all_reduce_sum(figures).cpu()
    grad_norm = float(_norm(tuple(all_reduce_sum(whole) for whole in total))) * to_step
    return BySample(figures[:, :-1] / rows, figures[:, -1] * to_step * cut.global_batch, grad_norm)


def _norm(tensors: tuple[Tensor, ...]) -> Tensor:
    """The norm of all of them together, float64 on the device."""
    # In fp32 torch's sum over two million entries is off by 3e-5 on a CPU.
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
