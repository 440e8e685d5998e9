"""Losses of tasks beside plain Python, and what they must not depend on."""

import math
from types import SimpleNamespace

import pytest
import torch

from distilcb.finetune.objective import OBJECTIVES, soft_targets
from distilcb.tasks.encoding import IGNORED


def kl(teacher, student, temperature):
    """T² KL of two lists of logits, in the plainest way."""
    weights = [[math.exp(value / temperature) for value in each] for each in (teacher, student)]
    theirs, ours = ([value / sum(each) for value in each] for each in weights)
    return temperature**2 * sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))


def logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answers(start, end):
    return SimpleNamespace(start_logits=start, end_logits=end)


def labels(values):
    return SimpleNamespace(logits=values)


QUESTIONS = OBJECTIVES["question_answering"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_targets_are_the_mean_divergence_of_rows(temperature):
    student, teacher = logits(5, 4), logits(5, 4, seed=1)
    rows = [kl(t, s, temperature) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert soft_targets(student, teacher, temperature=temperature).item() == pytest.approx(sum(rows) / 5, rel=1e-5)


def test_soft_targets_are_none_where_the_student_equals_the_teacher():
    student = logits(5, 4).requires_grad_()
    loss = soft_targets(student, student.detach().clone(), temperature=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-7)
    assert student.grad.abs().max() < 1e-7


def test_soft_targets_of_no_row_are_0():
    student = logits(0, 4).requires_grad_()
    loss = soft_targets(student, logits(0, 4), temperature=2.0)
    loss.backward()
    assert loss.item() == 0


def test_soft_targets_are_computed_in_fp32():
    student, teacher = logits(3, 4).bfloat16(), logits(3, 4, seed=1).bfloat16()
    found = soft_targets(student, teacher, temperature=2.0)
    assert found.dtype == torch.float32
    assert found == soft_targets(student.float(), teacher.float(), temperature=2.0)


def test_answers_are_learnt_from_both_ends():
    start, end, there, then = (logits(2, 6, seed=seed) for seed in range(4))
    batch = {
        "attention_mask": torch.ones(2, 6),
        "start_positions": torch.tensor([1, 4]),
        "end_positions": torch.tensor([2, 5]),
    }
    soft = QUESTIONS.soft(answers(start, end), answers(there, then), batch, 2.0)
    pairs = [(there, start), (then, end)]
    by_hand = [kl(t, s, 2.0) for each in pairs for t, s in zip(each[0].tolist(), each[1].tolist(), strict=True)]
    assert soft.item() == pytest.approx(sum(by_hand) / 4, rel=1e-5)

    def miss(row, place):
        return math.log(sum(math.exp(value) for value in row)) - row[place]

    hard = QUESTIONS.hard(answers(start, end), batch)
    missed = [
        miss(start[0].tolist(), 1),
        miss(start[1].tolist(), 4),
        miss(end[0].tolist(), 2),
        miss(end[1].tolist(), 5),
    ]
    assert hard.item() == pytest.approx(sum(missed) / 4, rel=1e-5)


def test_without_padding_the_loss_of_answers_is_that_of_transformers(mini_teacher):
    from transformers import AutoConfig, AutoModelForQuestionAnswering

    config = AutoConfig.from_pretrained(mini_teacher, num_hidden_layers=1, num_labels=2)
    model = AutoModelForQuestionAnswering.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(10, 100, (2, 6), generator=torch.Generator().manual_seed(0))
    places = {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([2, 5])}
    output = model(ids, **places)
    ours = QUESTIONS.hard(output, {"attention_mask": torch.ones(2, 6)} | places)
    assert ours.item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_padding_takes_no_part_in_answers():
    places = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([2, 2])}
    short = [logits(2, 4, seed=seed) for seed in range(4)]
    found = []
    for value in (0.0, 70.0):
        start, end, there, then = (
            torch.cat([each, torch.full((2, 3), value * (number + 1))], 1).requires_grad_()
            for number, each in enumerate(short)
        )
        mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0]] * 2)
        batch = {"attention_mask": mask} | places
        losses = [
            QUESTIONS.hard(answers(start, end), batch),
            QUESTIONS.soft(answers(start, end), answers(there.detach(), then.detach()), batch, 2.0),
        ]
        sum(losses).backward()
        assert start.grad[:, 4:].abs().max() == 0
        assert torch.isfinite(start.grad).all()
        found.append([loss.item() for loss in losses])
    batch = {"attention_mask": torch.ones(2, 4)} | places
    bare = [
        QUESTIONS.hard(answers(*short[:2]), batch).item(),
        QUESTIONS.soft(answers(*short[:2]), answers(*short[2:]), batch, 2.0).item(),
    ]
    assert found[0] == pytest.approx(bare, rel=1e-5)
    assert found[1] == pytest.approx(bare, rel=1e-5)


