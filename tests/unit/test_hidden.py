"""The cosine distance of hidden states, by hand and against the reference."""

import pytest
import torch

from distilcb.losses import reference
from distilcb.losses.hidden import cosine_distance_sum


def draw(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def test_equal_directions_are_0_apart_whatever_their_length():
    hidden = draw(7, 16).float()
    assert cosine_distance_sum(3.5 * hidden, hidden).item() == pytest.approx(0, abs=1e-5)


def test_opposite_directions_are_2_apart_a_row():
    hidden = draw(7, 16).float()
    assert cosine_distance_sum(-0.1 * hidden, hidden).item() == pytest.approx(14, abs=1e-5)


def test_distances_by_hand():
    student = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 4.0]])
    teacher = torch.tensor([[0.0, 5.0], [1.0, 1.0], [4.0, 3.0]])
    # right angle, half a right angle, 24/25
    assert cosine_distance_sum(student, teacher).item() == pytest.approx(1 + (1 - 0.5**0.5) + (1 - 24 / 25))


def test_it_is_a_sum_over_rows():
    student, teacher = draw(10, 16), draw(10, 16, seed=1)
    parts = cosine_distance_sum(student[:3], teacher[:3]) + cosine_distance_sum(student[3:], teacher[3:])
    torch.testing.assert_close(cosine_distance_sum(student, teacher), parts)
    assert cosine_distance_sum(student[:0], teacher[:0]).item() == 0


@pytest.mark.parametrize("scale", [1e-2, 1.0, 100.0])
def test_it_equals_the_reference_in_value_and_gradient(scale):
    student, teacher = draw(9, 32, scale=scale).requires_grad_(), draw(9, 32, seed=1)
    wanted = reference.hidden_cosine(student, teacher)
    (wanted_gradient,) = torch.autograd.grad(wanted, student)
    fast = student.detach().float().requires_grad_()
    found = cosine_distance_sum(fast, teacher.float())
    (gradient,) = torch.autograd.grad(found, fast)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert (gradient - wanted_gradient).norm() < 1e-6 * wanted_gradient.norm()


def test_gradient_by_hand_turns_the_student_towards_the_teacher():
    student = torch.tensor([[2.0, 0.0]], requires_grad=True)
    cosine_distance_sum(student, torch.tensor([[0.0, 3.0]])).backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.0, -0.5]]))


def test_gradient_does_not_change_the_students_length():
    student = draw(9, 32).requires_grad_()
    cosine_distance_sum(student, draw(9, 32, seed=1)).backward()
    assert (student.grad * student.detach()).sum(-1).abs().max() < 1e-6
    assert student.grad.norm() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_compared_in_fp32(dtype):
    # their squared norm, 4e7, is beyond fp16
    student, teacher = draw(4, 1024, scale=200.0).to(dtype), draw(4, 1024, seed=1, scale=200.0).to(dtype)
    found = cosine_distance_sum(student, teacher)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(reference.hidden_cosine(student.double(), teacher.double()).item(), rel=1e-6)


def test_a_row_of_zeros_gives_no_nan():
    student = torch.zeros(1, 8, requires_grad=True)
    loss = cosine_distance_sum(student, torch.ones(1, 8))
    loss.backward()
    assert loss.item() == 1
    assert student.grad.isfinite().all()


def test_other_shapes_are_refused_and_both_are_told():
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(3, 16\)"):
        cosine_distance_sum(torch.ones(3, 8), torch.ones(3, 16))
    with pytest.raises(ValueError, match=r"\(3, 8\).*\(1, 8\)"):  # which would broadcast
        cosine_distance_sum(torch.ones(3, 8), torch.ones(1, 8))
