"""One optimizer step on next words, however its batch is cut, against plain PyTorch: documents end where they like, so
ranks and micro-batches have different numbers of words to predict.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distilcb.config import LossConfig
from distilcb.data.loader import Cut, MicroBatches
from distilcb.data.next_token import NextToken
from distilcb.data.order import Order
from distilcb.data.tokenizer import Vocabulary
from distilcb.losses import reference
from distilcb.losses.triplet import TERMS
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.train.models import Models

pytestmark = pytest.mark.launch

END, VOCAB, LENGTH, GLOBAL_BATCH = 0, 61, tiny.SEQ_LEN, 16
VOCABULARY = Vocabulary(VOCAB, END, END, None, np.array([END]), np.ones(VOCAB, dtype=bool), "causal")
LOSSES = {
    "all three": LossConfig(kl=0.5, mlm=0.0, clm=0.2, cos=0.3),
    "words alone": LossConfig(kl=0.0, mlm=0.0, clm=1.0, cos=0.0),
    "kl where words are predicted": LossConfig(kl=0.5, mlm=0.0, clm=0.2, cos=0.3, kl_positions="masked"),
}
# Ranks and micro-batch.
CUTS = [(1, 16), (1, 4), (2, 8), (2, 2), (2, 1)]


class Documents:
    """Blocks in memory; in some documents end often, in some never."""

    seq_len = LENGTH

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self.tokens = random.integers(1, VOCAB, (200, LENGTH))
        self.tokens[random.random((200, LENGTH)) < random.random(200)[:, None] / 2] = END
        self.token_counts = np.bincount(self.tokens.ravel(), minlength=VOCAB)

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        return self.tokens[rows]


def models(config):
    """Teacher and student, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 32, "n_layer": 4, "n_head": 4}
        teacher = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=END, eos_token_id=END, initializer_range=0.15))
        for parameter in teacher.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    student, family = build_student(config.student, teacher=teacher, vocab_size=VOCAB, seed=0)
    return Models(Teacher(teacher), student, family, SimpleNamespace(vocabulary=VOCABULARY))


def first_steps(configs):
    """Runs on every rank."""
    started = {name: tiny.start(config, built=models(config), blocks=Documents()) for name, config in configs.items()}
    return {name: run.first_step() for name, run in started.items()}


@pytest.fixture(scope="module")
def steps(run_on_ranks):
    """First steps by objective, ranks and micro-batch; one for each rank."""
    taken = {}
    for ranks in (1, 2):
        configs = {
            (name, ranks, micro_batch): tiny.tiny_config(loss=loss, micro_batch=micro_batch)
            for name, loss in LOSSES.items()
            for count, micro_batch in CUTS
            if count == ranks
        }
        results = [rank.result for rank in run_on_ranks(first_steps, ranks, configs=configs)]
        taken |= {name: [result[name] for result in results] for name in configs}
    return taken


def plain_step(loss):
    """Gradient and sums of the first global batch: whole logits, transformers' own forward, in float64."""
    config, blocks = tiny.tiny_config(loss=loss), Documents()
    cut = Cut(GLOBAL_BATCH, GLOBAL_BATCH, 0, 1)
    batch = MicroBatches(blocks, Order(len(blocks), seed=config.train.seed), NextToken(VOCABULARY, LENGTH), cut)[0]
    built = models(config)
    student, teacher = built.student.double(), built.teacher.model.double()
    ours = student(batch.input_ids, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(batch.input_ids, output_hidden_states=True)
    logits, teacher_logits = ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1)
    words = batch.input_ids.flatten()
    # A word is predicted from the one before it in its block, unless that one ends a document.
    predicts = [place for place in range(len(words) - 1) if (place + 1) % LENGTH and words[place].item() != END]
    soft = predicts if loss.kl_positions == "masked" else list(range(len(words)))
    terms = {
        "kl": reference.soft_target_kl(logits[soft], teacher_logits[soft], temperature=loss.temperature),
        "clm": torch.nn.functional.cross_entropy(logits[predicts], words[[p + 1 for p in predicts]], reduction="sum"),
        "cos": reference.hidden_cosine(ours.hidden_states[-1].flatten(0, 1), theirs.hidden_states[-1].flatten(0, 1)),
    }
    counts = {"kl": len(soft), "clm": len(predicts), "cos": len(words)}
    sum(getattr(loss, term) * terms[term] / counts[term] for term in terms).backward()
    return {name: weight.grad for name, weight in student.named_parameters()}, terms


@pytest.mark.parametrize(("ranks", "micro_batch"), CUTS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_next_words_is_that_of_plain_pytorch_however_it_is_cut(steps, name, ranks, micro_batch):
    right, _ = plain_step(LOSSES[name])
    for rank in steps[name, ranks, micro_batch]:
        assert rank.gradient.keys() == right.keys()
        for weight, gradient in rank.gradient.items():
            error = (gradient.double() - right[weight]).norm() / (right[weight].norm() + 1e-4)
            assert error < 1e-4, weight


@pytest.mark.parametrize(("ranks", "micro_batch"), CUTS)
def test_the_sum_of_next_words_is_their_loss_times_as_many_as_full_blocks_have(steps, ranks, micro_batch):
    _, right = plain_step(LOSSES["all three"])
    total = dict(zip(TERMS, sum(rank.sums for rank in steps["all three", ranks, micro_batch]).tolist(), strict=True))
    for term in ("kl", "cos"):
        assert total[term] == pytest.approx(right[term].item(), rel=1e-5)
    words = Documents()
    order = Order(len(words), seed=0)
    batch = MicroBatches(words, order, NextToken(VOCABULARY, LENGTH), Cut(GLOBAL_BATCH, GLOBAL_BATCH, 0, 1))[0]
    share = GLOBAL_BATCH * (LENGTH - 1) / batch.labels.numel()
    assert total["clm"] == pytest.approx(right["clm"].item() * share, rel=1e-5)
