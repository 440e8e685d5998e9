"""The composition root: a Config becomes loader, teacher, student, engine and the rest, wired."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from distilcb import distributed, native
from distilcb.command_line import CommandLine
from distilcb.config import Config, LossConfig, accumulation_steps
from distilcb.data.blocks import Blocks, BlockSource
from distilcb.data.languages import order_of
from distilcb.data.loader import (
    Batch,
    Cut,
    HeldoutBatches,
    MicroBatches,
    fixed_heldout_batches,
    task_of,
    training_batches,
)
from distilcb.data.tokenizer import TextTokenizer
from distilcb.distributed import on_main
from distilcb.engine import deepspeed_config
from distilcb.engine.checkpoint import Checkpoint, Checkpoints
from distilcb.engine.lamb import ShardedLamb
from distilcb.engine.operators import FUSED_ADAM
from distilcb.engine.optimizer import build_optimizer
from distilcb.engine.step_module import StepModule
from distilcb.engine.stepper import Stepper
from distilcb.errors import ConfigError
from distilcb.export.hugging_face import save_recipe_of_model
from distilcb.launcher import World
from distilcb.losses.triplet import Counts
from distilcb.machine import is_compiled, uses_cuda, wait_for_compiler
from distilcb.models.families import Family
from distilcb.monitor.metrics import ModelShape, Window, flops_per_token, shape_of
from distilcb.monitor.writers import RunWriter
from distilcb.preemption import StopRequest
from distilcb.train.micro_batch import settle_micro_batch
from distilcb.train.models import Models, build_models_of
from distilcb.train.preflight import check_free_disk, preflight
from distilcb.train.run_folder import RunFolder, RunState, provenance
from distilcb.train.text import check_names, open_text
from distilcb.watchdog import Watchdog

log = logging.getLogger(__name__)

# How long rank zero may take to answer about a request to stop.
_STORE_SECONDS = 60.0
# Tokens of a forward pass in evaluation, at least.
_HELDOUT_TOKENS = 8192


@dataclass
class Progress:
    """What a resumed run needs beyond DeepSpeed's state; saved in each checkpoint.

    seconds: spent training so far. heldout: figures of the teacher and of the student at the start.
    """

    step: int = 0
    seconds: float = 0.0
    heldout: dict[str, Any] | None = None
    owes_evaluation: bool = False
    window: dict[str, Any] | None = None


@dataclass(frozen=True)
class Place:
    """Where a run takes place: ranks, device, DeepSpeed's settings and the precision that follows from them."""

    world: World
    device: torch.device
    settings: dict[str, Any]
    precision: str


