"""The training loop, and what follows its last step."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from distilcb.config import flatten, to_plain
from distilcb.data.loader import HeldoutBatches
from distilcb.distributed import all_reduce_sum, barrier, is_lost_connection, on_main
from distilcb.engine.stepper import StepResult, step_together
from distilcb.errors import TrainingError, UserError
from distilcb.eval.fill_mask import as_lines, fill_masks
from distilcb.eval.masked_lm import InterruptedEvaluation, evaluate
from distilcb.eval.report import as_console, heldout_rows
from distilcb.losses.triplet import TERMS, active_terms, divisors, weighted_loss
from distilcb.monitor.metrics import Window, peak_flops, peak_memory_bytes
from distilcb.monitor.writers import RunWriter, StepBar
from distilcb.train.build import Run
from distilcb.train.export import write_student
from distilcb.train.micro_batch import is_out_of_memory, refused_memory
from distilcb.train.run_folder import RunFolder
from distilcb.watchdog import Place, at

log = logging.getLogger(__name__)

# Maskings of an evaluation within the run; those at the start and the end take train.eval_maskings.
_QUICK_MASKINGS = 2


def train(run: Run) -> None:
    """Take the steps that are left, then finish the run folder; where it is asked to stop, save and return.

    Raises:
        ConfigError: a pass is more than the device's memory holds.
        TrainingError: on every rank, where one is lost, stands still or computes what is not finite.
    """
    train_together([run])


def train_together(runs: Sequence[Run]) -> None:
    """As `train`, for students that learn from the same teacher's passes over the same batches, at least one.

    Those that are further than others wait for them, so each takes every step once, and none is changed by the others.
    """
    lead = runs[0]  # place, request to stop and watchdog are the same of all
    with ExitStack() as stack:
        barrier()  # whoever reads its checkpoint for a minute longer than rank zero is not silent
        lead.watchdog.start()
        stack.callback(lead.watchdog.stop)
        lead.stop.listen()
        stack.callback(lead.stop.stop_listening)
        if lead.place.world.is_main:
            _open_writers(runs, stack)
        try:
            reason = lead.stop.agreed_now() or _look_before_first_step(runs) or _take_steps(runs) or _finish(runs)
        except (UserError, TrainingError) as error:
            lead.watchdog.confess(error)
            raise
        except RuntimeError as error:
            if is_lost_connection(error):
                raise lead.watchdog.lost(error) from error
            if is_out_of_memory(error):
                refused = refused_memory(lead.config)
                lead.watchdog.confess(refused)
                raise refused from error
            raise
    if reason:
        log.info(
            "stopped after step %d of %d (%s). %s goes on from there.",
            *(_furthest_back(runs).progress.step, lead.config.train.steps, reason),
            "With that file removed the same command"
            if any(folder.stop.exists() for folder in lead.siblings)
            else "The same command",
        )


def _take_steps(runs: Sequence[Run]) -> str | None:
    """Train; returns why it was stopped before the last step, if it was."""
    behind = _furthest_back(runs)
    steps, stop, writer = behind.config.train.steps, behind.stop, behind.writer
    if writer:
        writer.bar.start_clock()
    for step in range(behind.progress.step, steps):
        learning = [run for run in runs if run.progress.step == step]  # the others are further, and wait
        for run in learning:
            run.window = run.window or _restored_window(run)
        if reason := _look_where_owed(learning):
            for run in learning:  # some may stand at the checkpoint that they came from, others further
                if run.progress.step != run.saved_step:
                    _save(run)
            return reason
        results = step_together([run.stepper for run in learning], step, behind.batches)
        for run, result in zip(learning, results, strict=True):
            _window(run).add(result.sums, skipped=result.skipped, data_wait_seconds=result.data_wait_seconds)
            run.progress.step = step + 1
        if writer:
            writer.bar.advance()
        saving = [run for run in learning if _due(step + 1, run.config.train.save_every, steps)]
        for run, result in zip(learning, results, strict=True):
            if run in saving or _due(step + 1, run.config.train.log_every, steps):
                _log(run, result)  # it also refuses to save what is not finite
        reason = stop.agreed_after(step + 1)
        for run in learning:
            run.progress.owes_evaluation = _due(step + 1, run.config.train.eval_every) and step + 1 < steps
        reason = reason or _look_where_owed(learning)
        for run in learning if reason else saving:
            _outside_windows(learning, _save, run)
        if reason:
            return reason
        if writer:
            writer.bar.start_clock()
    return None


def _furthest_back(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: run.progress.step)


def _open_writers(runs: Sequence[Run], stack: ExitStack) -> None:
    """Open each run's writer until the stack ends, all with one bar."""
    steps = runs[0].config.train.steps
    bar = StepBar(steps=steps, first_step=_furthest_back(runs).progress.step)
    for run in runs:
        writer = RunWriter(run.folder.path, steps=steps, first_step=run.progress.step, bar=bar, student=run.name)
        run.writer = stack.enter_context(writer)


