"""Layers on a CPU, beside torch's own products and the definition of dropout."""

import copy
import functools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from distilcb.models.cpu_layers import (
    Dropout,
    PackedLinear,
    _packs_bf16,
    attention,
    use_cpu_inference,
    use_cpu_training,
)
from distilcb.models.families import FAMILIES, family_of
from distilcb.models.teacher import Teacher

SEQUENCES, HEADS, TOKENS, SIZE = 2, 3, 10, 4
SCALING = SIZE**-0.5


@pytest.fixture
def triple():
    """Query, key and value in float64, with a gradient."""
    generator = torch.Generator().manual_seed(3)
    shape = (SEQUENCES, HEADS, TOKENS, SIZE)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]


@pytest.fixture(autouse=True, params=["cpp", "torch"])
def _each_way(request):
    """Once with our C++, and once without."""
    request.getfixturevalue("with_native" if request.param == "cpp" else "without_native")


def seeded_attention(query, key, value, *, dropout=0.25, seed=7, causal=False):
    torch.manual_seed(seed)
    return attention(query, key, value, dropout=dropout, scaling=SCALING, causal=causal)


def dropped_weights(query, key, **settings):
    """The attention's weights after dropout: what it makes of values that tell tokens apart."""
    tokens = torch.eye(query.shape[2], dtype=query.dtype).expand(*query.shape[:2], -1, -1)
    return seeded_attention(query, key, tokens, **settings)


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("causal", [False, True])
def test_without_dropout_it_is_torchs_attention(triple, causal):
    ours = attention(*triple, dropout=0.0, scaling=SCALING, causal=causal)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(*triple, is_causal=causal))


def test_a_weight_is_dropped_or_scaled_for_those_that_are(triple):
    query, key, _ = triple
    found = dropped_weights(query, key, dropout=0.25)
    whole = torch.softmax(query @ key.transpose(-1, -2) * SCALING, -1) / 0.75
    kept = found != 0
    assert 0.15 < 1 - kept.double().mean() < 0.35
    torch.testing.assert_close(found, torch.where(kept, whole, 0.0))


