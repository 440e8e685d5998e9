"""Dropout's chance in signs, and the softmax's gradient with it, in C++ and in torch."""

import pytest
import torch

from distilcb.models import dropout
from distilcb.models.dropout import scale_of_kept, sign_dropped, softmax_backward, softmax_in_place

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.fixture(params=["cpp", "torch"])
def each_way(request):
    """Once in C++, and once without."""
    request.getfixturevalue("with_native" if request.param == "cpp" else "without_native")


def signed_ones(count, probability, dtype, seed=3):
    torch.manual_seed(seed)
    return sign_dropped(torch.ones(count, dtype=dtype), probability)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1023, 40_003])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, SINGLE, torch.float64])
def test_cpp_drops_what_torch_drops(with_native, monkeypatch, count, dtype):
    in_cpp = signed_ones(count, 0.3, dtype)
    monkeypatch.setattr(dropout, "library", lambda: None)
    torch_does = signed_ones(count, 0.3, dtype)
    assert torch.equal(in_cpp, torch_does)
    assert count < 1000 or 0.25 < (in_cpp < 0).double().mean() < 0.35


def test_random_bits_are_those_of_splitmix64():
    """The first numbers of SplitMix64 from state 1234567, as Rosetta Code lists them for implementers."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [word % (1 << 64) for word in dropout._words(1234567, 4).tolist()] == published


def test_threads_draw_what_one_draws(with_native):
    threads = torch.get_num_threads()
    found = []
    for each in (1, 2, 3):
        torch.set_num_threads(each)
        found.append(signed_ones(10_001, 0.5, HALF))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(("probability", "dropped"), [(0.0, 0.0), (1 - 1e-9, 1 - 2**-15)])
def test_the_least_and_the_greatest_probability(each_way, probability, dropped):
    share = (signed_ones(400_000, probability, HALF) < 0).double().mean().item()
    assert share == 0 if not dropped else abs(share - dropped) < 5 * (2**-15 / 400_000) ** 0.5


def test_which_numbers_are_dropped_says_nothing_about_their_neighbours(each_way):
    kept = (signed_ones(8 * 50_000, 0.5, SINGLE) > 0).double().view(-1, 8)
    correlation = torch.corrcoef(kept.T) - torch.eye(8)
    assert correlation.abs().max() < 5 / len(kept) ** 0.5


def test_neighbouring_seeds_drop_unlike_numbers(each_way):
    one, other = (signed_ones(100_000, 0.5, SINGLE, seed=seed) for seed in (1, 2))
    assert abs((one == other).double().mean().item() - 0.5) < 5 * 0.5 / 100_000**0.5


def test_one_call_takes_one_number_of_torchs_generator(each_way):
    """Whatever the size: what is drawn next does not depend on it."""
    found = []
    for count in (3, 1000):
        signed_ones(count, 0.5, HALF)
        found.append(torch.rand(2))
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], torch.rand(2))


@pytest.mark.parametrize("length", [1, 16, 37, 512])
@pytest.mark.parametrize(("dtype", "error"), [(SINGLE, 1e-6), (HALF, 2**-8), (torch.float16, 2**-10)])
def test_a_softmax_is_that_of_its_definition(each_way, dtype, error, length):
    scores = 10 * torch.randn(3, 4, length, generator=torch.Generator().manual_seed(5)).to(dtype)
    exact = torch.softmax(scores.double(), -1)
    found = softmax_in_place(scores)
    assert found.data_ptr() == scores.data_ptr()
    torch.testing.assert_close(found.double(), exact, rtol=error, atol=2**-24)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_a_softmax_in_cpp_does_not_depend_on_threads(with_native, monkeypatch, dtype):
    monkeypatch.setattr(torch, "softmax", None)  # so that it is C++
    scores = 10 * torch.randn(301, 37, generator=torch.Generator().manual_seed(5)).to(dtype)
    threads, found = torch.get_num_threads(), []
    for each in (1, 2, 3):
        torch.set_num_threads(each)
        found.append(softmax_in_place(scores.clone()))
    torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_what_is_not_looked_at_has_no_share_at_all(each_way, dtype):
    scores = torch.tensor([[0.0, -torch.inf, 0.0], [-3e38, 2.0, -torch.inf]], dtype=dtype)
    assert softmax_in_place(scores).tolist() == [[0.5, 0, 0.5], [0, 1, 0]]


def test_a_score_that_is_no_number_makes_its_row_none(each_way):
    scores = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 0.0, 0.0]])
    found = softmax_in_place(scores)
    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def softmax_case(dtype, length=37):
    generator = torch.Generator().manual_seed(5)
    weights = torch.softmax(torch.randn(3, 4, length, generator=generator), -1).to(dtype)
    upstream = torch.randn(3, 4, length, generator=generator).to(dtype)
    torch.manual_seed(6)
    return upstream, sign_dropped(weights, 0.3)


@pytest.mark.parametrize(("dtype", "error"), [(SINGLE, 1e-6), (HALF, 4e-3), (torch.float16, 2e-3)])
def test_a_softmaxs_gradient_is_that_of_its_definition(each_way, dtype, error):
    upstream, signed = softmax_case(dtype)
    probabilities = signed.double().abs()
    gradient = upstream.double() * (signed > 0)
    exact = probabilities * (gradient - (probabilities * gradient).sum(-1, keepdim=True))
    found = softmax_backward(upstream.clone(), signed)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=error, atol=error)


@pytest.mark.parametrize("dtype", [SINGLE, HALF])
def test_the_compiled_gradient_is_taken_in_these_types(with_native, dtype):
    upstream, signed = softmax_case(dtype)
    assert softmax_backward(upstream, signed).data_ptr() == upstream.data_ptr()


def test_a_gradient_that_is_no_number_stays_one(each_way):
    upstream, signed = softmax_case(SINGLE)
    kept = int(signed[0, 0].argmax())
    upstream[0, 0, kept] = torch.nan
    found = softmax_backward(upstream, signed)
    assert found[0, 0].isnan().all()
    assert found[1:].isfinite().all()


def test_an_infinite_gradient_of_what_was_dropped_does_not_matter(each_way):
    upstream, signed = softmax_case(SINGLE)
    dropped = int((signed[0, 0] < 0).nonzero()[0])
    upstream[0, 0, dropped] = torch.inf
    assert softmax_backward(upstream, signed).isfinite().all()


def test_what_is_kept_is_scaled_to_the_probability_that_was_meant():
    assert scale_of_kept(0.1) == pytest.approx(1 / 0.9, rel=1e-5)
    assert scale_of_kept(0.0) == 1