@dataclass(eq=False)
class Run:
    """Everything that the loop uses.

    Students that are trained together have a run each; place, teacher, tokenizer, text, request to stop and watchdog
    are the same objects in all of them.

    name: of the student in messages, empty where it is trained alone.
    siblings: the run folders of all that are trained together, this one's among them, also those that are DONE.
    writer: on rank zero, while it trains.
    window: the open window of logging, while it trains.
    saved_step: that of its newest checkpoint.
    """

    config: Config
    place: Place
    folder: RunFolder
    models: Models
    engine: Any
    stepper: Stepper
    micro_batches: MicroBatches
    heldout: HeldoutBatches | None
    checkpoints: Checkpoints
    progress: Progress
    counts: Counts
    stop: StopRequest
    watchdog: Watchdog
    name: str = ""
    siblings: tuple[RunFolder, ...] = ()
    writer: RunWriter | None = None
    window: Window | None = None
    saved_step: int = 0

    @property
    def student(self) -> Any:
        """The student model inside the engine, in the run's precision."""
        return self.engine.module.student

    @property
    def flops_per_token(self) -> float:
        """Work of one training token at the step that was taken last, see monitor/metrics.py."""
        return _flops_per_token(self.config, self.models, self.counts, self.stepper.loss)

    @cached_property
    def batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the first step that is not done."""
        return training_batches(
            self.micro_batches,
            first_step=self.progress.step,
            last_step=self.config.train.steps,
            workers=self.config.data.workers,
            pin_memory=self.place.device.type == "cuda",
        )


@dataclass(frozen=True)
class _Start:
    """A run that is not done, as its folder was found."""

    command: CommandLine
    folder: RunFolder
    state: RunState


def build(command: CommandLine) -> Run | None:
    """Wire a run on this rank; None where the run folder says that it is done, or is not to go on."""
    return next(iter(build_together([command])), None)


def build_together(commands: Sequence[CommandLine]) -> list[Run]:
    """Wire the runs of students that share all but what FREE_AMONG_STUDENTS names (config.py), on this rank.

    Those that are done are left out, so that the list is empty where all are; and where one of them is not to go on.
    Run folders are made once models and text are known to fit, so that a mistake leaves nothing behind.
    """
    place = take_place(commands[0], beside=commands[1:])
    folders = tuple(RunFolder(command.run_dir) for command in commands)
    starts = _find_undone(commands, folders, place)
    if not starts:
        return []
    config = starts[0].command.config  # of text, teacher and batches the same in all
    check_names(config.data)
    all_models = build_models_of([start.command.config for start in starts], place)
    starts = [_with_micro_batch(*each, place) for each in zip(starts, all_models, strict=True)]
    config, tokenizer = starts[0].command.config, all_models[0].tokenizer
    text = open_text(config.data, tokenizer, place.world)
    facts = {
        "precision": place.precision,
        "teacher": all_models[0].teacher_hash,
        "text": text.contents,
        "deepspeed": deepspeed_config.state_layout(place.settings),
    }
    begun = _begin_all(starts, all_models, place, facts)
    heldout = _heldout_batches(config, place.world, tokenizer, text.heldout) if text.heldout else None
    shared = _Shared(place, folders, text.train, heldout, *watched(place, folders, config))
    return [_wire(*each, shared) for each in zip(starts, all_models, begun, strict=True)]


def _begin_all(
    starts: Sequence[_Start], all_models: Sequence[Models], place: Place, facts: dict[str, Any]
) -> list[tuple[Checkpoints, Checkpoint | None]]:
    """Each student's `_begin`: those that go on first, so that one that is refused leaves no new folder behind."""
    if len(starts) > 1:
        folders, keep = (
            [start.folder.path for start in starts],
            max(s.command.config.train.keep_checkpoints for s in starts),
        )
        parameters = sum(each.numel() for models in all_models for each in models.student.parameters())
        on_main(lambda: check_free_disk(*folders, parameters=parameters, keep=keep))
    pairs = list(zip(starts, all_models, strict=True))
    begun = {
        start.folder.path: _begin(start.command, place, start.folder, start.state, models, facts)
        for start, models in sorted(pairs, key=lambda pair: pair[0].state is RunState.NEW)
    }
    return [begun[start.folder.path] for start in starts]


@dataclass(frozen=True)
class _Shared:
    """What all students of a training have in common beside the teacher."""

    place: Place
    siblings: tuple[RunFolder, ...]
    blocks: BlockSource
    heldout: HeldoutBatches | None
    stop: StopRequest
    watchdog: Watchdog


def _wire(start: _Start, models: Models, begun: tuple[Checkpoints, Checkpoint | None], shared: _Shared) -> Run:
    """One student's run, brought to its newest checkpoint."""
    config, place, (checkpoints, newest) = start.command.config, shared.place, begun
    name = start.folder.path.name if len(shared.siblings) > 1 else ""
    universal = newest is not None and newest.world_size != place.world.size
    engine, stepper, micro_batches, counts = wire_stepper(
        config, place, models, shared.blocks, load_universal=universal, name=name
    )
    progress = _restore(checkpoints, newest, engine, place.world, start.state)
    return Run(
        config=config,
        place=place,
        folder=start.folder,
        models=models,
        engine=engine,
        stepper=stepper,
        micro_batches=micro_batches,
        heldout=shared.heldout,
        checkpoints=checkpoints,
        progress=progress,
        counts=counts,
        stop=shared.stop,
        watchdog=shared.watchdog,
        name=name,
        siblings=shared.siblings,
        saved_step=progress.step,
    )


def _find_undone(commands: Sequence[CommandLine], folders: Sequence[RunFolder], place: Place) -> list[_Start]:
    """The runs that are not done; none where one of them is not to go on."""
    pairs = list(zip(commands, folders, strict=True))
    states = on_main(lambda: [folder.look(command) for command, folder in pairs])
    stopped = on_main(lambda: [folder.stop.exists() for folder in folders]) if len(folders) > 1 else [False]
    for folder, state, holds_stop in zip(folders, states, stopped, strict=True):
        if state is RunState.STOPPED or holds_stop:  # one in a folder that is DONE is meant for the others
            log.info("%s is there: not starting. Remove it to go on.", folder.stop)
            return []
    starts = []
    for (command, folder), state in zip(pairs, states, strict=True):
        if state is not RunState.DONE:
            starts.append(_Start(command, folder, state))
            continue
        log.info("%s is DONE: nothing to do. --fresh starts anew and keeps it aside.", folder.path)
        if place.world.is_main:
            for line in folder.not_compared(command):
                log.warning("what it was made from is not compared: %s", line)
    return starts