def test_gradients_are_those_of_the_same_weights_in_plain_torch(triple):
    query, key, value = triple
    kept = (dropped_weights(query, key) != 0).double() / 0.75
    plain = (torch.softmax(query @ key.transpose(-1, -2) * SCALING, -1) * kept) @ value
    upstream = torch.randn(plain.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    expected = torch.autograd.grad(plain, triple, upstream)
    found = torch.autograd.grad(seeded_attention(query, key, value), triple, upstream)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(triple, causal):
    assert torch.autograd.gradcheck(functools.partial(seeded_attention, causal=causal), triple)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_precision_drops_the_same_weights(triple, dtype):
    query, key, _ = triple
    exact = dropped_weights(query, key)
    found = dropped_weights(query.detach().to(dtype), key.detach().to(dtype))
    assert torch.equal(found != 0, exact != 0)
    torch.testing.assert_close(found.double(), exact.detach(), rtol=0, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_in_every_precision_follow_those_in_float64(triple, dtype):
    upstream = torch.randn(triple[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    exact = torch.autograd.grad(seeded_attention(*triple), triple, upstream)
    low = [each.detach().to(dtype).requires_grad_() for each in triple]
    found = torch.autograd.grad(seeded_attention(*low), low, upstream.to(dtype))
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=5e-2)


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_are_dropped_as_often_as_asked_and_keep_their_mean(dropout, dtype):
    torch.manual_seed(1)
    numbers = 400_001  # no multiple of the four that 64 bits serve
    found = Dropout(dropout)(torch.ones(numbers, dtype=dtype)).double()
    dropped = (found == 0).double().mean().item()
    error = 5 * math.sqrt(dropout * (1 - dropout) / numbers)
    assert abs(dropped - dropout) < error + 2**-16
    assert found.max().item() == pytest.approx(1 / (1 - dropout), rel=5e-3)
    assert found.mean().item() == pytest.approx(1, abs=5e-3 + error / (1 - dropout))


def test_which_of_four_neighbours_is_dropped_says_nothing_about_the_others():
    torch.manual_seed(2)
    kept = Dropout(0.5)(torch.ones(4 * 50_000)).view(-1, 4).sign()
    correlation = torch.corrcoef(kept.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / math.sqrt(len(kept))


def test_gradients_of_hidden_states_pass_where_they_were_kept():
    torch.manual_seed(3)
    hidden = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    dropped = Dropout(0.25)(hidden)
    (gradient,) = torch.autograd.grad(dropped.sum(), hidden)
    torch.testing.assert_close(gradient, torch.where(dropped != 0, 1 / 0.75, 0.0).double())
    torch.testing.assert_close(dropped, hidden * gradient)


@pytest.mark.parametrize("dropout", [1e-9, 1 - 1e-9])
def test_a_dropout_near_0_or_1_stays_finite(dropout):
    assert Dropout(dropout)(torch.ones(1000)).isfinite().all()


def test_a_seed_gives_the_same_again_and_another_seed_something_else(triple):
    first, again, other = (seeded_attention(*triple, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_the_weights_are_kept_for_the_backward_pass(triple):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        seeded_attention(*(each * 1 for each in triple))
    squares = [each for each in kept if each.shape[-2:] == (TOKENS, TOKENS)]
    assert len(squares) == 1


@pytest.fixture
def student(tiny_model):
    """A model with dropout, and the same with ours."""
    ours = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    use_cpu_training(ours)
    return ours


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_model_trains_without_one_of_torchs_bernoulli_numbers(tiny_model, tiny_batch, architecture):
    plain = tiny_model(architecture)
    family = family_of(plain.config, where="test")
    family.set_dropout(plain.config, 0.5)
    student = family.model_class().from_config(plain.config)
    use_cpu_training(student)
    with Operators() as ran:
        family.encode(student.train(), tiny_batch().input_ids).sum().backward()
    assert "random_" in ran.names
    assert not {name for name in ran.names if "bernoulli" in name or "dropout" in name or "scaled_dot" in name}


@torch.no_grad()
def test_a_causal_model_looks_at_nothing_that_comes_later(tiny_model, tiny_batch):
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5).train()
    use_cpu_training(model)
    ids = tiny_batch(blocks=1, length=16).input_ids
    other = ids.clone()
    other[:, 10:] = 7
    found = []
    for each in (ids, other):
        torch.manual_seed(4)
        found.append(model(input_ids=each, use_cache=False).logits[:, :10])
    assert torch.equal(*found)


def test_out_of_training_a_model_is_what_it_was(tiny_model, student, tiny_batch):
    ids = tiny_batch().input_ids
    plain = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    with torch.no_grad():
        assert torch.equal(student.eval()(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert plain.state_dict().keys() == student.state_dict().keys()
    assert plain.config.to_dict() == student.config.to_dict()


@torch.no_grad()
def test_padding_is_not_looked_at_in_training_either(student, tiny_batch):
    ids = tiny_batch(blocks=1, length=16).input_ids
    mask = torch.ones_like(ids)
    mask[:, 10:] = 0
    other = ids.clone()
    other[:, 10:] = 7
    student.train()
    found = []
    for each in (ids, other):
        torch.manual_seed(4)
        found.append(student(input_ids=each, attention_mask=mask).logits[:, :10])
    assert torch.equal(*found)


def test_an_exported_student_names_no_attention_of_ours(student, tmp_path):
    student.save_pretrained(tmp_path)
    assert "distilcb" not in (tmp_path / "config.json").read_text()


needs_bf16 = pytest.mark.skipif(not _packs_bf16(), reason="needs a CPU and a torch that multiply packed bf16 weights")


def packed(model):
    """The frozen model in bf16, and the same with its layers packed."""
    plain = copy.deepcopy(model).to(torch.bfloat16).eval().requires_grad_(False)
    ours = copy.deepcopy(plain)
    use_cpu_inference(ours, family_of(ours.config, where="test").layers(ours))
    return plain, ours


def norm_of_difference(one, other):
    return float((one.float() - other.float()).norm())


@needs_bf16
@torch.no_grad()
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_packed_teacher_is_as_near_to_fp32_as_a_plain_one(tiny_model, tiny_batch, architecture):
    model = tiny_model(architecture).eval()
    encode, ids = family_of(model.config, where="test").encode, tiny_batch().input_ids
    plain, ours = packed(model)
    exact, near, found = (encode(each, ids) for each in (model, plain, ours))
    assert 0 < norm_of_difference(found, exact) < 1.5 * norm_of_difference(near, exact)


@needs_bf16
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_packed_teacher_holds_each_weight_of_its_layers_once(tiny_model, architecture):
    plain, ours = packed(tiny_model(architecture))
    layers = family_of(ours.config, where="test").layers(ours)
    kinds = [type(each) for each in layers.modules()]
    assert kinds.count(PackedLinear) >= 4 * len(layers)
    assert not any(parameter.dim() > 1 for parameter in layers.parameters())
    assert Teacher(ours).nbytes == Teacher(plain).nbytes


@needs_bf16
@torch.no_grad()
def test_an_encoders_attention_runs_in_plain_products(tiny_model, tiny_batch):
    _plain, ours = packed(tiny_model())
    with Operators() as ran:
        family_of(ours.config, where="test").encode(ours, tiny_batch().input_ids)
    assert "bmm" in ran.names
    assert not {name for name in ran.names if "scaled_dot" in name or "addmm" in name}


@needs_bf16
@torch.no_grad()
def test_a_packed_teacher_sees_no_padding(tiny_model, tiny_batch):
    """Masked attention is left to transformers."""
    _plain, ours = packed(tiny_model())
    ids = tiny_batch(blocks=2, length=16).input_ids
    other = ids.clone()
    other[:, 10:] = 7
    seen = torch.ones_like(ids)
    seen[:, 10:] = 0
    found = [ours(input_ids=each, attention_mask=seen).logits[:, :10] for each in (ids, other)]
    assert torch.equal(*found)


def test_in_fp32_a_teacher_stays_as_it_is(tiny_model):
    model = tiny_model()
    before = [type(each) for each in model.modules()]
    use_cpu_inference(model, family_of(model.config, where="test").layers(model))
    assert [type(each) for each in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"
