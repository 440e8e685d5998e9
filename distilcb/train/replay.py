"""A step of a past run, taken again: what each of its samples contributes, and whether it comes out as it was logged.

Reads the run folder and writes nothing into it, so that it may run beside the training.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from distilcb import distributed
from distilcb.command_line import CommandLine, parse_command_line
from distilcb.config import Config, flatten
from distilcb.data.loader import training_batches
from distilcb.distributed import all_reduce_sum, broadcast_object, on_main
from distilcb.durability import write_durably
from distilcb.engine.checkpoint import Checkpoint, Checkpoints
from distilcb.engine.step_module import StepModule
from distilcb.engine.stepper import StepResult
from distilcb.errors import CheckpointError, ConfigError, ReplayError, TrainingError, writing
from distilcb.losses.triplet import TERMS, active_terms
from distilcb.monitor.metrics import Window
from distilcb.monitor.writers import METRICS, logged_steps
from distilcb.surroundings import surroundings
from distilcb.train.build import Progress, Run, take_place, watched, wire_stepper
from distilcb.train.by_sample import BySample, figures_by_sample, spare_module, take_weights
from distilcb.train.loop import loss_scale, training_record
from distilcb.train.models import build_models
from distilcb.train.replay_report import Comparison, ReplayReport, describe_samples
from distilcb.train.run_folder import RunFolder, find_run
from distilcb.train.text import check_names, open_training_text

log = logging.getLogger(__name__)

_ELSEWHERE = "Name a file that is not there yet, in a folder that can be written to."


@dataclass(frozen=True)
class Plan:
    """Which steps are taken again, counted from 1.

    first, last: those that were logged together and hold `step`; without a record, `step` alone.
    record: their line of metrics.jsonl, None where there is none.
    checkpoint: where they are reached from; None: from the first weights.
    """

    step: int
    first: int
    last: int
    record: dict[str, Any] | None
    checkpoint: Checkpoint | None

    @property
    def start(self) -> int:
        """Steps that are done where the replay starts."""
        return self.checkpoint.step if self.checkpoint else 0


def replay(
    run_dir: Path,
    *,
    step: int,
    settings: list[str],
    output: Path | None = None,
    worst: int | None = None,
    full: bool = False,
) -> ReplayReport:
    """Take step `step` of a run again, show its samples, and compare it with the run's metrics.jsonl.

    Args:
        step: counted from 1, as in metrics.jsonl.
        settings: words of a command line, over the run's own settings; those that decide the result must be the same.
        output: a file for the report; it must not be there yet.
        worst: how many samples to print, those with the largest gradients; None: all.
        full: print their whole text.

    Raises:
        UserError: no such run or step, or other text, models, precision or ranks than it was made with.
        TrainingError: the step cannot be taken, as where a loss term is not finite.
        ReplayError: it came out otherwise than it was logged.
    """
    if worst is not None and worst < 1:
        raise ConfigError(f"--worst {worst}: needed a number of samples, 1 or more.")
    folder = find_run(run_dir)
    command = parse_command_line(["--recipe", str(folder.config), "--run_dir", str(folder.path), *settings])
    config = command.config
    distributed.configure_logging(distributed.discover())
    world = distributed.start()
    # Rank zero alone decides: beside a run that goes on, ranks could find different things in its folder.
    plan = on_main(lambda: plan_replay(folder, config, step, world_size=world.size, output=output))
    _tell_plan(plan, folder)
    run, spare = _wire(folder, command, plan)
    report = ReplayReport(str(folder.path), step, plan.start, run.stepper.dropout)

    def show(figures: BySample) -> None:
        if world.is_main:
            report.samples, report.together = describe_samples(run, figures, step)
            tqdm.write(report.as_table(worst=worst, full=full))

    run.watchdog.start()
    try:
        taken, together = broadcast_object(_take_steps(run, spare, plan, show))
    except TrainingError as error:
        report.fault = str(error)
        on_main(lambda: _write(report, output))
        raise
    finally:
        run.watchdog.stop()
    report.taken = {name: taken[name] for name in _comparable(config)}
    report.comparison = _compare(plan, together, _comparable(config))
    if world.is_main:
        print(report.verdict(), flush=True)
    on_main(lambda: _write(report, output))
    if report.comparison and report.comparison.differing:
        raise _not_as_logged(report.comparison, folder)
    return report


def plan_replay(folder: RunFolder, config: Config, step: int, *, world_size: int, output: Path | None = None) -> Plan:
    """What is to be taken again; looks, and changes nothing in the run folder.

    Raises:
        ConfigError: a step before the first or beyond the last, or an output that cannot be.
        CheckpointError: other settings, a step that the run has not come to, or other ranks than took it.
    """
    if output is not None:
        _check_output(output, folder)
    _refuse(folder, "settings", folder.changed_settings(config))
    records, checkpoints = logged_steps(folder.path), Checkpoints(folder.checkpoints, keep=1)
    _check_step(step, config, reached=max([0, *(record["step"] for record in records), *checkpoints.steps()]))
    first, last, record = _logged_together(records, step)
    checkpoint = checkpoints.newest(before=first)
    _check_ranks(folder, checkpoints, checkpoint, last, world_size)
    return Plan(step, first, last, record, checkpoint)


def _check_output(output: Path, folder: RunFolder) -> None:
    if output.exists():
        raise ConfigError(f"--output {output} is there already. {_ELSEWHERE}")
    if output.resolve().is_relative_to(folder.path.resolve()):
        raise ConfigError(f"--output {output} lies in the run folder, which a replay leaves as it is. {_ELSEWHERE}")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"--output {output}: {output.parent} is no folder. Make it, or name another.")
    if not os.access(output.absolute().parent, os.W_OK):
        raise ConfigError(f"--output {output} cannot be written. {_ELSEWHERE}")


def _refuse(folder: RunFolder, what: str, changed: list[str]) -> None:
    """Raise CheckpointError where the run was begun with something else, which `changed` has lines on."""
    if changed:
        advice = (
            "A step is replayed with the text, the models and the kind of device that it was taken with. Say where "
            "they lie now (--data.train, --teacher.model), or go there."
        )
        raise CheckpointError("\n  ".join([f"{folder.path} was begun with other {what}:", *changed, advice]))


def _check_step(step: int, config: Config, *, reached: int) -> None:
    """reached: steps that the run has done for certain; it may have done a few more and not logged them yet."""
    steps, every = config.train.steps, config.train.log_every
    if not 1 <= step <= steps:
        raise ConfigError(f"--step {step}: the run has steps 1 to {steps}. Name one of them.")
    if step > min(steps, reached + every):
        raise CheckpointError(
            f"--step {step}: the run has come to step {reached} and logs every {every} steps, so it has not taken that "
            f"one yet. Name one up to {min(steps, reached + every)}, or let it go on."
        )


def _logged_together(records: list[dict[str, Any]], step: int) -> tuple[int, int, dict[str, Any] | None]:
    """The first and the last of the steps in one line with `step`, and the line; or `step` alone, and None."""
    record = next((record for record in records if record["step"] >= step), None)
    if record is not None:
        before = max((each["step"] for each in records if each["step"] < record["step"]), default=0)
        steps = record.get("window_steps")  # lines from before it was written go by the line before them
        first = (record["step"] - steps if isinstance(steps, int) else before) + 1
        if 1 <= first <= step:  # else its own line is lost
            return first, record["step"], record
    return step, step, None


def _check_ranks(
    folder: RunFolder, checkpoints: Checkpoints, checkpoint: Checkpoint | None, last: int, world_size: int
) -> None:
    """Raise CheckpointError where this is another number of ranks than took the steps up to `last`.

    Those from the first weights were taken by the ranks that the provenance tells: of their time no checkpoint may be
    kept. Every start goes on from the newest checkpoint, so the steps between two of them were taken by the ranks that
    saved the later one; those after the newest, by the ranks that saved it as far as can be known.
    """
    later = next((step for step in checkpoints.steps() if step >= last), None)
    after = checkpoints.of_step(later) if later else None
    took = (after or checkpoint).world_size if checkpoint else folder.provenance()["world_size"]
    if not checkpoint and after and after.world_size != took:
        log.warning(
            "%s was begun on %d rank(s), and %s was saved by %d: from which step on is not kept, and what %d did not "
            "take comes out otherwise",
            *(folder.path, took, after.path.name, after.world_size, took),
        )
    if checkpoint and checkpoint.world_size != took:
        raise CheckpointError(
            f"{checkpoint.path} was saved by {checkpoint.world_size} rank(s), and the steps after it were taken by "
            f"{took}: a replay loads a checkpoint on as many as saved it. Name a step before it or after the next one."
        )
    if world_size != took:
        raise CheckpointError(
            f"{folder.path}: that step was taken by {took} rank(s), not by {world_size} as here, which would give it "
            f"other last bits. Start as many: deepspeed --num_gpus {took} launch/replay.py …, or {took} tasks of srun."
        )


def _tell_plan(plan: Plan, folder: RunFolder) -> None:
    where = plan.checkpoint.path if plan.checkpoint else "the first weights, as no good checkpoint is kept from before"
    log.info("replaying step %d of %s: %d steps from %s", plan.step, folder.path, plan.last - plan.start, where)


def _wire(folder: RunFolder, command: CommandLine, plan: Plan) -> tuple[Run, StepModule]:
    """The run where the replay starts, and a spare copy of its module; as `build`, but that nothing is written."""
    config = command.config
    place = take_place(command, reads_only=True)
    on_main(lambda: refuse_facts(folder, {"precision": place.precision}))
    check_names(config.data, heldout=False)
    models = build_models(config, place)
    blocks = open_training_text(config.data, models.tokenizer, place.world)
    facts = {"teacher": models.teacher_hash, "text": {"train": blocks.content}}
    on_main(lambda: refuse_facts(folder, facts))
    spare = spare_module(models, config.loss)
    engine, stepper, micro_batches, counts = wire_stepper(config, place, models, blocks)
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    stop, watchdog = watched(place, [folder], config)
    run = Run(
        config=config,
        place=place,
        folder=folder,
        models=models,
        engine=engine,
        stepper=stepper,
        micro_batches=micro_batches,
        heldout=None,
        checkpoints=checkpoints,
        progress=Progress(),
        counts=counts,
        stop=stop,
        watchdog=watchdog,
    )
    if plan.checkpoint is not None:
        load_checkpoint(run, plan.checkpoint)
    return run, spare


def refuse_facts(folder: RunFolder, facts: dict[str, Any]) -> None:
    """Raise CheckpointError where a fact, such as a hash of the text, is not what the run was begun with."""
    _refuse(folder, " or ".join(facts), folder.changed_facts(facts))


def load_checkpoint(run: Run, checkpoint: Checkpoint) -> None:
    """Bring the run to a checkpoint.

    Raises:
        CheckpointError: it was deleted since it was chosen, as those that are too old are while a run goes on.
    """
    try:
        run.checkpoints.load(run.engine, checkpoint, world_size=run.place.world.size)
    except Exception as error:  # DeepSpeed has several for a folder that is not there, AssertionError among them
        if checkpoint.path.is_dir():
            raise
        raise CheckpointError(
            f"{checkpoint.path} is gone: the run goes on and has deleted it meanwhile. Name a later step."
        ) from error
    run.progress.step = checkpoint.step


def _take_steps(
    run: Run, spare: StepModule, plan: Plan, show: Callable[[BySample], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The record of the step alone, and that of all the steps that were logged with it."""
    batches = training_batches(
        run.micro_batches,
        first_step=plan.start,
        last_step=plan.last,
        workers=run.config.data.workers,
        pin_memory=run.place.device.type == "cuda",
    )
    together = _window(run)
    taken: dict[str, Any] = {}
    steps = range(plan.start + 1, plan.last + 1)
    for step in tqdm(steps, unit=" steps", desc="replaying", leave=False, disable=not run.place.world.is_main):
        if step == plan.first:
            together = _window(run)
        if step == plan.step:
            show(_look_at_samples(run, spare, step))
        result = run.stepper.step(step - 1, batches)
        run.progress.step = step
        together.add(result.sums, skipped=result.skipped, data_wait_seconds=result.data_wait_seconds)
        if step == plan.step:
            alone = _window(run)
            alone.add(result.sums, skipped=result.skipped, data_wait_seconds=result.data_wait_seconds)
            taken = _record(run, alone, result)
    return taken, _record(run, together, result)


