"""One optimizer step, however its batch is cut, against plain PyTorch.

What is compared are gradients as DeepSpeed hands them to the optimizer, never weights after Adam: it forgives a
constant factor.
"""

from dataclasses import replace
from math import sqrt

import pytest
import tiny
import torch
from torch import Tensor

from distilcb.config import Config, LossConfig
from distilcb.losses import reference
from distilcb.losses.triplet import TERMS

pytestmark = pytest.mark.launch

GLOBAL_BATCH = 16
BF16 = "zero2_bf16"
# Ranks and micro-batch; the rest of the 16 sequences is accumulated.
CUTS = [(1, 1), (1, 2), (1, 4), (1, 16), (2, 1), (2, 2), (2, 4), (2, 8)]
LOSSES = {
    "all three": LossConfig(),
    "kl": LossConfig(kl=1.0, mlm=0.0, cos=0.0, temperature=3.0),
    "mlm": LossConfig(kl=0.0, mlm=1.0, cos=0.0),
    "cos": LossConfig(kl=0.0, mlm=0.0, cos=1.0),
    "masked tokens only": LossConfig(kl=0.5, mlm=0.2, cos=0.3, mse=0.1, kl_positions="masked"),
}
# 256 sequences: on 2 ranks 128 micro-batches of 1, and 4 of 32.
LONG_BATCH, LONG_CUTS = 256, {128: 1, 4: 32}


def first_steps(configs: dict[object, Config]) -> dict[object, tiny.FirstStep]:
    """Runs on every rank."""
    return {name: tiny.start(config).first_step() for name, config in configs.items()}


@pytest.fixture(scope="module")
def steps(run_on_ranks) -> dict[object, list[tiny.FirstStep]]:
    """First steps by case, one for each rank."""
    taken: dict[object, list[tiny.FirstStep]] = {}
    for ranks in (1, 2):
        configs: dict[object, Config] = {}
        for micro_batch in [micro_batch for count, micro_batch in CUTS if count == ranks]:
            for name in ("zero2_cpu", BF16):
                configs[name, ranks, micro_batch] = tiny.tiny_config(micro_batch=micro_batch, deepspeed=name)
        for name, loss in LOSSES.items():
            configs[name, ranks] = tiny.tiny_config(loss=loss)
        if ranks == 2:
            for name in ("zero2_cpu", BF16):
                for accumulation, micro_batch in LONG_CUTS.items():
                    config = tiny.tiny_config(global_batch=LONG_BATCH, micro_batch=micro_batch, deepspeed=name)
                    configs[name, accumulation] = config
            clipped = tiny.tiny_config()
            configs["clipped"] = replace(clipped, optim=replace(clipped.optim, clip=0.01))
        results = [rank.result for rank in run_on_ranks(first_steps, ranks, configs=configs)]
        taken |= {name: [result[name] for result in results] for name in configs}
    return taken


