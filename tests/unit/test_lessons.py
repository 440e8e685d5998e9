"""One pass of the teacher for several students gives each what a pass of its own would."""

import pytest
import torch

from distilcb.config import LossConfig
from distilcb.engine import lessons as lessons_module
from distilcb.engine.lessons import lessons
from distilcb.engine.step_module import StepModule
from distilcb.losses import head
from distilcb.losses.triplet import Counts, coefficients
from distilcb.models.families import family_of
from distilcb.models.teacher import Teacher

COUNTS = Counts(attended=48, labelled=12)
OBJECTIVES = {
    "published": LossConfig(),
    "another temperature": LossConfig(temperature=0.7, mse=0.01),
    "masked rows": LossConfig(kl_positions="masked"),
    "masked rows without kl": LossConfig(kl=0, mse=1.0, kl_positions="masked"),
    "cos alone": LossConfig(kl=0, mlm=0, cos=1.0),
    "no teacher": LossConfig(kl=0, mlm=1.0, cos=0),
    "kl alone": LossConfig(kl=1.0, mlm=0, cos=0),
    "relations": LossConfig(kl=0, mlm=0, cos=0, relation=1.0, relation_heads=4),
    "relations of another layer": LossConfig(relation=1.0, relation_layer=2, relation_heads=8),
}


@pytest.fixture
def teacher(tiny_model):
    return Teacher(tiny_model(layers=4, seed=2))


@pytest.fixture
def batch(tiny_batch):
    return tiny_batch(blocks=3, length=16, masked=4)


@pytest.fixture
def passes(teacher):
    """How many micro-batches the teacher's first layer has seen."""
    seen = []
    teacher.family.layers(teacher.model)[0].register_forward_hook(lambda *_: seen.append(1))
    return seen


def gradients(student, loss, batch, taught):
    """Loss, sums and the gradient of every weight, of one micro-step."""
    module = StepModule(student, family_of(student.config, where="student"), loss)
    value, sums = module(batch, taught, coefficients(loss, COUNTS, world_size=1))
    return [value.detach(), sums, *torch.autograd.grad(value, list(module.parameters()), materialize_grads=True)]


def test_the_teacher_sees_a_micro_batch_once(teacher, batch, passes):
    lessons(teacher, list(OBJECTIVES.values()), batch)
    assert len(passes) == 1


def test_what_no_term_needs_is_not_given(teacher, batch):
    of_kl, of_cos = lessons(teacher, [OBJECTIVES["kl alone"], OBJECTIVES["cos alone"]], batch)
    assert of_kl.hidden is None
    assert of_cos.features is None


def test_the_teacher_is_not_asked_where_nobody_needs_it(teacher, batch, passes):
    assert lessons(teacher, [OBJECTIVES["no teacher"]] * 2, batch) == [None, None]
    assert lessons(None, [LossConfig(kl=0, cos=0)], batch) == [None]
    assert passes == []


def test_each_student_is_given_what_it_needs_and_nothing_else(teacher, batch):
    given = dict(zip(OBJECTIVES, lessons(teacher, list(OBJECTIVES.values()), batch), strict=True))
    assert given["no teacher"] is None
    assert given["cos alone"].features is None
    assert given["kl alone"].hidden is None
    assert given["kl alone"].projections is None
    last, second = (given[name].projections for name in ("relations", "relations of another layer"))
    assert not torch.equal(last[0], second[0])
    assert (len(given["masked rows"].features), len(given["published"].features)) == (12, 48)


@pytest.mark.parametrize(("keeps", "chunk_bytes"), [(True, 1 << 20), (True, 1), (False, 1)])  # one chunk, or three
def test_loss_and_gradients_are_those_of_a_lesson_of_ones_own_to_the_last_bit(
    teacher, batch, tiny_model, monkeypatch, keeps, chunk_bytes
):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", chunk_bytes)
    if not keeps:
        monkeypatch.setattr(lessons_module, "_MOST_KEPT_BYTES", 0)
    shared = lessons(teacher, list(OBJECTIVES.values()), batch)
    for depth, (loss, taught) in enumerate(zip(OBJECTIVES.values(), shared, strict=True), start=1):
        student = tiny_model(layers=1 + depth % 3, seed=depth)
        (alone,) = lessons(teacher, [loss], batch)
        for one, other in zip(
            gradients(student, loss, batch, taught), gradients(student, loss, batch, alone), strict=True
        ):
            assert torch.equal(one, other)


def test_the_teachers_logits_are_made_once_for_all_that_take_the_same_rows(teacher, batch, tiny_model):
    shared = lessons(teacher, [OBJECTIVES[name] for name in ("published", "another temperature", "masked rows")], batch)
    one, two, other = (taught.logits for taught in shared)
    assert one is two
    assert other is None  # nobody follows
    gradients(tiny_model(layers=1), OBJECTIVES["published"], batch, shared[0])
    (made,) = one.values()
    wanted = teacher.model(batch.input_ids).logits.flatten(0, 1)[torch.cat([batch.labelled_rows, batch.other_rows])]
    torch.testing.assert_close(made, wanted)
    before = made.clone()
    gradients(tiny_model(layers=2), OBJECTIVES["another temperature"], batch, shared[1])
    assert next(iter(two.values())) is made
    assert torch.equal(made, before)


def test_logits_beyond_what_may_be_kept_are_not(teacher, batch, monkeypatch):
    monkeypatch.setattr(lessons_module, "_MOST_KEPT_BYTES", 48 * 101 * 4 - 1)
    assert [taught.logits for taught in lessons(teacher, [LossConfig()] * 2, batch)] == [None, None]
    monkeypatch.setattr(lessons_module, "_MOST_KEPT_BYTES", 48 * 101 * 4)
    assert [taught.logits for taught in lessons(teacher, [LossConfig()] * 2, batch)] == [{}, {}]
