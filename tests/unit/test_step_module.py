"""Loss and gradients of one micro-batch against a plain implementation with full logits."""

import copy

import pytest
import torch

from distilcb.config import LossConfig
from distilcb.engine.lessons import lessons
from distilcb.engine.step_module import StepModule, soft_rows
from distilcb.losses import reference
from distilcb.losses.triplet import TERMS, Counts, coefficients
from distilcb.models.families import family_of
from distilcb.models.teacher import Teacher

BLOCKS, LENGTH, MASKED = 3, 16, 4
COUNTS = Counts(attended=BLOCKS * LENGTH, labelled=BLOCKS * MASKED)

LOSSES = {
    "published": LossConfig(),
    "masked rows only": LossConfig(kl_positions="masked"),
    "another temperature": LossConfig(temperature=0.7),
    "with mse": LossConfig(mse=0.01),
    "with mse on masked rows": LossConfig(mse=0.01, kl_positions="masked"),
    "mse alone": LossConfig(kl=0, mlm=0, cos=0, mse=1.0),
    "kl alone": LossConfig(kl=1.0, mlm=0, cos=0),
    "cos alone": LossConfig(kl=0, mlm=0, cos=1.0),
    "mlm and cos": LossConfig(kl=0, mlm=1.0, cos=1.0),
    "mlm alone": LossConfig(kl=0, mlm=1.0, cos=0),
    "relation alone": LossConfig(kl=0, mlm=0, cos=0, relation=1.0, relation_heads=8),
    "with relation of an earlier layer": LossConfig(relation=0.5, relation_layer=2, relation_heads=4),
}
NO_TEACHER_NEEDED = {"mlm alone"}
every_loss = pytest.mark.parametrize("name", LOSSES)


@pytest.fixture
def batch(tiny_batch):
    return tiny_batch(blocks=BLOCKS, length=LENGTH, masked=MASKED)


@pytest.fixture
def student(tiny_model):
    return tiny_model(layers=2, seed=1)


@pytest.fixture
def teacher_model(tiny_model):
    return tiny_model(layers=4, seed=2)


def run_step(student, teacher_model, loss, batch):
    """Loss and sums of StepModule, as the stepper calls it on one rank."""
    (output,) = lessons(None if teacher_model is None else Teacher(teacher_model), [loss], batch)
    module = StepModule(student, family_of(student.config, where="student"), loss)
    return module(batch, output, coefficients(loss, COUNTS, world_size=1))


def logits_and_hidden(model, ids):
    output = model(ids, output_hidden_states=True)
    return output.logits.flatten(0, 1), output.hidden_states[-1].flatten(0, 1)


def plain_projections(model, layer, ids):
    """Queries, keys and values of a layer, counted from 1, from the hidden states before it."""
    before = model(ids, output_hidden_states=True).hidden_states[layer - 1]
    attention = model.base_model.encoder.layer[layer - 1].attention.self
    return [getattr(attention, name)(before) for name in ("query", "key", "value")]


def plain_sums(student, teacher_model, loss, batch):
    """Each term's sum from the models' own full logits, without regard to its weight."""
    logits, hidden = logits_and_hidden(student, batch.input_ids)
    sums = {"mlm": reference.masked_lm(logits[batch.labelled_rows], batch.labels)}
    if teacher_model is not None:
        with torch.no_grad():
            teacher_logits, teacher_hidden = logits_and_hidden(teacher_model, batch.input_ids)
        rows = batch.labelled_rows if loss.kl_positions == "masked" else slice(None)
        sums["kl"] = reference.soft_target_kl(logits[rows], teacher_logits[rows], temperature=loss.temperature)
        sums["mse"] = reference.logit_mse(logits[rows], teacher_logits[rows])
        sums["cos"] = reference.hidden_cosine(hidden, teacher_hidden)
        if loss.relation:
            with torch.no_grad():
                theirs = plain_projections(teacher_model, loss.relation_layer or 4, batch.input_ids)
            ours = plain_projections(student, len(student.base_model.encoder.layer), batch.input_ids)
            sums["relation"] = reference.relation(ours, theirs, heads=loss.relation_heads)
    return sums


def plain_loss(sums, loss):
    """What docs/objective.md says: each weight times the mean of its term."""
    soft = BLOCKS * LENGTH if loss.kl_positions == "attended" else BLOCKS * MASKED
    by = {"kl": soft, "mse": soft, "mlm": BLOCKS * MASKED, "cos": BLOCKS * LENGTH}
    by["relation"] = BLOCKS * LENGTH
    return sum(getattr(loss, term) * total / by[term] for term, total in sums.items())


def in_double(model):
    return copy.deepcopy(model).double()


@every_loss
@pytest.mark.parametrize("architecture", ["camembert", "roberta"])
def test_loss_and_every_gradient_equal_the_plain_ones(tiny_model, batch, architecture, name):
    loss = LOSSES[name]
    student = tiny_model(architecture, layers=2, seed=1)
    teacher_model = None if name in NO_TEACHER_NEEDED else tiny_model(architecture, layers=4, seed=2)
    precise = in_double(student)
    wanted = plain_loss(plain_sums(precise, teacher_model and in_double(teacher_model), loss, batch), loss)
    found, _ = run_step(student, teacher_model, loss, batch)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward()
    wanted.backward()
    total = torch.stack([p.grad.norm() for p in precise.parameters() if p.grad is not None]).norm()
    for (which, ours), theirs in zip(student.named_parameters(), precise.parameters(), strict=True):
        wanted_gradient = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        gradient = torch.zeros_like(ours) if ours.grad is None else ours.grad
        error = (gradient.double() - wanted_gradient).norm()
        # Key biases move every score of a query alike, so their gradient is 0 and only rounding is left of it.
        assert error <= 1e-5 * wanted_gradient.norm() + 1e-6 * total, which


