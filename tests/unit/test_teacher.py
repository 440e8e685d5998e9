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


def said(model, batch, rows=None):
    """A teacher's hidden states, and its features of the labelled rows or of others."""
    teacher = Teacher(model)
    hidden = teacher.hidden(batch.input_ids)
    return hidden, teacher.features(hidden, batch.labelled_rows if rows is None else rows)


def logits_of(model, features):
    return torch.nn.functional.linear(features, *Teacher(model).decoder)


def test_a_teacher_is_in_eval_mode_and_its_weights_ask_for_no_gradient(model):
    teacher = Teacher(model.train())
    assert not any(module.training for module in teacher.model.modules())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_nothing_that_a_teacher_gives_requires_a_gradient(model, tiny_batch):
    batch = tiny_batch()
    for tensor in (*said(model, batch), *Teacher(model).decoder):
        assert not tensor.requires_grad


def test_what_a_teacher_gives_can_be_saved_for_a_students_backward(model, tiny_batch):
    batch = tiny_batch()
    hidden, _features = said(model, batch)
    student_hidden = torch.ones_like(hidden, requires_grad=True)
    (student_hidden * hidden).sum().backward()
    assert torch.equal(student_hidden.grad, hidden)


def test_dropout_does_not_touch_a_teacher(model, tiny_batch):
    batch = tiny_batch()
    first, second = (said(model.train(), batch) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_running_a_teacher_leaves_its_weights_alone(model, parameters_of, tiny_batch):
    before = parameters_of(model)
    said(model, tiny_batch())
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_come_in_the_order_asked_for(model, tiny_batch):
    batch = tiny_batch(blocks=2, length=16)
    rows = torch.tensor([31, 0, 17, 16, 0])
    _hidden, features = said(model, batch, rows)
    wanted = model(batch.input_ids).logits.flatten(0, 1)[rows]
    torch.testing.assert_close(logits_of(model, features), wanted)


def test_the_head_runs_on_labelled_rows_alone_where_only_they_are_asked_for(model, tiny_batch):
    batch = tiny_batch(blocks=2, masked=3)
    seen = []
    model.lm_head.dense.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].shape[0]))
    _hidden, features = said(model, batch)
    assert seen == [6]
    assert features.shape == (6, HIDDEN)
    wanted = model(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows]
    torch.testing.assert_close(logits_of(model, features), wanted)


def test_hidden_states_are_the_models_last_ones_of_every_row(model, tiny_batch):
    batch = tiny_batch(blocks=2, length=16)
    hidden, _features = said(model, batch)
    wanted = model.roberta(batch.input_ids).last_hidden_state
    assert torch.equal(hidden, wanted.reshape(32, HIDDEN))


def test_a_teacher_of_an_unsupported_architecture_is_a_model_error():
    from transformers import ElectraConfig, ElectraForMaskedLM

    config = ElectraConfig(vocab_size=11, embedding_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ModelError, match="teacher: model_type 'electra' is not supported"):
        Teacher(ElectraForMaskedLM(config))
