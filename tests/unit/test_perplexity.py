"""Perplexity by sliding windows, beside predicting each token by itself."""

import math

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distilcb.errors import ConfigError
from distilcb.eval.perplexity import Perplexity, summed_nll, windows
from distilcb.models.families import family_of

VOCAB, LONGEST = 40, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=LONGEST, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.2)
    return made


def token_by_token(model, ids, size, stride):
    """Nats of each token with the context that its window gives it, one forward pass for each."""
    total = 0.0
    for place in range(1, len(ids)):
        if place < size:
            start = 0
        else:
            stop = min(len(ids), size + stride * ((place - size) // stride + 1))
            start = stop - size
        with torch.no_grad():
            logits = model(ids[None, start:place]).logits[0, -1]
        total -= logits.log_softmax(-1)[ids[place]].item()
    return total


@pytest.mark.parametrize("tokens", [2, 5, 15, 16, 17, 40, 61])
@pytest.mark.parametrize(("size", "stride"), [(16, 8), (16, 1), (16, 15), (8, 3), (2, 1)])
def test_every_token_is_predicted_once_from_its_window(model, tokens, size, stride):
    ids = torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(1))
    found = list(windows(tokens, size=size, stride=stride))
    shares = [summed_nll(model, family_of(model.config, where="test"), ids, found[rank::2]) for rank in range(2)]
    assert sum(shares).item() == pytest.approx(token_by_token(model, ids, size, stride), rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 100, 101])
def test_windows_leave_no_token_out_and_each_sees_what_its_stride_leaves(tokens):
    found = list(windows(tokens, size=16, stride=6))
    predicted = [place for each in found for place in range(each.first, each.stop)]
    assert predicted == list(range(1, tokens))
    for each in found:
        assert each.stop - each.start <= 16
        assert each.start == 0 or each.first - each.start >= 10


@pytest.mark.parametrize("stride", [0, 16, 20])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ConfigError, match=f"--stride {stride}: needed 1 to 15"):
        list(windows(100, size=16, stride=stride))


def test_figures_by_hand():
    found = Perplexity(nll=6 * math.log(8), tokens=6, words=3, characters=18)
    assert found.a_token == pytest.approx(8)
    assert found.a_word == pytest.approx(64)
    assert found.bits_a_character == pytest.approx(1)


def test_a_model_that_knows_nothing_has_a_figure_too():
    assert Perplexity(nll=8000.0, tokens=10, words=3, characters=30).a_token > 1e300