@every_loss
def test_sums_are_those_of_the_terms_with_a_weight_and_0_for_all_others(student, teacher_model, batch, name):
    loss = LOSSES[name]
    with_teacher = None if name in NO_TEACHER_NEEDED else teacher_model
    plain = plain_sums(student, with_teacher, loss, batch)
    _, sums = run_step(student, with_teacher, loss, batch)
    assert sums.shape == (len(TERMS),)
    assert sums.dtype == torch.float32
    assert not sums.requires_grad
    for term, found in zip(TERMS, sums.tolist(), strict=True):
        assert found == (pytest.approx(plain[term].item(), rel=1e-4) if getattr(loss, term) else 0.0), term


@pytest.mark.parametrize("term", TERMS)
def test_the_loss_is_the_weight_times_the_mean_of_its_term(student, teacher_model, batch, term):
    alone = LossConfig(**(dict.fromkeys(TERMS, 0.0) | {term: 3.0}), kl_positions="masked", relation_heads=4)
    value, sums = run_step(student, teacher_model, alone, batch)
    rows = BLOCKS * (LENGTH if term in ("cos", "relation") else MASKED)
    assert value.item() == pytest.approx(3.0 * sums[TERMS.index(term)].item() / rows, rel=1e-6)


def test_kl_mse_and_cos_are_0_when_the_student_is_its_own_teacher(student, batch):
    loss = LossConfig(kl=1.0, mlm=0, cos=1.0, mse=1.0)
    value, _ = run_step(student, copy.deepcopy(student), loss, batch)
    assert abs(value.item()) < 1e-5


def test_no_gradient_reaches_the_teacher(student, teacher_model, batch):
    loss, _ = run_step(student, teacher_model, LossConfig(mse=0.1), batch)
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher_model.parameters())


def test_the_teacher_is_no_part_of_the_module(student):
    module = StepModule(student, family_of(student.config, where="student"), LossConfig())
    assert {name for name, _ in module.named_parameters()} == {f"student.{n}" for n, _ in student.named_parameters()}


def test_a_teacher_of_another_width_and_architecture_can_teach_its_distribution(student, tiny_model, batch):
    wide = tiny_model("roberta", layers=2, hidden_size=48, seed=2)
    loss = LossConfig(kl=0.5, mlm=0.2, cos=0, mse=0.1)
    value, _ = run_step(student, wide, loss, batch)
    logits, _ = logits_and_hidden(student, batch.input_ids)
    theirs, _ = logits_and_hidden(wide, batch.input_ids)
    sums = {
        "kl": reference.soft_target_kl(logits, theirs, temperature=loss.temperature),
        "mse": reference.logit_mse(logits, theirs),
        "mlm": reference.masked_lm(logits[batch.labelled_rows], batch.labels),
    }
    assert value.item() == pytest.approx(plain_loss(sums, loss).item(), rel=1e-5)


def test_frozen_position_embeddings_stay_without_gradient(student, teacher_model, batch):
    frozen = student.roberta.embeddings.position_embeddings.weight.requires_grad_(False)
    loss, _ = run_step(student, teacher_model, LossConfig(), batch)
    loss.backward()
    assert frozen.grad is None
    assert student.roberta.embeddings.word_embeddings.weight.grad.abs().sum() > 0


def test_two_halves_of_a_batch_add_up_to_the_whole(student, teacher_model, tiny_batch):
    """Coefficients come from the global batch, so how it is cut must not matter."""
    whole = tiny_batch(blocks=2, length=LENGTH, masked=MASKED)
    together, _ = run_step(student, teacher_model, LossConfig(), whole)
    together.backward()
    wanted = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    apart = [run_step(student, teacher_model, LossConfig(), half)[0] for half in halves(whole)]
    sum(apart).backward()
    assert sum(loss.item() for loss in apart) == pytest.approx(together.item(), rel=1e-5)
    for name, value in student.named_parameters():
        torch.testing.assert_close(value.grad, wanted[name], rtol=1e-4, atol=1e-6)


def halves(batch):
    """The two blocks of a batch, each as a batch."""
    for block in range(2):
        here = batch.labelled_rows // LENGTH == block
        others = batch.other_rows[batch.other_rows // LENGTH == block]
        yield type(batch)(
            batch.input_ids[block : block + 1],
            batch.labels[here],
            batch.labelled_rows[here] - block * LENGTH,
            others - block * LENGTH,
        )


def test_soft_rows_are_all_rows_once_with_the_masked_ones_first(batch):
    rows = soft_rows(batch, LossConfig(kl_positions="attended"))
    assert torch.equal(rows[: batch.labels.numel()], batch.labelled_rows)
    assert torch.equal(rows.sort().values, torch.arange(BLOCKS * LENGTH))


def test_soft_rows_are_the_masked_ones_alone_where_the_recipe_says_so(batch):
    assert torch.equal(soft_rows(batch, LossConfig(kl_positions="masked")), batch.labelled_rows)


def test_without_kl_and_mse_there_are_no_soft_rows(batch):
    assert soft_rows(batch, LossConfig(kl=0, mse=0)) is None
    assert soft_rows(batch, LossConfig(kl=0, mse=1.0)) is not None
