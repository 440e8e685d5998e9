"""One fine-tuning: what the seed settles, what the teacher adds, and how it ends without a number."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from distilcb.finetune.objective import Weights
from distilcb.finetune.training import Recipe, train
from distilcb.tasks.declarations import TASKS
from distilcb.tasks.encoding import encode

TASK = TASKS["allocine_fr"]
_PUBLISHED = Weights()
ROWS = [{"text": text, "label": label} for text, label in (("Très bon film.", 1), ("Quel ennui !", 0))] * 8


@pytest.fixture(scope="module")
def subject(mini_teacher):
    tokenizer = AutoTokenizer.from_pretrained(mini_teacher)
    data = encode(ROWS, TASK, tokenizer, max_length=16, stride=1).features
    config = AutoConfig.from_pretrained(mini_teacher, num_hidden_layers=1, num_labels=2)

    def load():
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)

    return load, data, DataCollatorWithPadding(tokenizer)


def fit(subject, tmp_path, *, seed=0, teacher=None, weights=_PUBLISHED, lr=1e-3, epochs=2.0):
    load, data, collate = subject
    trainer, outcome = train(
        "classification",
        load,
        data,
        collate,
        recipe=Recipe(epochs=epochs, lr=lr, batch=4),
        seed=seed,
        teacher=teacher,
        weights=weights,
        folder=tmp_path,
        name="test",
    )
    return [value.detach().clone() for value in trainer.model.parameters()], outcome


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_a_seed_settles_a_training(subject, tmp_path):
    first, outcome = fit(subject, tmp_path)
    assert same(first, fit(subject, tmp_path)[0])
    assert not same(first, fit(subject, tmp_path, seed=1)[0])
    assert outcome.steps == 8
    assert outcome.diverged_at is None
    assert outcome.curve[-1][1] < outcome.curve[0][1]


def test_a_teacher_without_weight_changes_nothing(subject, tmp_path):
    torch.manual_seed(5)
    teacher = subject[0]()
    alone, _ = fit(subject, tmp_path)
    beside, _ = fit(subject, tmp_path, teacher=teacher, weights=Weights(hard=1.0, soft=0.0))
    taught, _ = fit(subject, tmp_path, teacher=teacher)
    assert same(alone, beside)
    assert not same(alone, taught)


def test_a_teacher_is_left_as_it_was(subject, tmp_path):
    teacher = subject[0]().train()
    before = [value.detach().clone() for value in teacher.parameters()]
    fit(subject, tmp_path, teacher=teacher)
    assert same(before, list(teacher.parameters()))
    assert not teacher.training
    assert all(value.grad is None for value in teacher.parameters())


def test_soft_targets_alone_bring_the_student_to_its_teacher(subject, tmp_path):
    """A teacher that has learnt the labels the wrong way round is followed, not the labels."""
    load, data, collate = subject
    torch.manual_seed(5)
    teacher = load()
    turned = data.map(lambda row: row | {"labels": 1 - row["labels"]})
    weights, _ = fit((lambda: teacher, turned, collate), tmp_path, epochs=10.0)
    for value, learnt in zip(teacher.parameters(), weights, strict=True):
        value.data.copy_(learnt)
    found, _ = fit(subject, tmp_path, teacher=teacher, weights=Weights(hard=0.0, soft=1.0), epochs=10.0)
    student = load()
    for value, learnt in zip(student.parameters(), found, strict=True):
        value.data.copy_(learnt)
    batch = collate([{"input_ids": data[number]["input_ids"]} for number in (0, 1)])
    with torch.no_grad():
        assert student.eval()(**batch).logits.argmax(-1).tolist() == [0, 1]


def test_a_loss_that_is_no_number_ends_the_training_and_is_told(subject, tmp_path):
    _, outcome = fit(subject, tmp_path, lr=1e30)
    assert outcome.diverged_at is not None
    assert outcome.steps <= 8


def test_nothing_is_written_beside(subject, tmp_path):
    fit(subject, tmp_path)
    assert list(tmp_path.iterdir()) == []
