"""train.compile: the same training to rounding, no graph break, and one compilation for all layers that are alike."""

from typing import Any

import pytest
import tiny
import torch
from torch._dynamo.utils import counters

from distilcb.errors import ConfigError
from distilcb.eval.fill_mask import fill_masks
from distilcb.train.build import compile_layers

pytestmark = pytest.mark.launch

STEPS = 3


def run_and_tell() -> dict[str, Any]:
    """Runs on every rank."""
    plain = tiny.start(tiny.tiny_config()).take(0, STEPS)
    counters.clear()
    run = tiny.start(tiny.tiny_config(compile_layers=True))
    compiled = run.take(0, STEPS)
    graphs = counters["stats"]["unique_graphs"]
    fill_masks(run.models.student, run.models.family, Words(), ["<mask>", "one <mask>"], device=torch.device("cpu"))
    return {
        "plain": [each.sums for each in plain],
        "compiled": [each.sums for each in compiled],
        "graphs": graphs,
        "graphs of other shapes": counters["stats"]["unique_graphs"] - graphs,
        "breaks": dict(counters["graph_break"]),
        "names": list(run.models.student.state_dict()),
        "plain names": list(tiny.models(tiny.tiny_config()).student.state_dict()),
    }


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


def test_the_losses_are_those_of_plain_layers(facts):
    assert len(facts["compiled"]) == STEPS
    for plain, compiled in zip(facts["plain"], facts["compiled"], strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)


def test_there_is_no_graph_break_and_a_graph_each_for_teacher_and_student(facts):
    assert facts["breaks"] == {}
    assert facts["graphs"] == 2


def test_evaluation_compiles_nothing(facts):
    assert facts["graphs of other shapes"] == 0


def test_weights_keep_their_names(facts):
    assert facts["names"] == facts["plain names"]


def test_without_a_compiler_it_is_told_before_the_first_step(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ConfigError, match=r"train\.compile: .* needs a C\+\+ compiler"):
        compile_layers(tiny.models(tiny.tiny_config()))