def _look_at_samples(run: Run, spare: StepModule, step: int) -> BySample:
    take_weights(spare, run.engine.module)
    figures = figures_by_sample(
        spare, run.stepper, run.micro_batches, run.counts, step=step - 1, loss_scale=loss_scale(run)
    )
    spare.cpu()  # the step itself may need the room
    return figures


def _window(run: Run) -> Window:
    return Window(len(TERMS), run.place.device)


def _record(run: Run, window: Window, result: StepResult) -> dict[str, Any]:
    run.stepper.refuse_non_finite()
    return training_record(run, window, result, all_reduce_sum(window.sums.clone()).tolist(), window.seconds())


def _comparable(config: Config) -> list[str]:
    """The figures of a record that depend on nothing but what was computed."""
    terms = [f"loss/{term}" for term in active_terms(config.loss)]
    return ["loss", *terms, "lr", "grad_norm", "loss_scale", "skipped_steps"]


def _compare(plan: Plan, together: dict[str, Any], names: list[str]) -> Comparison | None:
    if plan.record is None:
        return None
    logged = {name: plan.record.get(name) for name in names}
    return Comparison(plan.first, plan.last, logged, {name: together[name] for name in names})


def _write(report: ReplayReport, output: Path | None) -> None:
    if output is not None:
        with writing(output, ConfigError, _ELSEWHERE):
            write_durably(output, report.as_json())
        print(f"report: {output}", flush=True)


def _not_as_logged(compared: Comparison, folder: RunFolder) -> ReplayError:
    begun, now = flatten(folder.provenance()), flatten(surroundings())
    changed = [f"{name} {begun[name]} -> {now[name]}" for name in now if name in begun and begun[name] != now[name]]
    steps = f"steps {compared.first} to {compared.last}" if compared.first < compared.last else f"step {compared.last}"
    lines = [f"{steps} came out otherwise than {folder.path / METRICS} says:"]
    lines += [f"{name}: logged {compared.logged[name]}, now {compared.replayed[name]}" for name in compared.differing]
    lines.append(f"Other than at the run's first start: {', '.join(changed) or 'nothing that is written down'}.")
    lines.append(
        "Bits stay the same only with the same micro-batch, ranks, threads, device, versions, student.init and "
        "train.compile."
    )
    return ReplayError("\n  ".join(lines))
