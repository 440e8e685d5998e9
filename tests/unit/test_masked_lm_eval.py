"""Held-out figures against full logits and hand-computed ones, and words filled in against transformers' pipeline."""

import copy
import math
import statistics
import types

import numpy as np
import pytest
import torch

from distilcb.config import MaskingConfig
from distilcb.data.loader import Batch, HeldoutBatches
from distilcb.data.masking import Masking
from distilcb.data.tokenizer import Vocabulary, load_tokenizer
from distilcb.errors import ConfigError, ModelError
from distilcb.eval import masked_lm
from distilcb.eval.fill_mask import as_lines, fill_masks
from distilcb.eval.masked_lm import evaluate
from distilcb.eval.models import _answers_of, check_int8, frequency_bands
from distilcb.export.onnx import INT8, OnnxModel, export_onnx
from distilcb.losses import head
from distilcb.models.families import family_of
from distilcb.models.loading import load_language_model
from distilcb.models.teacher import Teacher

CPU = torch.device("cpu")
VOCAB, LENGTH, BLOCKS = 101, 16, 7


class BlocksInMemory:
    """Random blocks, read as from disk."""

    def __init__(self, blocks=BLOCKS):
        self.rows = np.random.default_rng(0).integers(5, VOCAB, (blocks, LENGTH))

    def __len__(self):
        return len(self.rows)

    def read(self, rows):
        return self.rows[rows]


def heldout(*, micro_batch=3, rank=0, world_size=1):
    vocabulary = Vocabulary(VOCAB, 2, 3, 4, np.arange(5), np.ones(VOCAB, dtype=bool), "")
    masking = Masking(MaskingConfig(rate=0.3), vocabulary, np.ones(VOCAB, dtype=np.int64), seq_len=LENGTH, seed=0)
    return HeldoutBatches(BlocksInMemory(), masking, micro_batch=micro_batch, rank=rank, world_size=world_size)


def run(student, teacher, batches, *, maskings=3):
    family = family_of(student.config, where="student")
    return evaluate(student, teacher, family, batches, maskings=maskings, device=CPU)


@pytest.fixture
def student(tiny_model):
    return tiny_model("camembert", layers=2, seed=1)


@pytest.fixture
def teacher(tiny_model):
    """Another architecture than the student's."""
    return Teacher(tiny_model("roberta", layers=4, seed=2, hidden_size=48))


@torch.no_grad()
def masked_log_probs(model, batches, number):
    """(words, vocab) in float64, and the words, of one masking, from the transformers model's full logits."""
    rows, labels = [], []
    for batch in batches.looking(number, of=3):
        rows.append(model(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows])
        labels.append(batch.labels)
    return torch.cat(rows).double().log_softmax(-1), torch.cat(labels)


def plain_figures(student, teacher, batches, maskings):
    """Each figure of each masking."""
    values = {name: [] for name in ("mlm_loss", "mlm_accuracy", "kl", "agreement", "teacher_loss", "teacher_accuracy")}
    for number in range(maskings):
        ours, labels = masked_log_probs(student, batches, number)
        theirs, _ = masked_log_probs(teacher, batches, number)
        values["mlm_loss"].append(torch.nn.functional.nll_loss(ours, labels).item())
        values["teacher_loss"].append(torch.nn.functional.nll_loss(theirs, labels).item())
        values["mlm_accuracy"].append((ours.argmax(-1) == labels).double().mean().item())
        values["teacher_accuracy"].append((theirs.argmax(-1) == labels).double().mean().item())
        values["kl"].append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
        values["agreement"].append((theirs.argmax(-1) == ours.argmax(-1)).double().mean().item())
    return values


def error_of_mean(values):
    return statistics.stdev(values) / math.sqrt(len(values))


