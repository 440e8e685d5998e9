"""The composition root: a Config becomes loader, teacher, student, engine and the rest, wired."""

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from distilcb import distributed
from distilcb.config import (
    CommandLine,
    Config,
    DataConfig,
    MaskingConfig,
    accumulation_steps,
    cache_folder,
)
from distilcb.data.blocks import Blocks, check_fits
from distilcb.data.loader import Batch, Cut, HeldoutBatches, MicroBatches, training_batches
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.prepare import prepare_cached
from distilcb.data.tokenizer import TextTokenizer
from distilcb.distributed import World, is_compiled, on_main
from distilcb.engine import deepspeed_config
from distilcb.engine.checkpoint import Checkpoints
from distilcb.engine.operators import FUSED_ADAM
from distilcb.engine.optimizer import build_optimizer
from distilcb.engine.step_module import StepModule
from distilcb.engine.stepper import Stepper
from distilcb.errors import ConfigError, DataError
from distilcb.export.hugging_face import save_recipe_of_model
from distilcb.losses.triplet import Counts
from distilcb.models.families import Family
from distilcb.models.loading import load_masked_lm
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.monitor.metrics import ModelShape, flops_per_token
from distilcb.train.run_folder import RunFolder, RunState, provenance

log = logging.getLogger(__name__)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Progress:
    """What a resumed run needs beyond DeepSpeed's state; saved in each checkpoint.

    seconds: spent training so far. heldout: figures of the teacher and of the student at the start.
    """

    step: int = 0
    seconds: float = 0.0
    heldout: dict[str, Any] | None = None


