"""What a step of DeepSpeed's sends, against what the plan counts."""

from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch.distributed
from torch.utils._python_dispatch import TorchDispatchMode

from distilcb.data.loader import training_batches
from distilcb.plan.prediction import bytes_per_step

pytestmark = pytest.mark.launch

MICRO_BATCHES = 4
# Times what a tensor holds, (ranks - 1) / ranks of which a rank sends: an all-reduce is a reduction and a gathering.
SHARES = {"allreduce_": 2, "allgather_": 1, "_allgather_base_": 1, "reduce_": 1, "reduce_scatter_": 1}
SHARES |= {"_reduce_scatter_base_": 1, "broadcast_": 1}


class Sent(TorchDispatchMode):
    """Bytes that this rank sends by rings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, _, name = func.name().partition("::")
        if library == "c10d" and name != "barrier":
            ranks = torch.distributed.get_world_size()
            held = max(sum(tensor.nbytes for tensor in flat(given)) for given in args)
            self.bytes += SHARES[name] * held * (ranks - 1) / ranks
        return func(*args, **(kwargs or {}))


def flat(given: Any) -> list[Any]:
    """The tensors of an argument: of a list of lists too."""
    if isinstance(given, list | tuple):
        return [tensor for each in given for tensor in flat(each)]
    return [given] if isinstance(given, torch.Tensor) else []


def sent_and_planned(deepspeed: str) -> tuple[float, float]:
    """Bytes of one step on this rank."""
    config = tiny.tiny_config(global_batch=16 * MICRO_BATCHES, micro_batch=8, deepspeed=deepspeed)
    run = tiny.start(config)
    run.take(0, 1)
    batches = training_batches(run.micro_batches, first_step=1, last_step=2, workers=0, pin_memory=False)
    with Sent() as sent:
        run.stepper.step(1, batches)
    weights = [weight for weight in run.engine.module.parameters() if weight.requires_grad]
    sizes: Any = SimpleNamespace(student=SimpleNamespace(trained=sum(weight.numel() for weight in weights)))
    machine: Any = SimpleNamespace(gpus=torch.distributed.get_world_size())
    return sent.bytes, bytes_per_step(sizes, machine, width=weights[0].itemsize, micro_batches=MICRO_BATCHES)


@pytest.mark.parametrize("deepspeed", ["zero2_cpu", "zero2_bf16"])
def test_a_step_sends_what_the_plan_counts(run_on_ranks, deepspeed):
    for rank in run_on_ranks(sent_and_planned, 2, deepspeed=deepspeed):
        sent, planned = rank.result
        assert sent == pytest.approx(planned, rel=0.02)