def _with_micro_batch(start: _Start, models: Models, place: Place) -> _Start:
    """The start with a number for optim.micro_batch."""
    kept = None
    if start.state is RunState.RESUMED:
        kept = on_main(lambda: start.folder.micro_batch(place.world.size))
    return replace(start, command=settle_micro_batch(start.command, place, models, kept))


def watched(place: Place, folders: Sequence[RunFolder], config: Config) -> tuple[StopRequest, Watchdog]:
    """What asks the runs in these folders to stop, and what sees that their ranks move; on every rank together."""

    def connection() -> Any:
        return distributed.open_store(place.world, timeout_seconds=_STORE_SECONDS)

    watchdog = Watchdog(place.world, connection(), stall_minutes=config.train.stall_minutes)
    first, *beside = [folder.path for folder in folders]
    return StopRequest(place.world, connection(), first, beside=beside), watchdog


def _begin(
    command: CommandLine, place: Place, folder: RunFolder, state: RunState, models: Models, facts: dict[str, Any]
) -> tuple[Checkpoints, Checkpoint | None]:
    """Take the run folder, and see that its disk has room; returns its checkpoints and the one to go on from."""
    parameters, keep = sum(each.numel() for each in models.student.parameters()), command.config.train.keep_checkpoints
    if state is RunState.NEW:
        on_main(lambda: check_free_disk(folder.path, parameters=parameters, keep=keep))
    on_main(lambda: folder.begin_or_check(command, state, provenance(command, place.world.size), facts))
    on_main(lambda: save_recipe_of_model(folder.model, models.student, models.tokenizer.hugging_face))
    checkpoints = Checkpoints(folder.checkpoints, keep=keep)
    if state is RunState.NEW:
        return checkpoints, None
    on_main(checkpoints.remove_leftovers)  # a save that filled the disk may have left what it wrote
    on_main(lambda: check_free_disk(folder.path, parameters=parameters, keep=keep))
    newest = on_main(checkpoints.newest_or_none_at_all)
    if newest is None:
        on_main(lambda: folder.begin_again(provenance(command, place.world.size)))
    return checkpoints, newest


