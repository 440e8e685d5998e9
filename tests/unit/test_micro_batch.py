"""optim.micro_batch: auto, on one rank."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distilcb.command_line import CommandLine
from distilcb.config import Config, OptimConfig, accumulation_steps, even_sizes
from distilcb.errors import ConfigError
from distilcb.train import micro_batch
from distilcb.train.micro_batch import largest_that_fits, settle_micro_batch


def command(*, global_batch=96, seq_len=128, size="auto"):
    config = Config(optim=OptimConfig(global_batch=global_batch, micro_batch=size))
    config = replace(config, data=replace(config.data, seq_len=seq_len))
    return CommandLine(config, Path("r.yaml"), Path("run"), False, False, ())


def place(device="cpu", ranks=1):
    return SimpleNamespace(
        device=torch.device(device), world=SimpleNamespace(size=ranks), precision="bf16", settings={}
    )


def test_sizes_cut_the_share_of_a_rank_evenly():
    config = command(global_batch=96).config
    assert even_sizes(config, 2, device_type="cuda") == [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]
    assert even_sizes(config, 2, device_type="cpu") == [1, 2, 3, 4, 6, 8, 12, 16]  # 2,048 tokens


def test_a_pass_is_never_longer_than_makes_sense():
    sizes = even_sizes(command(global_batch=4096, seq_len=512).config, 1, device_type="cuda")
    assert sizes[-1] == 128
    assert even_sizes(command(seq_len=4096).config, 1, device_type="cpu") == [1]


@pytest.mark.parametrize("limit", [0, 1, 5, 12, 47, 48, 1000])
def test_the_largest_that_fits_is_found_with_few_tries(limit):
    sizes, tried = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48], []
    found = largest_that_fits(sizes, lambda size: tried.append(size) or size <= limit)
    assert found == max([size for size in sizes if size <= limit], default=0)
    assert len(tried) <= 4


def test_auto_becomes_a_number_that_divides():
    settled = settle_micro_batch(command(), place(), None, None).config.optim
    assert settled.micro_batch == 16
    assert accumulation_steps(settled, 1) == 6


def test_a_run_that_goes_on_keeps_its_own():
    assert settle_micro_batch(command(), place(), None, 4).config.optim.micro_batch == 4
    assert settle_micro_batch(command(), place(), None, 5).config.optim.micro_batch == 16


def test_a_number_stays():
    given = command(size=3)
    assert settle_micro_batch(given, place(), None, 4) is given


class FullAbove:
    """A device that holds so many sequences."""

    def __init__(self, limit):
        self.limit = limit

    def __call__(self, *_):
        return self

    def fits(self, size):
        return size <= self.limit


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(micro_batch, "_everywhere", lambda fits, place: fits)
    return lambda limit: monkeypatch.setattr(micro_batch, "_Probe", FullAbove(limit))


def test_on_a_gpu_it_is_what_its_memory_holds(on_a_gpu):
    on_a_gpu(25)
    assert settle_micro_batch(command(), place("cuda"), None, None).config.optim.micro_batch == 24


def test_not_even_one_sequence_is_a_clear_error(on_a_gpu):
    on_a_gpu(0)
    with pytest.raises(ConfigError, match=r"not even 1 sequence\(s\) of 128 tokens fit.*smaller data.seq_len"):
        settle_micro_batch(command(), place("cuda"), None, None)


@pytest.mark.parametrize(
    ("told", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_a_size_that_asks_for_too_much_memory_does_not_fit_and_other_faults_are_faults(monkeypatch, told, is_memory):
    probe = object.__new__(micro_batch._Probe)

    def fail(size):
        raise told

    monkeypatch.setattr(probe, "_pass", fail, raising=False)
    if is_memory:
        assert not probe.fits(4)
    else:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            probe.fits(4)


def test_memory_that_does_not_suffice_says_what_may():
    told = str(micro_batch.refused_memory(command(size=48).config))
    assert "optim.micro_batch=48 sequences of 128 tokens" in told
    assert "--optim.micro_batch 24" in told
    assert "a smaller data.seq_len" in str(micro_batch.refused_memory(command(size=1).config))


def test_auto_asks_of_the_global_batch_only_that_ranks_divide_it():
    assert accumulation_steps(OptimConfig(global_batch=96, micro_batch="auto"), 3) == 32
    with pytest.raises(ConfigError, match=r"96 sequences: 5 rank\(s\)"):
        accumulation_steps(OptimConfig(global_batch=96, micro_batch="auto"), 5)
