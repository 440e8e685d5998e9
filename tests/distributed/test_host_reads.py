"""Between two logging steps the host reads nothing from the device but what DeepSpeed itself reads.

On a GPU each such read waits until everything before it is done, and the device then idles until new work comes.
"""

from typing import Any

import pytest
import tiny
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distilcb.config import LossConfig
from distilcb.data.loader import training_batches
from distilcb.engine import deepspeed_config
from distilcb.engine.optimizer import build_optimizer

pytestmark = pytest.mark.launch

ACCUMULATION = 4
LOSSES = {
    "all three": LossConfig(),
    "on masked words": LossConfig(kl_positions="masked", mse=0.1),
}


class HostReads(TorchDispatchMode):
    """Counts what brings a number from a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # nonzero and masked_select have shapes that only the device knows.
        names = ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero")
        self.count += func.name().partition(".")[0] in names
        return func(*args, **(kwargs or {}))


def reads_of_a_step() -> dict[str, tuple[int, int]]:
    """(reads in a step of ours, those of them inside DeepSpeed's backward and step) by loss; and bare DeepSpeed's."""
    found = {}
    for name, loss in LOSSES.items():
        config = tiny.tiny_config(loss=loss, dropout=0.1, deepspeed="zero2_bf16")
        run = tiny.start(config)
        run.take(0, 2)
        batches = training_batches(run.micro_batches, first_step=2, last_step=3, workers=0, pin_memory=False)
        with HostReads() as reads:
            inside = 0
            for method in ("backward", "step"):
                inner = getattr(run.engine, method)

                def counted(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                    nonlocal inside
                    before = reads.count
                    result = inner(*args, **kwargs)
                    inside += reads.count - before
                    return result

                setattr(run.engine, method, counted)
            run.stepper.step(2, batches)
        found[name] = (reads.count, inside)
    found["bare DeepSpeed"] = (reads_of_bare_deepspeed(config), 0)
    return found


def reads_of_bare_deepspeed(config: Any) -> int:
    """Those of one step of as many micro-batches on a small model of torch's own."""
    import deepspeed

    path, _ = deepspeed_config.choose_file(config.deepspeed, cuda=False, cpu_has_bf16=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    settings = deepspeed_config.build(deepspeed_config.read_file(path), config.optim, world_size=1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=build_optimizer(model, config.optim), config=settings)
    inputs = torch.randn(4, 8, dtype=torch.bfloat16)
    reads = HostReads()
    for step in range(3):
        with reads if step == 2 else HostReads():
            for _ in range(ACCUMULATION):
                engine.backward(engine(inputs).float().square().sum())
                engine.step()
    return reads.count


@pytest.fixture(scope="module")
def reads(run_on_ranks) -> dict[str, tuple[int, int]]:
    (rank,) = run_on_ranks(reads_of_a_step, 1)
    return rank.result


@pytest.mark.parametrize("name", LOSSES)
def test_teacher_student_head_and_stepper_read_nothing(reads, name):
    count, inside_deepspeed = reads[name]
    assert count == inside_deepspeed


@pytest.mark.parametrize("name", LOSSES)
def test_deepspeed_reads_no_more_than_by_itself(reads, name):
    assert reads[name][1] <= reads["bare DeepSpeed"][0]


def test_a_read_is_seen():
    with HostReads() as reads:
        torch.ones(3).sum().item()
        bool(torch.ones(1) > 0)
        torch.ones(3).nonzero()
    assert reads.count == 3
