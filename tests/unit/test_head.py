"""The streamed vocabulary head against the plain one."""

import pytest
import torch

from distilcb.losses import head, reference
from distilcb.losses.head import HeadCoefficients, rows_per_chunk, streamed_head

ROWS, LABELLED, HIDDEN, TEACHER_HIDDEN, VOCAB = 37, 9, 16, 24, 101


class Case:
    """One random head, its teacher and labels, in a dtype; logits are spread as trained models spread them."""

    def __init__(self, dtype=torch.float32, seed=0, bias=True, logit_scale=2.0, vocab=VOCAB):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        self.features = draw(ROWS, HIDDEN).requires_grad_()
        self.weight = draw(vocab, HIDDEN, scale=logit_scale / HIDDEN**0.5).requires_grad_()
        self.bias = draw(vocab).requires_grad_() if bias else None
        teacher_weight = draw(vocab, TEACHER_HIDDEN, scale=logit_scale / TEACHER_HIDDEN**0.5)
        self.teacher = (draw(ROWS, TEACHER_HIDDEN), teacher_weight, draw(vocab))
        self.labels = torch.randint(0, vocab, (LABELLED,), generator=generator)

    @property
    def leaves(self):
        return [leaf for leaf in (self.features, self.weight, self.bias) if leaf is not None]

    def streamed(self, coefficients, *, temperature=2.0, soft_rows=None, chunk_rows=8):
        return streamed_head(
            self.features,
            self.weight,
            self.bias,
            labels=self.labels,
            coefficients=coefficients,
            temperature=temperature,
            teacher=self.teacher,
            soft_rows=soft_rows,
            chunk_rows=chunk_rows,
        )

    def plain(self, coefficients, *, temperature=2.0, soft_rows=None, precise=True):
        """Loss and gradients by the reference, in float64 unless `precise` is false."""
        cast = (lambda t: t.detach().double()) if precise else (lambda t: t.detach().clone())
        leaves = [cast(leaf).requires_grad_() for leaf in self.leaves]
        features, weight, bias = leaves[0], leaves[1], leaves[2] if len(leaves) > 2 else None
        student = reference.logits(features, weight, bias)
        teacher = reference.logits(*(cast(part) for part in self.teacher))
        soft = slice(0, soft_rows)
        loss = (
            coefficients.kl * reference.soft_target_kl(student[soft], teacher[soft], temperature=temperature)
            + coefficients.mlm * reference.masked_lm(student[:LABELLED], self.labels)
            + coefficients.mse * reference.logit_mse(student[soft], teacher[soft])
        )
        return loss, torch.autograd.grad(loss, leaves)


def relative_error(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.mark.parametrize("soft_rows", [None, LABELLED], ids=["attended", "masked"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk_rows", [1, 8, 64, None])
@pytest.mark.parametrize(
    "coefficients",
    [
        HeadCoefficients(kl=0.5, mlm=0.2),
        HeadCoefficients(kl=1.0),
        HeadCoefficients(mlm=1.0),
        HeadCoefficients(mse=0.01, kl=0.1),
        HeadCoefficients(kl=5 / 2_000_000, mlm=2 / 300_000),
    ],
)
def test_streamed_head_equals_the_plain_one_in_loss_and_all_gradients(
    monkeypatch, coefficients, chunk_rows, bias, soft_rows
):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)  # where none is asked for, chunks of 13, 13 and 11 rows
    case = Case(bias=bias)
    loss, sums = case.streamed(coefficients, chunk_rows=chunk_rows, soft_rows=soft_rows)
    gradients = torch.autograd.grad(loss, case.leaves)
    wanted, wanted_gradients = case.plain(coefficients, soft_rows=soft_rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-6)
    assert coefficients.total(sums).item() == pytest.approx(wanted.item(), rel=2e-6)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(found, expected) < 2e-6


def test_streamed_head_equals_the_plain_one_on_multilingual_berts_vocabulary():
    coefficients, case = HeadCoefficients(kl=5 / 37, mlm=2 / 9), Case(vocab=119_547)
    assert case.labels.max() > 65_536
    loss, _ = case.streamed(coefficients)
    gradients = torch.autograd.grad(loss, case.leaves)
    wanted, wanted_gradients = case.plain(coefficients)
    assert loss.item() == pytest.approx(wanted.item(), rel=5e-6)
    for found, expected in zip(gradients, wanted_gradients, strict=True):
        assert relative_error(found, expected) < 5e-6


@pytest.mark.parametrize("chunk_rows", [5, 64])
def test_bf16_head_is_as_exact_as_plain_bf16(chunk_rows):
    coefficients = HeadCoefficients(kl=0.5, mlm=0.2)
    case = Case(dtype=torch.bfloat16)
    loss, _ = case.streamed(coefficients, chunk_rows=chunk_rows)
    gradients = torch.autograd.grad(loss, case.leaves)
    wanted, wanted_gradients = case.plain(coefficients)
    _, plain_gradients = case.plain(coefficients, precise=False)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-2)
    for found, plain, exact in zip(gradients, plain_gradients, wanted_gradients, strict=True):
        assert relative_error(found, exact) < max(1.2 * relative_error(plain, exact), 1e-2)


@pytest.mark.parametrize("mse", [0.0, 1e-3 / 2_000_000])
def test_fp16_head_keeps_its_gradients_with_counts_of_two_million(mse):
    """With the count inside, every entry of the fp16 logit gradient would be 0; loss scaling comes too late."""
    coefficients = HeadCoefficients(kl=0.5 / 2_000_000, mlm=0.2 / 300_000, mse=mse)
    case = Case(dtype=torch.float16)
    loss, _ = case.streamed(coefficients)
    loss_scale = 2.0**16
    gradients = torch.autograd.grad(loss * loss_scale, case.leaves)
    _, wanted = case.plain(coefficients)
    for found, expected in zip(gradients, wanted, strict=True):
        assert found.dtype == torch.float16
        assert torch.isfinite(found).all()
        assert relative_error(found.double() / loss_scale, expected) < 4e-3


@pytest.mark.parametrize("mse", [0.0, 0.1])
def test_fp16_head_makes_no_tensor_of_a_number_of_the_hosts(mse):
    """On a GPU such a tensor is copied there, and the copy waits for all that came before."""
    case, made = Case(dtype=torch.float16), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func.name())
            return func(*args, **(kwargs or {}))

    with Watch():
        loss, _ = case.streamed(HeadCoefficients(kl=0.5, mlm=0.2, mse=mse), chunk_rows=8)
        loss.backward()
        ours = list(made)
        torch.tensor(1.0)
    assert "aten::lift_fresh" in made
    assert "aten::lift_fresh" not in ours