def test_every_figure_and_error_equals_the_one_from_full_logits(student, teacher):
    found = run(student, teacher, heldout(), maskings=4)
    plain = plain_figures(student, teacher.model, heldout(), 4)
    ours, theirs = found["student"], found["teacher"]
    pairs = [(ours, name, plain[name]) for name in ("mlm_loss", "mlm_accuracy", "kl", "agreement")]
    pairs += [(theirs, "mlm_loss", plain["teacher_loss"]), (theirs, "mlm_accuracy", plain["teacher_accuracy"])]
    for figures, name, values in pairs:
        assert figures[name] == pytest.approx(statistics.mean(values), rel=1e-5), name
        assert figures["standard_error"][name] == pytest.approx(error_of_mean(values), rel=1e-3), name
    assert len(set(plain["mlm_loss"])) == 4  # the maskings do differ
    assert ours["perplexity"] == pytest.approx(math.exp(ours["mlm_loss"]))


def test_a_student_equal_to_its_teacher_has_kl_0_and_agrees_everywhere(student):
    figures = run(student, Teacher(copy.deepcopy(student)), heldout())
    ours, theirs = figures["student"], figures["teacher"]
    assert ours["kl"] == pytest.approx(0.0, abs=1e-6)
    assert ours["agreement"] == 1.0
    assert (ours["mlm_loss"], ours["mlm_accuracy"]) == (theirs["mlm_loss"], theirs["mlm_accuracy"])


def test_kl_is_that_of_the_teacher_against_the_student_and_not_the_other_way(student, tiny_model):
    other = tiny_model(layers=2, seed=5)
    one_way = run(student, Teacher(copy.deepcopy(other)), heldout())["student"]["kl"]
    other_way = run(other, Teacher(copy.deepcopy(student)), heldout())["student"]["kl"]
    assert one_way > 0
    assert other_way > 0
    assert one_way != pytest.approx(other_way, rel=1e-3)


def test_without_a_teacher_there_are_the_students_own_figures_alone(student, teacher):
    alone, together = run(student, None, heldout()), run(student, teacher, heldout())
    assert alone.keys() == {"student"}
    assert "kl" not in alone["student"]
    assert all(alone["student"][name] == together["student"][name] for name in ("mlm_loss", "mlm_accuracy"))


class HandmadeBatches:
    """Masking 0 hides the words 7 7 7 8, masking 1 hides 7 8 8 8."""

    def looking(self, number, *, of):
        labels = [[7, 7, 7, 8], [7, 8, 8, 8]][number]
        ids, rows = torch.full((1, 8), 9), torch.tensor([1, 3, 4, 6])
        ids[0, rows] = 4
        yield Batch(ids, torch.tensor(labels), rows, torch.tensor([0, 2, 5, 7]))


def one_distribution(tiny_model, probability_of_7, probability_of_8):
    """A model that gives these two probabilities whatever it reads, and next to nothing to any other word."""
    model = tiny_model(layers=1)
    with torch.no_grad():
        model.lm_head.decoder.weight.zero_()
        model.lm_head.bias.fill_(-100.0)
        model.lm_head.bias[7], model.lm_head.bias[8] = math.log(probability_of_7), math.log(probability_of_8)
    return model


