"""Causal models that take every row for a whole block."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distilcb.models.cpu_layers import use_cpu_training
from distilcb.models.families import family_of
from distilcb.models.whole_blocks import use_whole_blocks


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::is_nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cpu_layers", [False, True])
def test_a_gpt2_computes_the_same_and_asks_the_device_nothing(tiny_model, cpu_layers):
    model = tiny_model("gpt2", pad_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    if cpu_layers:
        use_cpu_training(model)
    family, ids = family_of(model.config, where="test"), torch.randint(0, 101, (3, 16))
    plain = copy.deepcopy(model)
    use_whole_blocks(model)
    with HostReads() as before:
        wanted = family.encode(plain, ids)
    with HostReads() as reads:
        found = family.encode(model, ids)
    assert torch.equal(found, wanted)
    assert (before.count, reads.count) == (1, 0)


def test_a_later_token_changes_nothing_before_it(tiny_model):
    model = tiny_model("gpt2")
    use_whole_blocks(model)
    ids = torch.randint(0, 101, (1, 16))
    other = ids.clone()
    other[0, 10:] = (ids[0, 10:] + 1) % 101
    family = family_of(model.config, where="test")
    first, second = family.encode(model, ids), family.encode(model, other)
    assert torch.equal(first[0, :10], second[0, :10])
    assert not torch.equal(first[0, 10:], second[0, 10:])