def test_a_label_is_learnt_by_its_number_and_by_the_teachers_distribution():
    student, teacher, batch = logits(3, 4), logits(3, 4, seed=1), {"labels": torch.tensor([0, 3, 1])}
    objective = OBJECTIVES["classification"]
    by_hand = [kl(t, s, 2.0) for t, s in zip(teacher.tolist(), student.tolist(), strict=True)]
    assert objective.soft(labels(student), labels(teacher), batch, 2.0).item() == pytest.approx(sum(by_hand) / 3)
    chances = torch.softmax(student, -1)[torch.arange(3), batch["labels"]].tolist()
    missed = sum(-math.log(chance) for chance in chances) / 3
    assert objective.hard(labels(student), batch).item() == pytest.approx(missed, rel=1e-5)


def test_a_score_is_learnt_by_its_squared_distance():
    student, teacher = torch.tensor([[1.0], [2.0]]), torch.tensor([[4.0], [2.5]])
    objective, batch = OBJECTIVES["regression"], {"labels": torch.tensor([0.0, 4.0])}
    assert objective.hard(labels(student), batch).item() == pytest.approx((1 + 4) / 2)
    assert objective.soft(labels(student), labels(teacher), batch, 2.0).item() == pytest.approx((9 + 0.25) / 2)


def test_tags_are_learnt_at_labelled_tokens_alone():
    student, teacher = logits(2, 4, 3), logits(2, 4, 3, seed=1)
    batch = {"labels": torch.tensor([[IGNORED, 2, IGNORED, 0], [IGNORED, 1, IGNORED, IGNORED]])}
    asked = [(0, 1), (0, 3), (1, 1)]
    objective = OBJECTIVES["tagging"]
    by_hand = [kl(teacher[place].tolist(), student[place].tolist(), 2.0) for place in asked]
    assert objective.soft(labels(student), labels(teacher), batch, 2.0).item() == pytest.approx(sum(by_hand) / 3)
    chances = [torch.softmax(student[place], -1)[label].item() for place, label in zip(asked, (2, 0, 1), strict=True)]
    missed = -sum(math.log(chance) for chance in chances) / 3
    assert objective.hard(labels(student), batch).item() == pytest.approx(missed, rel=1e-5)


def test_next_words_are_learnt_by_the_token_before():
    student = logits(2, 4, 5)
    batch = {"labels": torch.tensor([[0, 1, IGNORED, 3], [2, 2, 4, IGNORED]])}
    asked = [((0, 0), 1), ((0, 2), 3), ((1, 0), 2), ((1, 1), 4)]
    missed = [-math.log(torch.softmax(student[place], -1)[word].item()) for place, word in asked]
    found = OBJECTIVES["causal"].hard(labels(student), batch)
    assert found.item() == pytest.approx(sum(missed) / 4, rel=1e-5)


def test_next_words_taken_a_few_at_a_time_are_those_taken_together():
    teacher = logits(3, 400, 7, seed=1)
    together, apart = (logits(3, 400, 7).requires_grad_() for _ in range(2))
    whole = soft_targets(together.flatten(0, 1), teacher.flatten(0, 1), temperature=2.0)
    parts = OBJECTIVES["causal"].soft(labels(apart), labels(teacher), {}, 2.0)
    whole.backward()
    parts.backward()
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(apart.grad, together.grad)