def test_figures_and_errors_of_a_hand_computed_case(tiny_model):
    student = one_distribution(tiny_model, 0.75, 0.25)
    teacher = Teacher(one_distribution(tiny_model, 0.5, 0.5 - 1e-6))
    figures = run(student, teacher, HandmadeBatches(), maskings=2)["student"]
    log_4, log_4_3 = math.log(4), math.log(4 / 3)
    # Losses of the two maskings: (3 log 4/3 + log 4) / 4 and (log 4/3 + 3 log 4) / 4. They differ by half of log 3.
    assert figures["mlm_loss"] == pytest.approx((log_4 + log_4_3) / 2, rel=1e-5)
    assert figures["standard_error"]["mlm_loss"] == pytest.approx(math.log(3) / 4, rel=1e-5)
    # Right 3 times of 4, then once: 1/2, with deviation 1/(2 sqrt 2) over the root of 2 maskings.
    assert figures["mlm_accuracy"] == pytest.approx(0.5)
    assert figures["standard_error"]["mlm_accuracy"] == pytest.approx(0.25)
    assert figures["perplexity"] == pytest.approx(math.sqrt(16 / 3), rel=1e-5)
    assert figures["standard_error"]["perplexity"] == pytest.approx(math.sqrt(16 / 3) * math.log(3) / 4, rel=1e-5)
    # KL(teacher || student) = (log(2/3) + log 2) / 2, the same for both maskings.
    assert figures["kl"] == pytest.approx((math.log(2 / 3) + math.log(2)) / 2, abs=1e-5)
    assert figures["standard_error"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert figures["agreement"] == 1.0


def test_one_masking_has_no_standard_error(student):
    figures = run(student, None, heldout(), maskings=1)["student"]
    assert all(math.isnan(error) for error in figures["standard_error"].values())


def close(found, wanted):
    errors, wanted_errors = found["standard_error"], wanted["standard_error"]
    names = [name for name in wanted if name != "standard_error"]
    return all(found[name] == pytest.approx(wanted[name], rel=1e-5) for name in names) and all(
        errors[name] == pytest.approx(wanted_errors[name], rel=1e-3, abs=1e-7) for name in wanted_errors
    )


@pytest.mark.parametrize("micro_batch", [1, 2, 7, 100])
def test_figures_do_not_depend_on_the_micro_batch(student, teacher, micro_batch):
    found = run(student, teacher, heldout(micro_batch=micro_batch))
    wanted = run(student, teacher, heldout(micro_batch=3))
    assert all(close(found[who], wanted[who]) for who in wanted)


def test_figures_do_not_depend_on_how_many_rows_the_head_takes_at_once(student, teacher, monkeypatch):
    wanted = run(student, teacher, heldout(micro_batch=7))  # 28 masked rows a batch
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)  # 16 rows, the least
    found = run(student, teacher, heldout(micro_batch=7))
    assert all(close(found[who], wanted[who]) for who in wanted)