@dataclass
class Run:
    """Everything that the loop uses."""

    command: CommandLine
    world: World
    device: torch.device
    precision: str
    folder: RunFolder
    tokenizer: TextTokenizer
    family: Family
    teacher: Teacher | None
    engine: Any
    stepper: Stepper
    micro_batches: MicroBatches
    heldout: HeldoutBatches | None
    checkpoints: Checkpoints
    progress: Progress
    counts: Counts
    flops_per_token: float

    @property
    def config(self) -> Config:
        """The run's configuration."""
        return self.command.config

    @property
    def student(self) -> Any:
        """The student model inside the engine, in the run's precision."""
        return self.engine.module.student

    @cached_property
    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the first step that is not done."""
        return training_batches(
            self.micro_batches,
            first_step=self.progress.step,
            last_step=self.config.train.steps,
            workers=self.config.data.workers,
            pin_memory=self.device.type == "cuda",
        )


def build(command: CommandLine) -> Run | None:
    """Wire a run on this rank; None where the run folder says that it is done."""
    config = command.config
    settings, why = _deepspeed_settings(config)
    precision = deepspeed_config.precision(settings)
    world = distributed.discover()
    distributed.configure_logging(world)
    accumulation = accumulation_steps(config.optim, world.size)
    world = distributed.start()
    folder = RunFolder(command.run_dir)
    facts = {"world_size": world.size, "precision": precision}
    state = on_main(lambda: folder.open(command, provenance(command, **facts)))
    if state is RunState.DONE:
        log.info("%s is DONE: nothing to do. --fresh starts anew and keeps it aside.", folder.path)
        return None
    log.info("precision: %s (%s)", precision, why)
    log.info(
        "world: %d ranks x micro-batch %d x accumulation %d = global batch %d",
        world.size, config.optim.micro_batch, accumulation, config.optim.global_batch,
    )  # fmt: skip
    device = distributed.device()
    cut = Cut(config.optim.global_batch, config.optim.micro_batch, world.rank, world.size)
    teacher = _build_teacher(config, DTYPES[precision], device)
    tokenizer = TextTokenizer(_tokenizer_folder(config))
    student, family = build_student(
        config.student,
        teacher=teacher.model if teacher else None,
        vocab_size=tokenizer.vocabulary.size,
        seed=config.train.seed,
    )
    _check_models(config, teacher, student, family, tokenizer)
    blocks, heldout_blocks = _open_text(config, tokenizer, folder, world)
    on_main(lambda: save_recipe_of_model(folder.model, student, tokenizer.hugging_face))
    micro_batches = MicroBatches(
        blocks,
        Order(len(blocks), seed=config.train.seed, fraction=config.data.fraction),
        Masking(
            config.masking,
            tokenizer.vocabulary,
            blocks.token_counts,
            seq_len=config.data.seq_len,
            seed=config.train.seed,
        ),
        cut,
    )
    heldout = None
    if heldout_blocks:
        heldout = HeldoutBatches(
            heldout_blocks,
            _heldout_masking(config, tokenizer, blocks),
            micro_batch=config.optim.micro_batch,
            rank=world.rank,
            world_size=world.size,
        )
    engine = start_engine(StepModule(student, family, config.loss), config, settings, world)
    masked = config.optim.global_batch * micro_batches.masking.k
    counts = Counts(attended=config.optim.global_batch * config.data.seq_len, masked=masked)
    stepper = Stepper(
        engine,
        teacher,
        loss=config.loss,
        optim=config.optim,
        counts=counts,
        cut=cut,
        steps=config.train.steps,
        seed=config.train.seed,
        dropout=family.dropout(student.config),
        device=device,
    )
    checkpoints = Checkpoints(folder.checkpoints, keep=config.train.keep_checkpoints)
    progress = _restore(checkpoints, engine, world, state)
    return Run(
        command, world, device, precision, folder, tokenizer, family, teacher, engine, stepper, micro_batches,
        heldout, checkpoints, progress, counts, _flops_per_token(config, student, teacher, counts),
    )  # fmt: skip


def _heldout_masking(config: Config, tokenizer: TextTokenizer, blocks: Blocks) -> Masking:
    """15 % of the tokens, all alike, from a fixed seed: the same words are asked whatever a run trains on."""
    plain = MaskingConfig(smoothing=0.0)
    return Masking(plain, tokenizer.vocabulary, blocks.token_counts, seq_len=config.data.seq_len, seed=0)


def start_engine(module: StepModule, config: Config, settings: dict[str, Any], world: World) -> Any:
    """DeepSpeed's engine around student and objective. settings: of a ds_configs file."""
    import deepspeed

    started = time.perf_counter()
    if not is_compiled(FUSED_ADAM):
        log.info("DeepSpeed compiles its fused Adam, as it does at its first start on a machine: about a minute")
    optimizer = build_optimizer(module, config.optim)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config.build(settings, config.optim, world_size=world.size),
        dist_init_required=False,
    )
    log.info("DeepSpeed is ready after %.0f s", time.perf_counter() - started)
    return engine


def _deepspeed_settings(config: Config) -> tuple[dict[str, Any], str]:
    cuda = torch.cuda.is_available()
    path, why = deepspeed_config.choose_file(config.deepspeed, cuda=cuda, cpu_has_bf16=deepspeed_config.cpu_has_bf16())
    settings = deepspeed_config.read_file(path)
    if deepspeed_config.precision(settings) == "fp16" and not cuda:
        raise ConfigError(
            f"{path}: fp16 needs a CUDA device, and there is none here. Use --deepspeed auto, zero2_bf16 or zero2_cpu."
        )
    return settings, why


def _build_teacher(config: Config, dtype: torch.dtype, device: torch.device) -> Teacher | None:
    if config.teacher.model is None:
        return None
    model = load_masked_lm(config.teacher.model, dtype=dtype, allow_pickle=config.teacher.allow_pickle)
    return Teacher(model.to(device))


def _tokenizer_folder(config: Config) -> str:
    if config.data.tokenizer:
        return config.data.tokenizer
    return config.teacher.model or config.student.init