def plain_step(config: Config, *, untied: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradient and sums of the first global batch: one pass, whole logits, transformers' own forward, in float64.

    untied: embeddings and decoder are two matrices of equal values, so that each shows its own gradient.
    """
    batch, built, loss = tiny.whole_batch(config), tiny.models(config), config.loss
    assert built.teacher is not None
    student, teacher = built.student.double(), built.teacher.model.double()
    if untied:
        student.roberta.embeddings.word_embeddings.weight = torch.nn.Parameter(student.lm_head.decoder.weight.clone())
    ours = student(batch.input_ids, output_hidden_states=True)
    with torch.no_grad():
        theirs = teacher(batch.input_ids, output_hidden_states=True)
    logits, teacher_logits = ours.logits.flatten(0, 1), theirs.logits.flatten(0, 1)
    soft = batch.labelled_rows if loss.kl_positions == "masked" else torch.arange(len(logits))
    terms = {
        "kl": reference.soft_target_kl(logits[soft], teacher_logits[soft], temperature=loss.temperature),
        "mlm": reference.masked_lm(logits[batch.labelled_rows], batch.labels),
        "cos": reference.hidden_cosine(ours.hidden_states[-1].flatten(0, 1), theirs.hidden_states[-1].flatten(0, 1)),
        "mse": reference.logit_mse(logits[soft], teacher_logits[soft]),
    }
    counts = {"kl": len(soft), "mlm": len(batch.labels), "cos": len(logits), "mse": len(soft)}
    sum(getattr(loss, term) * terms[term] / counts[term] for term in terms).backward()
    return {name: weight.grad for name, weight in student.named_parameters()}, terms


def norm(gradient: dict[str, Tensor]) -> float:
    return sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def errors(gradient: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """Each weight's relative error; gradients that are 0 but for rounding (key biases) count as 1/1000 of the whole."""
    assert gradient.keys() == right.keys()
    floor = norm(right) / 1000
    return {
        name: float((gradient[name].double() - right[name].double()).norm() / (right[name].double().norm() + floor))
        for name in right
    }


def assert_close(gradient: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    found = errors(gradient, right)
    worst = max(found, key=found.__getitem__)
    assert found[worst] < tolerance, worst


@pytest.mark.parametrize(("ranks", "micro_batch"), CUTS)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(steps, ranks, micro_batch):
    cut = steps["zero2_cpu", ranks, micro_batch][0].gradient
    whole = steps["zero2_cpu", 1, GLOBAL_BATCH][0].gradient
    assert_close(cut, whole, 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_plain_pytorch(steps, loss, ranks):
    right, _ = plain_step(tiny.tiny_config(loss=LOSSES[loss]))
    for rank in steps[loss, ranks]:
        assert_close(rank.gradient, right, 1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_reported_sums_are_those_of_plain_pytorch(steps, loss, ranks):
    _, right = plain_step(tiny.tiny_config(loss=LOSSES[loss]))
    total = sum(rank.sums for rank in steps[loss, ranks])
    for term, value in zip(TERMS, total.tolist(), strict=True):
        expected = right[term].item() if getattr(LOSSES[loss], term) else 0.0
        assert value == pytest.approx(expected, rel=1e-5), term


def test_the_tied_decoder_matrix_gets_the_gradients_of_both_its_uses(steps):
    gradient = steps["zero2_cpu", 2, 4][0].gradient
    assert sum(part.shape == (tiny.VOCAB_SIZE, tiny.HIDDEN_SIZE) for part in gradient.values()) == 1
    right, _ = plain_step(tiny.tiny_config(), untied=True)
    decoder, embeddings = right["lm_head.decoder.weight"], right["roberta.embeddings.word_embeddings.weight"]
    tied = gradient["lm_head.decoder.weight"].double()
    assert (tied - (decoder + embeddings)).norm() < 1e-5 * tied.norm()
    assert min(decoder.norm(), embeddings.norm()) > 0.2 * tied.norm()  # so that leaving one out would show


def test_128_accumulation_steps_give_the_gradient_of_4(steps):
    many, few = (steps["zero2_cpu", accumulation][0].gradient for accumulation in (128, 4))
    assert_close(many, few, 1e-5)
    right, _ = plain_step(tiny.tiny_config(global_batch=LONG_BATCH))
    assert_close(many, right, 1e-5)


@pytest.mark.parametrize(("ranks", "micro_batch"), CUTS)
def test_bf16_gradients_are_near_those_of_fp32_however_a_batch_is_cut(steps, ranks, micro_batch):
    gradient = steps[BF16, ranks, micro_batch][0].gradient
    right = steps["zero2_cpu", 1, GLOBAL_BATCH][0].gradient
    micro_steps = GLOBAL_BATCH // micro_batch
    for name, error in errors(gradient, right).items():
        assert error < bf16_tolerance(name, micro_batch, micro_steps), name


def test_bf16_gradients_lose_nothing_over_128_accumulation_steps(steps):
    right, _ = plain_step(tiny.tiny_config(global_batch=LONG_BATCH))
    many, few = (errors(steps[BF16, accumulation][0].gradient, right) for accumulation in (128, 4))
    # Added up in bf16, the decoder's error over 128 steps is 1.7 times that over 4.
    assert many["lm_head.decoder.weight"] < 1.25 * few["lm_head.decoder.weight"]
    for name, error in many.items():
        assert error < bf16_tolerance(name, 1, 128), name


def test_the_gradient_norm_is_that_before_clipping(steps):
    step, unclipped = steps["clipped"][0], steps["zero2_cpu", 2, 4][0]
    assert step.grad_norm == pytest.approx(norm(unclipped.gradient), rel=1e-5)
    assert unclipped.grad_norm == pytest.approx(norm(unclipped.gradient), rel=1e-5)


def bf16_tolerance(name: str, micro_batch: int, micro_steps: int) -> float:
    tolerance = 0.03 * (1 + micro_steps / 128)
    if "orm" in name:  # on CPUs torch adds up a layer norm's gradients in bf16, row after row
        tolerance += 3e-4 * micro_batch * tiny.SEQ_LEN
    return tolerance