def take_place(command: CommandLine, *, beside: Sequence[CommandLine] = (), reads_only: bool = False) -> Place:
    """Meet the other ranks and settle device, sharding and precision; says which and why.

    Args:
        beside: the other students' that are trained together.
        reads_only: leave the run folder as it is; else a file is put there for a moment.

    Raises:
        ConfigError: a global batch that does not divide, or a DeepSpeed file that cannot be used here.
        LaunchError: ranks that do not go together.
    """
    config = command.config
    settings, why = _deepspeed_settings(config)
    world = distributed.discover()
    distributed.configure_logging(world)
    accumulation = accumulation_steps(config.optim, world.size)
    world = distributed.start()
    deepspeed_config.check_sections(settings)
    precision = deepspeed_config.precision(settings)
    machines = preflight(world, command, settings, beside=beside, reads_only=reads_only)
    log.info("precision: %s (%s)", precision, why)
    micro_batch, global_batch = config.optim.micro_batch, config.optim.global_batch
    a_pass = "auto" if micro_batch == "auto" else f"{micro_batch} x accumulation {accumulation}"
    log.info(
        "world: %d node(s) x %d rank(s) x micro-batch %s = global batch %d",
        *(machines, world.size // machines, a_pass, global_batch),
    )
    return Place(world, distributed.device(), settings, precision)


def wire_stepper(
    config: Config,
    place: Place,
    models: Models,
    blocks: BlockSource,
    *,
    load_universal: bool = False,
    name: str = "",
) -> tuple[Any, Stepper, MicroBatches, Counts]:
    """DeepSpeed's engine, the stepper around it, and the batches that it takes.

    Args:
        load_universal: whether the engine will load a checkpoint that another number of ranks saved.
        name: of the student in messages, where there are several.
    """
    optim, world, seed = config.optim, place.world, config.train.seed
    cut = Cut(optim.global_batch, optim.sequences_a_pass, world.rank, world.size)
    vocabulary, seq_len = models.tokenizer.vocabulary, config.data.seq_len
    task = task_of(config.masking, vocabulary, blocks, seed=seed)
    order = order_of(blocks, seed=seed, fraction=config.data.fraction)
    counts = Counts(attended=optim.global_batch * seq_len, labelled=optim.global_batch * task.k)
    module = StepModule(models.student, models.family, config.loss)
    engine = start_engine(module, config, place, load_universal=load_universal)
    stepper = Stepper(
        engine,
        models.teacher,
        loss=config.loss,
        optim=optim,
        counts=counts,
        cut=cut,
        steps=config.train.steps,
        seed=seed,
        dropout=models.family.dropout(models.student.config),
        may_overflow=place.precision == "fp16",
        device=place.device,
        student=name,
    )
    return engine, stepper, MicroBatches(blocks, order, task, cut), counts


def _heldout_batches(config: Config, world: World, tokenizer: TextTokenizer, blocks: Blocks) -> HeldoutBatches:
    # Nothing is kept for a backward pass, so that more fits than in training.
    micro_batch = max(config.optim.sequences_a_pass, _HELDOUT_TOKENS // config.data.seq_len)
    vocabulary = tokenizer.vocabulary
    return fixed_heldout_batches(blocks, vocabulary, micro_batch=micro_batch, rank=world.rank, world_size=world.size)


def start_engine(module: StepModule, config: Config, place: Place, *, load_universal: bool = False) -> Any:
    """DeepSpeed's engine around student and objective."""
    import deepspeed

    started = time.perf_counter()
    if config.optim.name == "adamw":
        wait_for_compiler(FUSED_ADAM)
    if config.optim.name == "adamw" and not is_compiled(FUSED_ADAM):
        log.info("DeepSpeed compiles its fused Adam, as it does at its first start on a machine: about a minute")
    if place.device.type == "cpu" and native.library() is None:
        log.info("our own C++ is not compiled, and steps are slower (python -m distilcb.engine.operators)")
    optimizer = build_optimizer(module, config.optim)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        config=deepspeed_config.build(
            place.settings, config.optim, world_size=place.world.size, load_universal=load_universal
        ),
        dist_init_required=False,
    )
    if isinstance(optimizer, ShardedLamb):
        optimizer.learn_layout(module)
    engine.train()
    log.info("DeepSpeed is ready after %.0f s", time.perf_counter() - started)
    return engine


def _deepspeed_settings(config: Config) -> tuple[dict[str, Any], str]:
    cuda = uses_cuda()
    path, why = deepspeed_config.choose_file(config.deepspeed, cuda=cuda, cpu_has_bf16=deepspeed_config.cpu_has_bf16())
    settings = deepspeed_config.read_file(path)
    if deepspeed_config.precision(settings) == "fp16" and not cuda:
        raise ConfigError(
            f"{path}: fp16 needs a CUDA device, and there is none here. Use --deepspeed auto, zero2_bf16 or zero2_cpu."
        )
    return settings, why


def _restore(
    checkpoints: Checkpoints, newest: Checkpoint | None, engine: Any, world: World, state: RunState
) -> Progress:
    if newest is None:
        if state is RunState.RESUMED:
            log.info("resuming: no checkpoint yet, so from the first step")
        return Progress()
    saved = checkpoints.load(engine, newest, world_size=world.size)
    log.info("resuming from %s: %d steps are done", newest.path, newest.step)
    kept = {name: saved[name] for name in ("seconds", "heldout", "owes_evaluation", "window")}
    return Progress(newest.step, **kept)


def _flops_per_token(config: Config, models: Models, counts: Counts, loss: LossConfig) -> float:
    labelled_share = counts.labelled / counts.attended
    soft = 0.0 if not (loss.kl or loss.mse) else 1.0 if loss.kl_positions == "attended" else labelled_share
    return flops_per_token(
        _shape_of(models.student, models.family),
        _shape_of(models.teacher.model, models.teacher.family) if models.teacher and loss.needs_teacher else None,
        seq_len=config.data.seq_len,
        soft_share=soft,
        head_share=max(soft, labelled_share),
        relates=bool(loss.relation),
    )


def _shape_of(model: Any, family: Family) -> ModelShape:
    return shape_of(model.config, feed_forward_size=family.feed_forward_size(model.config))