def _check_models(
    config: Config, teacher: Teacher | None, student: Any, family: Family, tokenizer: TextTokenizer
) -> None:
    """Raise ConfigError, with every fault, where the models, the tokenizer and the block length do not fit."""
    faults = []
    models = [("student", student, family)] + ([("teacher", teacher.model, teacher.family)] if teacher else [])
    for name, model, its_family in models:
        longest = its_family.max_seq_len(model.config)
        if config.data.seq_len > longest:
            faults.append(
                f"data.seq_len={config.data.seq_len}: the {name} has positions for {longest} tokens. "
                f"Use {longest} or less."
            )
        if model.config.vocab_size < tokenizer.vocabulary.size:
            faults.append(
                f"tokenizer {tokenizer.folder} has {tokenizer.vocabulary.size} tokens, the {name}'s vocabulary "
                f"{model.config.vocab_size}: it is not this model's tokenizer. Leave data.tokenizer out."
            )
    if teacher is not None:
        for size, needed_by in (("vocab_size", ("kl", "mse")), ("hidden_size", ("cos",))):
            ours, theirs = getattr(student.config, size), getattr(teacher.model.config, size)
            terms = [f"loss.{term}" for term in needed_by if getattr(config.loss, term)]
            if ours != theirs and terms:
                faults.append(f"student's {size} {ours}, teacher's {theirs}: {', '.join(terms)} need them equal.")
    if faults:
        raise ConfigError("\n  ".join(faults))


def _open_text(
    config: Config, tokenizer: TextTokenizer, folder: RunFolder, world: World
) -> tuple[Blocks, Blocks | None]:
    if not config.data.train:
        raise DataError("data.train is empty: name text or prepared blocks with --data.train FILE_OR_FOLDER.")
    train = _open_blocks(config.data, config.data.train, tokenizer, world)
    heldout = _open_blocks(config.data, config.data.heldout, tokenizer, world) if config.data.heldout else None
    contents = {"train": train.description.content}
    if heldout:
        contents["heldout"] = heldout.description.content
    on_main(lambda: folder.refuse_other_text(contents))
    log.info(
        "text: %s blocks of %d tokens to train on, %s held out",
        f"{len(train):,}", config.data.seq_len, f"{len(heldout):,}" if heldout else "none",
    )  # fmt: skip
    return train, heldout


def _open_blocks(data: DataConfig, names: tuple[str, ...], tokenizer: TextTokenizer, world: World) -> Blocks:
    folder = prepare_cached(
        names,
        tokenizer=tokenizer,
        cache=cache_folder(data),
        seq_len=data.seq_len,
        text_field=data.text_field,
        show_progress=world.is_main,
    )
    blocks = Blocks(Path(folder))
    fingerprint = tokenizer.vocabulary.fingerprint
    check_fits(blocks, seq_len=data.seq_len, fingerprint=fingerprint, tokenizer=tokenizer.folder)
    return blocks


def _restore(checkpoints: Checkpoints, engine: Any, world: World, state: RunState) -> Progress:
    newest = on_main(checkpoints.newest) if state is RunState.RESUMED else None
    if newest is None:
        if state is RunState.RESUMED:
            log.info("resuming: no checkpoint yet, so from the first step")
        return Progress()
    saved = checkpoints.load(engine, newest, world_size=world.size)
    log.info("resuming from %s: %d steps are done", newest.path, newest.step)
    return Progress(newest.step, saved["seconds"], saved["heldout"])


def _flops_per_token(config: Config, student: Any, teacher: Teacher | None, counts: Counts) -> float:
    masked_share = counts.masked / counts.attended
    loss = config.loss
    soft = 0.0 if not (loss.kl or loss.mse) else 1.0 if loss.kl_positions == "attended" else masked_share
    return flops_per_token(
        _shape(student),
        _shape(teacher.model) if teacher else None,
        seq_len=config.data.seq_len,
        soft_share=soft,
        head_share=max(soft, masked_share),
    )


def _shape(model: Any) -> ModelShape:
    c = model.config
    return ModelShape(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.vocab_size)