def _due(step: int, every: int, last: int | None = None) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _outside_windows(learning: Sequence[Run], action: Callable[[Run], None], run: Run) -> None:
    """Do for one run what is not training; it counts in no student's times."""
    started = time.perf_counter()
    action(run)
    seconds = time.perf_counter() - started
    for each in learning:
        _window(each).pause(seconds)


def _window(run: Run) -> Window:
    assert run.window is not None  # it trains
    return run.window


def _log(run: Run, result: StepResult) -> None:
    """Reduce the window over ranks once, write it on rank zero, and open the next one."""
    run.stepper.refuse_non_finite()
    window = _window(run)
    sums = all_reduce_sum(window.sums).tolist()
    seconds = window.seconds()
    run.progress.seconds += seconds
    if run.writer:
        run.writer.training(training_record(run, window, result, sums, seconds))
    run.window = Window(len(TERMS), run.place.device)


def training_record(run: Run, window: Window, result: StepResult, sums: list[float], seconds: float) -> dict[str, Any]:
    """A line of metrics.jsonl: means over a window's steps, and of its last one rate, gradient norm and loss scale.

    sums: of the window, over all ranks. seconds: how long it took.
    """
    config = run.config
    by = divisors(config.loss, run.counts)
    means = {term: total / (by[term] * window.steps) for term, total in zip(TERMS, sums, strict=True)}
    step_tokens = config.optim.global_batch * config.data.seq_len
    rate = step_tokens * window.steps / seconds
    peak = peak_flops(run.place.device)
    record = {
        "step": run.progress.step,
        "window_steps": window.steps,
        "tokens": run.progress.step * step_tokens,
        "epoch": run.progress.step * config.optim.global_batch / run.micro_batches.order.size,
        "seconds": run.progress.seconds,
        "loss": weighted_loss(means, config.loss),
        **{f"loss/{term}": means[term] for term in active_terms(config.loss)},
        "lr": result.lr,
        "grad_norm": _finite(result.grad_norm),
        "loss_scale": loss_scale(run),
        "skipped_steps": window.skipped,
        "tokens_per_second": rate,
        "data_wait_fraction": window.data_wait_seconds / seconds,
        "memory_bytes": peak_memory_bytes(run.place.device),
    }
    if peak:
        record["mfu"] = rate * run.flops_per_token / (peak * run.place.world.size)
    return record


def loss_scale(run: Run) -> float:
    """What fp16 multiplies the loss with at this moment; 1 in other precisions."""
    return float(run.engine.optimizer.cur_scale) if run.place.precision == "fp16" else 1.0


def _finite(value: Any) -> float | None:
    """A number for JSON, which has no infinity: the gradient of a step that fp16 skipped has no norm."""
    return float(value) if value is not None and math.isfinite(value) else None


def _evaluate(run: Run, heldout: HeldoutBatches, maskings: int) -> dict[str, Any]:
    return evaluate(
        run.student,
        run.models.teacher,
        run.models.family,
        heldout,
        maskings=maskings,
        device=run.place.device,
        interrupted=run.stop.heard,
    )


def _look_before_first_step(runs: Sequence[Run]) -> str | None:
    """Evaluate each student before its first step; returns why it was stopped meanwhile, if it was."""
    for run in runs:
        try:
            if not run.progress.step:
                _look_at_the_start(run)
        except InterruptedEvaluation:
            return run.stop.agreed_now()
    return None


def _look_at_the_start(run: Run) -> None:
    if run.heldout:
        log.info("%sevaluating on held-out text, before the first step", _prefix(run))
        figures = _evaluate(run, run.heldout, run.config.train.eval_maskings)
        run.progress.heldout = {"student_start": figures["student"]}
        if "teacher" in figures:
            run.progress.heldout = {"teacher": figures["teacher"], "student_start": figures["student"]}
    if run.writer:
        if run.heldout:
            run.writer.evaluation(0, figures)
        _write_samples(run, run.writer)


def _look_where_owed(learning: Sequence[Run]) -> str | None:
    """Evaluate the students that owe it; returns why that was broken off, if it was: the rest of it stays owed."""
    for run in learning:
        if run.progress.owes_evaluation:
            _outside_windows(learning, _look_in_between, run)
        if run.progress.owes_evaluation:
            return run.stop.agreed_now()
    return None


def _look_in_between(run: Run) -> None:
    """Evaluate; where a request to stop came meanwhile, the evaluation is still owed."""
    try:
        figures = _evaluate(run, run.heldout, _QUICK_MASKINGS) if run.heldout else None
    except InterruptedEvaluation:
        return
    run.progress.owes_evaluation = False
    if run.writer:
        if figures:
            run.writer.evaluation(run.progress.step, figures)
        _write_samples(run, run.writer)


def _prefix(run: Run) -> str:
    """What tells a student's line from the others', where there are others."""
    return f"{run.name}: " if run.name else ""


