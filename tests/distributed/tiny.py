"""A training run small enough to repeat: random words, a four-layer CamemBERT, and the project's own everything else.

The functions that ranks run live in the test modules; what they share is here.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from distilcb import distributed
from distilcb.config import Config, DataConfig, LossConfig, OptimConfig, StudentConfig, TrainConfig
from distilcb.data.blocks import RandomBlocks
from distilcb.data.loader import Batch, Cut, MicroBatches, training_batches
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.tokenizer import Vocabulary
from distilcb.engine import deepspeed_config
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.engine.stepper import Stepper, StepResult
from distilcb.losses.triplet import Counts
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.train.build import Place, wire_stepper
from distilcb.train.models import Models, use_fast_layers

VOCAB_SIZE, HIDDEN_SIZE, SEQ_LEN, TEACHER_LAYERS = 307, 32, 16, 4
PAD, BOS, EOS, MASK = 1, 5, 6, VOCAB_SIZE - 1

VOCABULARY = Vocabulary(
    size=VOCAB_SIZE,
    bos_id=BOS,
    eos_id=EOS,
    mask_id=MASK,
    special_ids=np.array([*range(7), MASK]),
    word_start=np.ones(VOCAB_SIZE, dtype=bool),
    fingerprint="tiny",
)
BLOCKS = RandomBlocks(VOCABULARY, seq_len=SEQ_LEN, blocks=10_000)


def tiny_config(
    *,
    global_batch: int = 16,
    micro_batch: int = 4,
    deepspeed: str = "zero2_cpu",
    dropout: float = 0.0,
    loss: LossConfig | None = None,
    steps: int = 8,
    train: TrainConfig = TrainConfig(),  # noqa: B008  (frozen)
) -> Config:
    """The configuration of a tiny run; without clipping, which would hide a factor."""
    return Config(
        student=StudentConfig(dropout=dropout),
        data=DataConfig(seq_len=SEQ_LEN, workers=0),
        loss=loss or LossConfig(),
        optim=OptimConfig(global_batch=global_batch, micro_batch=micro_batch, clip=0.0, lr=1e-3),
        train=replace(train, steps=steps),
        deepspeed=deepspeed,
    )


def teacher_model(dtype: torch.dtype = torch.float32, *, hidden_size: int = HIDDEN_SIZE) -> Any:
    """A random CamemBERT whose logits are spread as a trained one's; its configuration asks for dropout, as usual."""
    from transformers import CamembertConfig, CamembertForMaskedLM

    config = CamembertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden_size,
        num_hidden_layers=TEACHER_LAYERS,
        num_attention_heads=4,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=SEQ_LEN + PAD + 1,
        type_vocab_size=1,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        initializer_range=0.15,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CamembertForMaskedLM(config)
        for parameter in model.parameters():  # biases would all be 0 and layer norms 1, and a forgotten one not noticed
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def models(config: Config, dtype: torch.dtype = torch.float32, *, hidden_size: int = HIDDEN_SIZE) -> Models:
    """Teacher and student, the same on every call."""
    teacher = Teacher(teacher_model(dtype, hidden_size=hidden_size))
    student, family = build_student(config.student, teacher=teacher.model, vocab_size=VOCAB_SIZE, seed=0)
    return Models(teacher, student, family, SimpleNamespace(vocabulary=VOCABULARY))  # type: ignore[arg-type]


def whole_batch(config: Config) -> Batch:
    """The first global batch, uncut."""
    size = config.optim.global_batch
    masking = Masking(config.masking, VOCABULARY, BLOCKS.token_counts, seq_len=SEQ_LEN, seed=config.train.seed)
    order = Order(len(BLOCKS), seed=config.train.seed)
    return MicroBatches(BLOCKS, order, masking, Cut(size, size, 0, 1))[0]


@dataclass(frozen=True)
class FirstStep:
    """The first step as one rank saw it.

    gradient: of each weight, over all ranks, as the optimizer was given it.
    sums: this rank's sums of the loss terms, in the order of TERMS.
    """

    gradient: dict[str, Tensor]
    sums: Tensor
    grad_norm: float


@dataclass
class TinyRun:
    """A run without a folder."""

    models: Models
    engine: Any
    stepper: Stepper
    micro_batches: MicroBatches
    counts: Counts

    def take(self, first: int, last: int) -> list[StepResult]:
        """Take steps first .. last - 1, counted from 0."""
        batches = training_batches(self.micro_batches, first_step=first, last_step=last, workers=0, pin_memory=False)
        return [self.stepper.step(step, batches) for step in range(first, last)]

    def first_step(self) -> FirstStep:
        """Take the first step, looking at the gradient right before DeepSpeed's optimizer consumes it."""
        gradient: dict[str, Tensor] = {}
        take_step = self.engine.step

        def look_then_step() -> None:
            if self.engine.is_gradient_accumulation_boundary():
                for name, weight in self.engine.module.student.named_parameters():
                    gradient[name] = safe_get_full_grad(weight).clone()
            take_step()

        self.engine.step = look_then_step
        (result,) = self.take(0, 1)
        self.engine.step = take_step
        return FirstStep(gradient, result.sums, float(result.grad_norm))


def start(
    config: Config,
    *,
    hidden_size: int = HIDDEN_SIZE,
    load_universal: bool = False,
    built: Models | None = None,
    blocks: Any = BLOCKS,
) -> TinyRun:
    """Wire a run on this rank, as train/build.py does; of other models and blocks where they are given."""
    world = distributed.start()
    path, _ = deepspeed_config.choose_file(config.deepspeed, cuda=False, cpu_has_bf16=False)
    settings = deepspeed_config.read_file(path)
    precision = deepspeed_config.precision(settings)
    place = Place(world, distributed.device(), settings, precision)
    built = built or models(config, DTYPES[precision], hidden_size=hidden_size)
    if config.train.activation_checkpointing:
        built.student.gradient_checkpointing_enable({"use_reentrant": False})
    if config.train.compile:
        use_fast_layers(built, place, compiled=True)
    return TinyRun(built, *wire_stepper(config, place, built, blocks, load_universal=load_universal))