def test_ranks_share_the_blocks_without_loss_or_double():
    whole = [batch.labels for batch in heldout(micro_batch=1).looking(0, of=1)]
    shares = [list(heldout(micro_batch=1, rank=rank, world_size=3).looking(0, of=1)) for rank in range(3)]
    dealt = [shares[number % 3][number // 3].labels for number in range(BLOCKS)]
    assert sum(map(len, shares)) == BLOCKS
    assert all(torch.equal(one, other) for one, other in zip(whole, dealt, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_models_are_left_in_the_mode_they_came_in(student, teacher, training):
    run(student.train(training), teacher, heldout())
    assert {module.training for module in student.modules()} == {training}
    assert not any(module.training for module in teacher.model.modules())


def test_dropout_does_not_touch_an_evaluation(tiny_model):
    student = tiny_model(hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    assert run(student.train(), None, heldout()) == run(student.eval(), None, heldout())


def test_an_evaluation_makes_no_gradient_and_changes_no_weight(student, teacher, parameters_of):
    before = parameters_of(student)
    run(student, teacher, heldout())
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert all(value.grad is None and value.requires_grad for value in student.parameters())


SENTENCES = (
    "Le camembert est un <mask> délicieux.",
    "Il a ouvert la <mask> et il est sorti.",
    "Je voudrais un verre d'<mask>, s'il vous plaît.",
    "<mask> est né en France.",
)


@pytest.fixture(scope="module")
def mini(mini_teacher):
    """The shipped teacher in fp32, its family and its tokenizer."""
    model = load_language_model(mini_teacher, dtype=torch.float32)
    return model, family_of(model.config, where="mini"), load_tokenizer(mini_teacher)


def test_masks_are_filled_as_by_transformers_pipeline(mini):
    from transformers import pipeline

    model, family, tokenizer = mini
    answers = fill_masks(model, family, tokenizer, SENTENCES, device=CPU, top=5)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, top_k=5, device="cpu")
    for sentence, (said, words) in zip(SENTENCES, answers, strict=True):
        wanted = fill(sentence)
        assert said == sentence
        assert [word for word, _ in words] == [answer["token_str"].strip() for answer in wanted]
        assert [share for _, share in words] == pytest.approx([answer["score"] for answer in wanted], rel=1e-4)


class OtherSign:
    """A tokenizer that writes [MASK]."""

    mask_token = "[MASK]"

    def __init__(self, tokenizer):
        self.tokenizer, self.mask_token_id, self.decode = tokenizer, tokenizer.mask_token_id, tokenizer.decode

    def __call__(self, text):
        assert "<mask>" not in text
        return self.tokenizer(text.replace("[MASK]", "<mask>"))


def test_sentences_say_mask_in_one_way_whatever_the_tokenizers_own_sign_is(mini):
    model, family, tokenizer = mini
    plain, other = (fill_masks(model, family, its, SENTENCES, device=CPU) for its in (tokenizer, OtherSign(tokenizer)))
    assert other == plain


def test_a_sentence_without_a_mask_is_passed_over(mini):
    model, family, tokenizer = mini
    answers = fill_masks(model, family, tokenizer, ("Rien à deviner.", SENTENCES[0]), device=CPU)
    assert [sentence for sentence, _ in answers] == [SENTENCES[0]]


@pytest.mark.parametrize("training", [True, False])
def test_filling_masks_leaves_the_mode_as_it_was(mini, training):
    model, family, tokenizer = mini
    fill_masks(model.train(training), family, tokenizer, SENTENCES[:1], device=CPU)
    assert model.training == training


def test_a_filled_mask_is_shown_with_its_words_and_percentages():
    assert as_lines([("Un <mask>.", [("chat", 0.421), ("chien", 0.1)])]) == ["Un <mask>.  ->  chat 42%, chien 10%"]


def test_bands_of_words_are_evaluated_apart_and_the_whole_stays_as_it_is(student, teacher):
    family = family_of(student.config, where="student")
    band_of = torch.arange(VOCAB) % 3
    band_of[band_of == 1] = 3  # none is in the second
    whole = run(student, teacher, heldout())
    found = evaluate(student, teacher, family, heldout(), maskings=3, device=CPU, band_of=band_of)
    for who in ("student", "teacher"):
        bands = found[who].pop("by_band")
        assert sorted(bands) == [0, 2, 3]
    assert found == whole


def test_a_bands_figures_are_those_of_its_words(student, teacher):
    family = family_of(student.config, where="student")
    band_of = (torch.arange(VOCAB) >= 50).long()
    found = evaluate(student, teacher, family, heldout(), maskings=2, device=CPU, band_of=band_of)
    rows = {band: {0: [], 1: []} for band in (0, 1)}
    for number in range(2):
        for batch in heldout().looking(number, of=2):
            ours, theirs = (
                torch.log_softmax(model(batch.input_ids).logits.flatten(0, 1)[batch.labelled_rows], -1)
                for model in (student, teacher.model)
            )
            for label, one, other in zip(batch.labels, ours, theirs, strict=True):
                kl = (other.exp() * (other - one)).sum().item()
                rows[int(label >= 50)][number].append((-one[label].item(), kl))
    assert len(rows[0][0]) != len(rows[0][1])  # then a mean of maskings is not that of words
    for band in (0, 1):
        own = found["student"]["by_band"][band]
        words = [*rows[band][0], *rows[band][1]]
        for column, name in enumerate(("mlm_loss", "kl")):
            assert own[name] == pytest.approx(statistics.fmean(each[column] for each in words), rel=1e-5)
            # Two ratios a: sum over maskings of (share (mean of it - mean))², times 2 / (2 - 1).
            apart = [
                len(part) / len(words) * (statistics.fmean(each[column] for each in part) - own[name])
                for part in rows[band].values()
            ]
            error = (2 * sum(each**2 for each in apart)) ** 0.5
            assert own["standard_error"][name] == pytest.approx(error, rel=1e-3)


def test_maskings_without_a_word_of_a_band_count_in_its_error():
    # Eight maskings, of which two ask for a word: one is right. Cochran: sqrt(8 / 7 (0.5² 0.5² + 0.5² 0.5²)).
    sums = torch.zeros(8, 7, dtype=torch.float64)
    sums[2, :3], sums[5, :3] = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([1.0, 1.5, 0.0])
    found = masked_lm._figures(sums, with_teacher=False, term="mlm")["student"]
    assert (found["mlm_accuracy"], found["mlm_loss"]) == (0.5, 1.0)
    assert found["standard_error"]["mlm_accuracy"] == pytest.approx(math.sqrt(8 / 7 / 8))


def test_words_are_banded_by_how_often_they_are_there():
    counts = np.zeros(20_000, dtype=np.int64)
    counts[[7, 3]] = [50, 60]
    counts[500:1700] = 2
    bands = frequency_bands(counts)
    assert (bands[3], bands[7], bands[500], bands[597], bands[598], bands[1699]) == (0, 0, 0, 0, 1, 2)
    assert np.bincount(bands).tolist() == [100, 900, 9_000, 10_000]


@pytest.fixture
def quantised(student, tmp_path):
    student.save_pretrained(tmp_path)
    export_onnx(tmp_path, int8=True)
    return OnnxModel(tmp_path / INT8)


def run_quantised(quantised, model, teacher, batches):
    family = family_of(model.config, where="student")
    answers = _answers_of(quantised)
    return evaluate(model, teacher, family, batches, maskings=3, device=CPU, answers=answers)["student"]


def test_int8_answers_in_its_models_place(student, teacher, quantised):
    """Its figures are those of its own logits of each block, beside the teacher's, and not the model's."""

    def of_each_block(ids):
        return types.SimpleNamespace(logits=torch.cat([quantised.run(block)[0] for block in ids.split(1)]))

    found = run_quantised(quantised, student, teacher, heldout())
    values = plain_figures(of_each_block, teacher.model, heldout(), 3)
    for name in ("mlm_loss", "mlm_accuracy", "kl", "agreement"):
        assert found[name] == pytest.approx(statistics.mean(values[name]), rel=1e-5)
    assert found["mlm_loss"] != run(student, teacher, heldout())["student"]["mlm_loss"]


@pytest.mark.parametrize("micro_batch", [1, 7])
def test_int8s_figures_do_not_depend_on_the_micro_batch(student, quantised, micro_batch):
    one, other = (run_quantised(quantised, student, None, heldout(micro_batch=size)) for size in (3, micro_batch))
    assert one["mlm_loss"] == pytest.approx(other["mlm_loss"], rel=1e-7)


def test_int8_of_a_causal_model_is_asked_for_the_next_words(tiny_model, tmp_path):
    model = tiny_model("gpt2", layers=2, seed=1)
    model.save_pretrained(tmp_path)
    export_onnx(tmp_path, int8=True)
    ids = torch.randint(5, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    asked = torch.tensor([0, 5, LENGTH + 2, 3 * LENGTH - 2])
    batch = Batch(ids, ids.flatten()[asked + 1], asked, torch.tensor([], dtype=torch.int64))
    small = OnnxModel(tmp_path / INT8)
    places = [divmod(row, LENGTH) for row in asked.tolist()]
    expected = torch.stack([small.run(ids[block : block + 1])[0][0, place] for block, place in places])
    torch.testing.assert_close(_answers_of(small)(batch)(slice(0, 4)), expected.log_softmax(-1))


def test_models_without_int8_are_told_together_and_what_is_none_of_theirs_is_refused(tiny_model, tmp_path):
    names = []
    for name in ("a", "b", "a, int8"):
        tiny_model("camembert", layers=1).save_pretrained(tmp_path / name)
        names.append(str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"--int8: {names[0]} and {names[1]}: no onnx/model_int8.onnx there"):
        check_int8(names[:2])
    with pytest.raises(ConfigError, match="a, int8 is a model of its own too"):
        check_int8(names)
    export_onnx(tmp_path / "a", int8=True)
    check_int8(names[:1])
    tiny_model("camembert", layers=1, vocab_size=90).save_pretrained(tmp_path / "a")
    with pytest.raises(ModelError, match=r"gives \(1, 8, 101\) of 8 tokens, needed \(1, 8, 90\)"):
        check_int8(names[:1])
