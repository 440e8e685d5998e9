"""What a causal model learns from a text: of every token the next one, within a document."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from distilcb.config import LossConfig
from distilcb.data.loader import Cut, HeldoutBatches, MicroBatches, make_batch
from distilcb.data.next_token import NextToken
from distilcb.data.order import Order
from distilcb.data.tokenizer import Vocabulary
from distilcb.engine.lessons import lessons
from distilcb.engine.step_module import StepModule
from distilcb.eval.masked_lm import evaluate
from distilcb.losses import reference
from distilcb.losses.triplet import TERMS, Counts, coefficients, divisors
from distilcb.models.families import family_of
from distilcb.models.teacher import Teacher

END, VOCAB, LENGTH = 0, 50, 12
VOCABULARY = Vocabulary(VOCAB, END, END, None, np.array([END]), np.ones(VOCAB, dtype=bool), "causal")
TASK = NextToken(VOCABULARY, LENGTH)
LOSS = LossConfig(kl=0.5, mlm=0.0, clm=0.2, cos=0.3)


class Documents:
    """Blocks in memory, in which documents end here and there: in some blocks often, in some never."""

    seq_len = LENGTH

    def __init__(self, blocks=20):
        random = np.random.default_rng(0)
        self.tokens = random.integers(1, VOCAB, (blocks, LENGTH))
        self.tokens[random.random((blocks, LENGTH)) < random.random(blocks)[:, None] / 2] = END
        self.token_counts = np.bincount(self.tokens.ravel(), minlength=VOCAB)

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        return self.tokens[rows]


def gpt2(*, layers, seed):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCAB, n_positions=LENGTH, n_embd=16, n_layer=layers, n_head=2, bos_token_id=END)
    return GPT2LMHeadModel(config).eval()


def batch_of(blocks):
    blocks = np.array(blocks)
    return make_batch(NextToken(VOCABULARY, blocks.shape[1]), blocks, np.arange(len(blocks)), np.zeros(len(blocks)))


def test_each_token_but_the_last_of_a_document_and_of_a_block_has_the_next_for_a_label():
    batch = batch_of([[5, 6, END, 7, 8], [9, END, END, 4, END]])
    assert batch.input_ids.tolist() == [[5, 6, END, 7, 8], [9, END, END, 4, END]]
    # 6 is followed by the end of its document; what follows that end is another document.
    assert batch.labelled_rows.tolist() == [0, 1, 3, 5, 8]
    assert batch.labels.tolist() == [6, END, 8, END, END]
    assert batch.other_rows.tolist() == [2, 4, 6, 7, 9]


@pytest.mark.parametrize(("micro_batch", "world_size"), [(8, 1), (2, 1), (2, 2), (1, 4)])
def test_every_batch_of_a_step_knows_how_many_labels_the_global_batch_has(micro_batch, world_size):
    blocks, order = Documents(), Order(20, seed=1)
    for step in range(3):
        factors, labels = set(), 0
        for rank in range(world_size):
            cut = Cut(8, micro_batch, rank, world_size)
            data = MicroBatches(blocks, order, TASK, cut)
            for micro in range(cut.accumulation):
                batch = data[step * cut.accumulation + micro]
                factors.add(batch.label_factor)
                labels += batch.labels.numel()
        assert factors == {8 * (LENGTH - 1) / labels}
    assert labels < 8 * (LENGTH - 1)


@pytest.mark.parametrize("kl_positions", ["attended", "masked"])
def test_sums_and_gradient_are_those_of_plain_pytorch_divided_by_the_global_count(kl_positions):
    loss = replace(LOSS, kl_positions=kl_positions)
    student, teacher = gpt2(layers=1, seed=1), Teacher(gpt2(layers=2, seed=2))
    family = family_of(student.config, where="test")
    module, counts = StepModule(student, family, loss), Counts(attended=8 * LENGTH, labelled=8 * TASK.k)
    factors = coefficients(loss, counts, world_size=1)
    data = MicroBatches(Documents(), Order(20, seed=1), TASK, Cut(8, 4, 0, 1))
    total, found = torch.zeros(len(TERMS)), 0
    terms = {"kl": [], "clm": [], "cos": []}
    for micro in range(2):
        batch = data[micro]
        rows = batch.labelled_rows
        soft = rows if kl_positions == "masked" else torch.cat([rows, batch.other_rows])
        (taught,) = lessons(teacher, [loss], batch)
        value, sums = module(batch, taught, factors)
        found, total = found + value, total + sums
        ours = student(batch.input_ids, output_hidden_states=True)
        theirs = teacher.model(batch.input_ids, output_hidden_states=True)
        logits, taught_logits = ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1)
        soft_terms = torch.nn.functional.kl_div(
            (logits[soft] / 2).log_softmax(-1), (taught_logits[soft] / 2).softmax(-1), reduction="none"
        )
        terms["kl"].append(4 * soft_terms.sum(-1))
        terms["clm"].append(torch.nn.functional.cross_entropy(logits[rows], batch.labels, reduction="none"))
        cosine = torch.cosine_similarity(ours.hidden_states[-1], theirs.hidden_states[-1], dim=-1)
        terms["cos"].append((1 - cosine).flatten())
    means = {name: torch.cat(rows).mean() for name, rows in terms.items()}
    plain = 0.5 * means["kl"] + 0.2 * means["clm"] + 0.3 * means["cos"]
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-6)
    by = divisors(loss, counts)
    for name, mean in means.items():
        torch.testing.assert_close(total[TERMS.index(name)] / by[name], mean.detach(), rtol=1e-5, atol=1e-6)
    assert total[TERMS.index("mlm")] == 0
    weights = list(student.parameters())
    for one, other in zip(torch.autograd.grad(found, weights), torch.autograd.grad(plain, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_the_reference_of_masked_words_is_that_of_next_ones_too():
    model, batch = gpt2(layers=1, seed=1), batch_of([[5, 6, END, 7, 8]])
    with torch.no_grad():
        logits = model(batch.input_ids).logits[0]
    by_hand = -sum(logits[row].log_softmax(-1)[label] for row, label in ((0, 6), (1, END), (3, 8)))
    torch.testing.assert_close(reference.masked_lm(logits[batch.labelled_rows], batch.labels).float(), by_hand)


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_held_out_figures_are_means_over_every_next_word_whatever_the_parts(parts):
    student, teacher = gpt2(layers=1, seed=1), Teacher(gpt2(layers=2, seed=2))
    blocks = Documents()
    batches = HeldoutBatches(blocks, TASK, micro_batch=3, rank=0, world_size=1)
    family = family_of(student.config, where="test")
    figures = evaluate(student, teacher, family, batches, maskings=parts, device=torch.device("cpu"))
    assert figures["student"].keys() >= {"clm_loss", "clm_accuracy", "perplexity", "kl", "agreement"}

    def plain_loss(tokens):
        batch = batch_of(tokens)
        with torch.no_grad():
            logits = student(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows]
        return torch.nn.functional.cross_entropy(logits, batch.labels).item()

    by_part = [plain_loss(blocks.tokens[part::parts]) for part in range(parts)]
    assert figures["student"]["clm_loss"] == pytest.approx(plain_loss(blocks.tokens), rel=1e-6)
    assert figures["student"]["perplexity"] == pytest.approx(math.exp(plain_loss(blocks.tokens)), rel=1e-5)
    words = np.array([len(batch_of(blocks.tokens[part::parts]).labels) for part in range(parts)])
    apart = words / words.sum() * (np.array(by_part) - plain_loss(blocks.tokens))  # parts of unlike length: a ratio's
    error = math.sqrt(np.sum(apart**2) * parts / (parts - 1))
    assert figures["student"]["standard_error"]["clm_loss"] == pytest.approx(error, rel=1e-4)


def test_a_text_of_fewer_blocks_than_parts_has_figures_all_the_same():
    student = gpt2(layers=1, seed=1)
    batches = HeldoutBatches(Documents(3), TASK, micro_batch=3, rank=0, world_size=1)
    family = family_of(student.config, where="test")
    figures = evaluate(student, None, family, batches, maskings=8, device=torch.device("cpu"))
    assert math.isfinite(figures["student"]["clm_loss"])
    assert math.isfinite(figures["student"]["standard_error"]["clm_loss"])
