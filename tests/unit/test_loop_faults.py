"""What ends a run from inside its steps, told without any step."""

from types import SimpleNamespace

import pytest
import torch

from distilcb.config import Config, OptimConfig
from distilcb.errors import ConfigError
from distilcb.train import loop


@pytest.fixture
def run(monkeypatch):
    """A run of rank one whose steps fail: run(error)."""

    def build(error):
        def fail(runs):
            raise error

        monkeypatch.setattr(loop, "barrier", lambda: None)
        monkeypatch.setattr(loop, "_look_before_first_step", lambda runs: None)
        monkeypatch.setattr(loop, "_take_steps", fail)
        confessed = []
        idle = SimpleNamespace(start=lambda: None, stop=lambda: None, confess=confessed.append)
        stop = SimpleNamespace(listen=lambda: None, stop_listening=lambda: None, agreed_now=lambda: None)
        config = Config(optim=OptimConfig(global_batch=4096, micro_batch=4096))
        place = SimpleNamespace(world=SimpleNamespace(is_main=False))
        return SimpleNamespace(watchdog=idle, stop=stop, config=config, place=place), confessed

    return build


def test_a_pass_that_the_memory_does_not_hold_is_told_with_what_may_and_to_the_other_ranks(run):
    failing, confessed = run(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    with pytest.raises(ConfigError, match=r"optim\.micro_batch=4096 .*--optim\.micro_batch 2048; .* auto finds"):
        loop.train(failing)
    assert [type(error) for error in confessed] == [ConfigError]


def test_other_faults_stay_what_they_are(run):
    failing, confessed = run(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        loop.train(failing)
    assert not confessed
