"""The relation term against its definition."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from distilcb.config import LossConfig
from distilcb.losses import relation
from distilcb.losses.relation import relation_sum
from distilcb.models.families import family_of
from distilcb.models.teacher import Teacher
from distilcb.monitor.metrics import relation_flops
from distilcb.train.models import relation_faults

BLOCKS, TOKENS, HIDDEN, HEADS = 2, 5, 12, 3


def states(seed, *, hidden=HIDDEN, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(BLOCKS, TOKENS, hidden, generator=generator, dtype=torch.float64).to(dtype) for _ in range(3)]


def by_definition(student, teacher, heads):
    """A token, a head and a kind at a time."""
    total = 0.0
    for ours, theirs in zip(student, teacher, strict=True):
        for block in range(BLOCKS):
            for head in range(heads):
                one, other = (each[block].chunk(heads, dim=-1)[head] for each in (ours, theirs))
                for token in range(TOKENS):
                    p, q = (
                        torch.softmax(torch.stack([x[token] @ x[n] for n in range(TOKENS)]) / math.sqrt(x.shape[-1]), 0)
                        for x in (other, one)
                    )
                    total += float((p * (p / q).log()).sum()) / heads
    return total


@pytest.mark.parametrize("heads", [1, 3, 12])
def test_it_is_the_kl_of_each_tokens_relations(heads):
    student, teacher = states(1), states(2)
    assert float(relation_sum(student, teacher, heads=heads)) == pytest.approx(
        by_definition(student, teacher, heads), rel=1e-5
    )


def test_hidden_sizes_may_differ():
    student, teacher = states(1, hidden=6), states(2)
    assert float(relation_sum(student, teacher, heads=HEADS)) == pytest.approx(
        by_definition(student, teacher, HEADS), rel=1e-5
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student = [each.requires_grad_() for each in states(1)]
    found = relation_sum(student, states(1), heads=HEADS)
    assert found.item() == pytest.approx(0, abs=1e-5)
    for gradient in torch.autograd.grad(found, student):
        assert gradient.abs().max() < 1e-6


def test_gradients_are_those_of_finite_differences():
    teacher = states(2)
    student = [each.requires_grad_() for each in states(1)]
    gradients = torch.autograd.grad(relation_sum(student, teacher, heads=HEADS), student)
    for kind, gradient in enumerate(gradients):
        for place in ((0, 1, 2), (1, 4, 11)):
            found = []
            for step in (1e-3, -1e-3):
                moved = [each.detach().clone() for each in student]
                moved[kind][place] += step
                found.append(by_definition(moved, teacher, HEADS))
            assert float(gradient[place]) == pytest.approx((found[0] - found[1]) / 2e-3, rel=1e-4, abs=1e-7)


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_square_of_the_tokens():
    kept = []
    student = [each.requires_grad_() for each in states(1)]
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):
        relation_sum(student, states(2), heads=HEADS)
    assert not [each for each in kept if each.shape[-2:] == (TOKENS, TOKENS)]


def test_blocks_may_be_taken_some_at_a_time(monkeypatch):
    student = [each.requires_grad_() for each in states(1)]
    whole = torch.autograd.grad(relation_sum(student, states(2), heads=HEADS), student)
    assert relation.blocks_at_once(48, 512) * 48 * 512**2 <= 1 << 25
    monkeypatch.setattr(relation, "_PAIRS_AT_ONCE", 1)  # one at a time, though even one has more
    parts = torch.autograd.grad(relation_sum(student, states(2), heads=HEADS), student)
    torch.testing.assert_close(parts, whole)


def test_half_precision_is_near():
    low = relation_sum(states(1, dtype=torch.bfloat16), states(2, dtype=torch.bfloat16), heads=HEADS)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(by_definition(states(1), states(2), HEADS), rel=0.05)


def test_other_shapes_are_refused():
    with pytest.raises(ValueError, match="projections"):
        relation_sum(states(1), [each[:, :3] for each in states(2)], heads=HEADS)


@pytest.mark.parametrize(
    ("loss", "sizes", "told"),
    [
        ({"relation_heads": 4}, {}, []),
        ({"relation": 0.0, "relation_heads": 5, "relation_layer": 9}, {}, []),
        ({"relation_heads": 4, "relation_layer": 5}, {}, ["relation_layer=5: the teacher has 4 layers"]),
        ({"relation_heads": 12}, {}, ["student 32 and teacher 32, must be multiples of it. Use 8"]),
        ({"relation_heads": 8}, {"hidden_size": 20}, ["student 20 and teacher 32, must be multiples of it. Use 4"]),
    ],
)
def test_layers_and_heads_that_cannot_be_are_told(tiny_model, loss, sizes, told):
    student = tiny_model(layers=2, **sizes)
    loss = LossConfig(**({"relation": 1.0} | loss))
    faults = relation_faults(loss, family_of(student.config, where="test"), student, Teacher(tiny_model(layers=4)))
    assert len(faults) == len(told)
    for fault, part in zip(faults, told, strict=True):
        assert part in fault


def test_a_causal_model_is_told_that_it_has_none(tiny_model):
    model = tiny_model("gpt2")
    faults = relation_faults(
        LossConfig(relation=1, relation_heads=4), family_of(model.config, where="test"), model, Teacher(model)
    )
    assert len([fault for fault in faults if "makes them apart" in fault]) == 2


def test_its_work_is_what_torch_counts():
    student = [each.float().requires_grad_() for each in states(1, hidden=6)]
    teacher = [each.float() for each in states(2)]
    with FlopCounterMode(display=False) as counter:
        relation_sum(student, teacher, heads=HEADS).backward()
    assert relation_flops(6, HIDDEN, seq_len=TOKENS) * BLOCKS * TOKENS == counter.get_total_flops()
