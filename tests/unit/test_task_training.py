"""One fine-tuning: what the seed settles, what the teacher adds, and how it ends without a number."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

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


def fit(subject, tmp_path, **settings):
    trainer, outcome = trained(subject, tmp_path, **settings)
    return [value.detach().clone() for value in trainer.model.parameters()], outcome


def trained(
    subject,
    tmp_path,
    *,
    kind="classification",
    seed=0,
    teacher=None,
    weights=_PUBLISHED,
    lr=1e-3,
    epochs=2.0,
    by_length=False,
):
    load, data, collate = subject
    return train(
        kind,
        load,
        data,
        collate,
        recipe=Recipe(epochs=epochs, lr=lr, batch=4, by_length=by_length),
        seed=seed,
        teacher=teacher,
        weights=weights,
        folder=tmp_path,
        name="test",
    )


def same(one, other):
    return all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_a_seed_settles_a_training(subject, tmp_path):
    first, outcome = fit(subject, tmp_path)
    assert same(first, fit(subject, tmp_path)[0])
    assert not same(first, fit(subject, tmp_path, seed=1)[0])
    assert outcome.steps == 8
    assert outcome.diverged_at is None
    assert outcome.curve[-1][1] < outcome.curve[0][1]


@pytest.fixture(scope="module")
def of_many_lengths(subject, mini_teacher):
    """Rows of 4 to 34 words, the short ones and the long ones mixed."""
    load, _, collate = subject
    rows = [{"text": "un bon " * (2 + 7 * number % 16), "label": number % 2} for number in range(64)]
    tokenizer = AutoTokenizer.from_pretrained(mini_teacher)
    return load, encode(rows, TASK, tokenizer, max_length=64, stride=1).features, collate


def batches_read(subject, tmp_path, **settings):
    """Lengths and labels of the rows of each batch, in turn."""
    load, data, collate = subject
    read = []

    def noted(rows):
        read.append([(len(row["input_ids"]), row["labels"]) for row in rows])
        return collate(rows)

    trained((load, data, noted), tmp_path, **settings)
    return read


def test_batches_of_like_lengths_hold_every_row_once_a_pass_in_the_seeds_order(of_many_lengths, subject, tmp_path):
    load, data, collate = of_many_lengths
    once = batches_read(of_many_lengths, tmp_path, by_length=True)
    all_rows = sorted((len(row["input_ids"]), row["labels"]) for row in data)
    for one_pass in (once[:16], once[16:]):
        assert sorted(row for batch in one_pass for row in batch) == all_rows
    assert once[:16] != once[16:]
    tokens = sum(length for batch in once for length, _ in batch)
    padded, without = (
        sum(4 * max(batch)[0] for batch in batches) - tokens
        for batches in (once, batches_read(of_many_lengths, tmp_path))
    )
    assert 0 < 2 * padded < without
    assert once != batches_read(of_many_lengths, tmp_path, by_length=True, seed=1)

    def other():  # a model that takes more random numbers to make
        torch.rand(100)
        return load()

    assert batches_read((other, data, collate), tmp_path, by_length=True) == once


def classified(text, number):
    return {"text": text, "label": number % 2}


def tagged(text, number):
    return {"tokens": text.split(), "tags": [number % 9] * len(text.split())}


def asked(text, number):
    answers = {"text": ["Lyon"], "answer_start": [len(text) + 2]}
    return {"question": f"Où, {number} ?", "context": f"{text}à Lyon.", "answers": answers}


@pytest.mark.parametrize(
    ("task", "row_of", "model_of", "collator"),
    [
        ("allocine_fr", classified, AutoModelForSequenceClassification, DataCollatorWithPadding),
        ("ner_fr", tagged, AutoModelForTokenClassification, DataCollatorForTokenClassification),
        ("fquad", asked, AutoModelForQuestionAnswering, DataCollatorWithPadding),
    ],
)
def test_what_is_said_of_rows_stands_in_their_order(mini_teacher, tmp_path, task, row_of, model_of, collator):
    tokenizer, task = AutoTokenizer.from_pretrained(mini_teacher), TASKS[task]
    rows = [row_of("un bon " * (2 + 7 * number % 16), number) for number in range(64)]
    data = encode(rows, task, tokenizer, max_length=128, stride=64).features
    assert len(data) == 64
    config = AutoConfig.from_pretrained(mini_teacher, num_hidden_layers=1, num_labels=len(task.labels) or 2)
    collate = collator(tokenizer)
    subject = (lambda: model_of.from_config(config, dtype=torch.float32)), data, collate
    trainer, _ = trained(subject, tmp_path, kind=task.kind, epochs=0.25, by_length=True)
    said = trainer.logits_of(data)
    assert isinstance(said, tuple) == (task.kind == "question_answering")
    for number in (0, 3, 17, 31):
        with torch.no_grad():
            alone = trainer.model.eval()(**collate([{"input_ids": data[number]["input_ids"]}])).to_tuple()
        for of_all, of_one in zip(said if isinstance(said, tuple) else (said,), alone, strict=True):
            unpadded = torch.tensor(of_all[number])[: of_one.shape[1]]
            torch.testing.assert_close(unpadded, of_one[0], rtol=1e-4, atol=1e-5)


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