def _write_samples(run: Run, writer: RunWriter) -> list[str]:
    sentences = run.config.data.sample_sentences
    answers = fill_masks(
        run.student, run.models.family, run.models.tokenizer.hugging_face, sentences, device=run.place.device
    )
    lines = as_lines(answers)
    writer.text("fill_mask", "\n".join(f"- {line}" for line in lines), run.progress.step)
    return lines


def _save(run: Run) -> None:
    run.stepper.refuse_non_finite()
    at(Place.SAVING)
    progress, world, window = run.progress, run.place.world, _window(run)
    rows = torch.zeros(world.size, len(TERMS), dtype=torch.float64, device=run.place.device)
    rows[world.rank] = window.sums
    open_window = window.state(all_reduce_sum(rows).tolist()) if window.steps else None
    state = {"seconds": progress.seconds, "heldout": progress.heldout}
    state |= {"owes_evaluation": progress.owes_evaluation, "window": open_window}
    if run.writer:
        run.writer.sync()
    run.checkpoints.save(run.engine, step=progress.step, world_size=world.size, state=state)
    run.saved_step = progress.step


def _restored_window(run: Run) -> Window:
    """The window of logging that was open when the checkpoint was saved, or a new one."""
    window = Window(len(TERMS), run.place.device)
    if run.progress.window:
        window.restore(run.progress.window, rank=run.place.world.rank, world_size=run.place.world.size)
    return window


def _finish(runs: Sequence[Run]) -> str | None:
    """Finish one run folder after the other, then show the console's last screen.

    Returns why it was stopped in an evaluation, if it was.
    """
    if runs[0].writer:
        runs[0].writer.bar.end()
    screen = ""
    for run in runs:
        try:
            screen = _finish_one(run)
        except InterruptedEvaluation:
            return run.stop.agreed_now()
    if runs[0].writer:
        print("\n" + (_last_screen_of_all(runs[0].siblings) if runs[0].name else screen), flush=True)
    return None


def _finish_one(run: Run) -> str:
    """Final figures, the exported student, summary.json, DONE; returns the last screen.

    Raises:
        InterruptedEvaluation: on every rank.
    """
    heldout = dict(run.progress.heldout or {})
    if run.heldout:
        log.info("%sevaluating on held-out text, after the last step", _prefix(run))
        figures = _evaluate(run, run.heldout, run.config.train.eval_maskings)
        heldout["student"] = figures["student"]
    summary = {"heldout": heldout, "train": _train_summary(run)}

    def finish_on_main() -> str:
        """What rank zero writes, DONE last."""
        writer = run.writer
        assert writer is not None
        samples = _write_samples(run, writer)
        rows = heldout_rows(heldout)
        _export(run, heldout)
        if heldout:
            writer.evaluation(run.progress.step, figures)
        results = {f"heldout/{n}": v for n, v in flatten(heldout.get("student", {})).items()}
        writer.results(flatten(to_plain(run.config)), results | {"train/tokens": summary["train"]["tokens"]})
        run.folder.write_summary(summary)
        writer.finish()
        run.folder.write_done()
        run.folder.leave()
        return _last_screen(run, as_console(rows) if heldout else "", samples)

    at(Place.FINISHING)
    return on_main(finish_on_main)


def _train_summary(run: Run) -> dict[str, Any]:
    tokens = run.progress.step * run.config.optim.global_batch * run.config.data.seq_len
    seconds = max(run.progress.seconds, 1e-9)
    return {
        "steps": run.progress.step,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(run.place.device),
        "world_size": run.place.world.size,
        "precision": run.place.precision,
    }


def _export(run: Run, heldout: dict[str, Any]) -> None:
    newest = run.checkpoints.of_step(run.progress.step)
    assert newest is not None  # the last step has just been saved
    write_student(run.folder, newest, run.config, heldout, run.folder.student)


def _last_screen(run: Run, table: str, samples: list[str]) -> str:
    parts = [table, "\n".join(samples)]
    parts.append(
        f"student:      {run.folder.student}\n"
        f"curves:       tensorboard --logdir {run.folder.path.parent}\n"
        f"summary:      {run.folder.summary}"
    )
    return "\n\n".join(part for part in parts if part)


def _last_screen_of_all(folders: Sequence[RunFolder]) -> str:
    """Of students that were trained together, all of them DONE."""
    rows: dict[str, Any] = {}
    for folder in folders:
        if not folder.summary.is_file():  # somebody has taken it away since that one was DONE
            continue
        heldout = folder.read_summary()["heldout"]
        rows |= {"teacher": heldout["teacher"]} if "teacher" in heldout else {}
        rows |= {f"{folder.path.name}, end": heldout["student"]} if "student" in heldout else {}
    lines = [f"{'' if number else 'students:':14}{folder.student}" for number, folder in enumerate(folders)]
    lines.append(f"curves:       tensorboard --logdir {folders[0].path.parent}")
    return "\n\n".join([*([as_console(heldout_rows(rows))] if rows else []), "\n".join(lines)])