def test_fp16_head_survives_large_features_and_weights():
    """Sums over rows of a chunk leave fp16's range; they must be kept in fp32."""
    case = Case(dtype=torch.float16)
    features = (case.features.detach() * 60).requires_grad_()
    loss, _ = streamed_head(
        features,
        case.weight,
        case.bias,
        labels=torch.zeros(ROWS, dtype=torch.int64),
        coefficients=HeadCoefficients(mlm=1 / 300_000),
        temperature=1.0,
    )
    gradients = torch.autograd.grad(loss * 2**10, [features, case.weight])
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


def test_kl_is_zero_when_student_equals_teacher():
    case = Case()
    case.teacher = (case.features.detach(), case.weight.detach(), case.bias.detach())
    loss, sums = case.streamed(HeadCoefficients(kl=1.0))
    gradients = torch.autograd.grad(loss, case.leaves)
    assert abs(sums.kl.item()) < 1e-4
    assert all(gradient.abs().max() < 1e-5 for gradient in gradients)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_follows_the_temperature(temperature):
    case = Case()
    loss, _ = case.streamed(HeadCoefficients(kl=1.0), temperature=temperature)
    wanted, _ = case.plain(HeadCoefficients(kl=1.0), temperature=temperature)
    assert loss.item() == pytest.approx(wanted.item(), rel=5e-6)


def test_kl_of_a_hand_computed_pair():
    """Two words: teacher (3/4, 1/4), student (1/2, 1/2): KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    one = torch.ones(1, 1)
    teacher_bias = torch.tensor([3.0, 1.0]).log()
    zeros = torch.zeros(2, 1)
    _, sums = streamed_head(
        one,
        zeros,
        None,
        labels=torch.empty(0, dtype=torch.int64),
        coefficients=HeadCoefficients(kl=1.0),
        temperature=1.0,
        teacher=(one, zeros, teacher_bias),
    )
    assert sums.kl.item() == pytest.approx(0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log())


def test_gradients_follow_the_incoming_gradient_and_reach_only_what_needs_them():
    case = Case()
    case.weight.requires_grad_(False)
    loss, _ = case.streamed(HeadCoefficients(kl=1.0, mlm=1.0))
    once = torch.autograd.grad(loss, [case.features], retain_graph=True)[0]
    thrice = torch.autograd.grad(3 * loss, [case.features])[0]
    torch.testing.assert_close(thrice, 3 * once)


def test_no_gradient_is_computed_under_no_grad():
    with torch.no_grad():
        loss, _ = Case().streamed(HeadCoefficients(kl=1.0))
    assert not loss.requires_grad


def test_no_tensor_of_rows_by_vocabulary_is_made():
    case = Case()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] >= VOCAB:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        loss, _ = case.streamed(HeadCoefficients(kl=1.0, mlm=1.0, mse=0.1), chunk_rows=8)
        loss.backward()
    # (hidden, vocab) views of the decoder are the only other matrices of that width.
    assert 0 < largest <= max(8, HIDDEN, TEACHER_HIDDEN)
    assert largest < ROWS


def test_wrong_shapes_are_refused():
    case = Case()
    with pytest.raises(ValueError, match="need the teacher"):
        streamed_head(
            case.features,
            case.weight,
            None,
            labels=case.labels,
            coefficients=HeadCoefficients(kl=1.0),
            temperature=1.0,
        )
    case.teacher = (case.teacher[0][:-1], *case.teacher[1:])
    with pytest.raises(ValueError, match="36 rows"):
        case.streamed(HeadCoefficients(kl=1.0))


def test_chunks_fill_their_budget():
    most = (96 << 20) // (4 * 32_005)
    assert rows_per_chunk(32_005, "cpu") == most
    assert rows_per_chunk(10**9, "cuda") == 16


@pytest.mark.parametrize(("rows", "chunks"), [(1, [1]), (786, [786]), (787, [394, 393]), (2048, [683, 683, 682])])
def test_rows_are_shared_out_evenly_to_as_few_chunks_as_can_be(rows, chunks):
    step = rows_per_chunk(32_005, "cpu", rows)
    assert [min(step, rows - start) for start in range(0, rows, step)] == chunks
