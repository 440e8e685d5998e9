"""The teacher that stays as it is."""

import pytest
import torch

from distilcb.errors import ModelError
from distilcb.models.teacher import Teacher

HIDDEN = 32


@pytest.fixture
def model(tiny_model):
    """A teacher's model with dropout, as it comes."""
    return tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)


def logits_of(output):
    return torch.nn.functional.linear(output.features, *output.decoder)


def test_a_teacher_is_in_eval_mode_and_its_weights_ask_for_no_gradient(model):
    teacher = Teacher(model.train())
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_nothing_that_a_teacher_gives_requires_a_gradient(model, tiny_batch):
    batch = tiny_batch()
    output = Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=True)
    for tensor in (output.hidden, output.features, *output.decoder):
        assert not tensor.requires_grad


def test_what_a_teacher_gives_can_be_saved_for_a_students_backward(model, tiny_batch):
    batch = tiny_batch()
    output = Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=True)
    student_hidden = torch.ones_like(output.hidden, requires_grad=True)
    (student_hidden * output.hidden).sum().backward()
    assert torch.equal(student_hidden.grad, output.hidden)


def test_dropout_does_not_touch_a_teacher(model, tiny_batch):
    teacher, batch = Teacher(model.train()), tiny_batch()
    first, second = (teacher(batch.input_ids, batch.labelled_rows, wants_hidden=True) for _ in range(2))
    assert torch.equal(first.hidden, second.hidden)
    assert torch.equal(first.features, second.features)


def test_running_a_teacher_leaves_its_weights_alone(model, parameters_of, tiny_batch):
    before = parameters_of(model)
    batch = tiny_batch()
    Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=True)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_come_in_the_order_asked_for(model, tiny_batch):
    batch = tiny_batch(blocks=2, length=16)
    rows = torch.tensor([31, 0, 17, 16, 0])
    output = Teacher(model)(batch.input_ids, rows, wants_hidden=False)
    wanted = model(batch.input_ids).logits.flatten(0, 1)[rows]
    torch.testing.assert_close(logits_of(output), wanted)


def test_the_head_runs_on_labelled_rows_alone_where_only_they_are_asked_for(model, tiny_batch):
    batch = tiny_batch(blocks=2, masked=3)
    seen = []
    model.lm_head.dense.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    output = Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=False)
    assert seen == [6]
    assert output.features.shape == (6, HIDDEN)
    wanted = model(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows]
    torch.testing.assert_close(logits_of(output), wanted)


def test_hidden_states_are_the_models_last_ones_of_every_row(model, tiny_batch):
    batch = tiny_batch(blocks=2, length=16)
    output = Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=True)
    wanted = model.roberta(batch.input_ids).last_hidden_state
    assert torch.equal(output.hidden, wanted.reshape(32, HIDDEN))


def test_what_no_term_needs_is_not_given(model, tiny_batch):
    batch = tiny_batch()
    assert Teacher(model)(batch.input_ids, batch.labelled_rows, wants_hidden=False).hidden is None
    assert Teacher(model)(batch.input_ids, None, wants_hidden=True).features is None


def test_a_teacher_of_an_unsupported_architecture_is_a_model_error():
    from transformers import ElectraConfig, ElectraForMaskedLM

    config = ElectraConfig(vocab_size=11, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ModelError, match="teacher: model_type 'electra' is not supported"):
        Teacher(ElectraForMaskedLM(config))
