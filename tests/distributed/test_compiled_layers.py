"""train.compile: the same training to rounding, no graph break, and one compilation for all layers that are alike."""

from typing import Any

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from distilcb.config import MaskingConfig, TrainConfig
from distilcb.data.blocks import RandomBlocks
from distilcb.data.loader import HeldoutBatches
from distilcb.data.masking import Masking
from distilcb.errors import ConfigError
from distilcb.eval.fill_mask import fill_masks
from distilcb.eval.masked_lm import evaluate
from distilcb.train.models import check_compiler

pytestmark = pytest.mark.launch

STEPS = 3
COMPILED = TrainConfig(compile=True)


def run_and_tell() -> dict[str, Any]:
    """Runs on every rank."""
    found: dict[str, Any] = {"plain": sums(tiny.start(tiny.tiny_config()))}
    counters.clear()
    run = tiny.start(tiny.tiny_config(train=COMPILED))
    found["compiled"] = sums(run)
    found["graphs"] = counters["stats"]["unique_graphs"]
    look_at(run)
    found["graphs of evaluation"] = counters["stats"]["unique_graphs"] - found["graphs"]
    found["names"] = list(run.models.student.state_dict())
    found["plain names"] = list(tiny.models(tiny.tiny_config()).student.state_dict())
    found["with dropout"] = [sums(tiny.start(tiny.tiny_config(dropout=0.1, train=COMPILED))) for _ in range(2)]
    checkpointing = TrainConfig(compile=True, activation_checkpointing=True)
    found["checkpointing"] = sums(tiny.start(tiny.tiny_config(train=checkpointing)))
    found["breaks"] = dict(counters["graph_break"])
    return found


def sums(run: tiny.TinyRun) -> torch.Tensor:
    """(steps, terms) of some steps."""
    return torch.stack([each.sums for each in run.take(0, STEPS)])


def look_at(run: tiny.TinyRun) -> None:
    """Evaluate and fill masks, on batches of other shapes than the steps'."""
    models, device = run.models, torch.device("cpu")
    rank, size = run.stepper.cut.rank, run.stepper.cut.world_size
    blocks = RandomBlocks(tiny.VOCABULARY, seq_len=tiny.SEQ_LEN, blocks=10)
    masking = Masking(MaskingConfig(), tiny.VOCABULARY, blocks.token_counts, seq_len=tiny.SEQ_LEN, seed=0)
    batches = HeldoutBatches(blocks, masking, micro_batch=3, rank=rank, world_size=size)
    evaluate(models.student, models.teacher, models.family, batches, maskings=2, device=device)
    fill_masks(models.student, models.family, Words(), ["<mask>", "one <mask>"], device=device)


class Words:
    """As much of a tokenizer as fill_masks uses."""

    mask_token, mask_token_id = "<mask>", tiny.MASK

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [tiny.BOS, *(tiny.MASK if word == "<mask>" else 9 for word in text.split()), tiny.EOS]}

    def decode(self, ids: list[int]) -> str:
        return str(ids)


@pytest.fixture(scope="module")
def facts(run_on_ranks) -> dict[str, Any]:
    return run_on_ranks(run_and_tell, 2)[0].result


@pytest.mark.parametrize("which", ["compiled", "checkpointing"])
def test_the_losses_are_those_of_plain_layers(facts, which):
    torch.testing.assert_close(facts[which], facts["plain"], rtol=1e-4, atol=1e-5)


def test_there_is_no_graph_break_and_a_graph_each_for_teacher_and_student(facts):
    assert facts["breaks"] == {}
    assert facts["graphs"] == 2


def test_dropout_is_a_function_of_its_place_there_too(facts):
    first, second = facts["with dropout"]
    assert torch.equal(first, second)
    assert not torch.allclose(first, facts["plain"], rtol=1e-4)


def test_evaluation_compiles_nothing(facts):
    assert facts["graphs of evaluation"] == 0


def test_weights_keep_their_names(facts):
    assert facts["names"] == facts["plain names"]


def test_without_a_compiler_it_is_told_at_once(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.compile: torch\.compile needs a compiler: g\+\+ in PATH"):
        check_compiler()


def test_a_compiler_that_the_environment_names_is_the_one_looked_for(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/odd" if name == "odd-c++" else None)
    monkeypatch.setenv("CXX", "odd-c++")
    check_compiler()
