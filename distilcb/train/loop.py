"""The training loop, and what follows its last step."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from distilcb.config import flatten, to_plain
from distilcb.data.loader import HeldoutBatches
from distilcb.distributed import all_reduce_sum, barrier, is_lost_connection, on_main
from distilcb.engine.stepper import StepResult
from distilcb.errors import TrainingError, UserError
from distilcb.eval.fill_mask import as_lines, fill_masks
from distilcb.eval.masked_lm import InterruptedEvaluation, evaluate
from distilcb.eval.report import as_console, heldout_rows
from distilcb.losses.triplet import TERMS, active_terms, divisors, weighted_loss
from distilcb.monitor.metrics import Window, peak_flops, peak_memory_bytes
from distilcb.monitor.writers import RunWriter
from distilcb.train.build import Run
from distilcb.train.export import write_student
from distilcb.watchdog import Place, at

log = logging.getLogger(__name__)

# Maskings of an evaluation within the run; those at the start and the end take train.eval_maskings.
_QUICK_MASKINGS = 2


def train(run: Run) -> None:
    """Take the steps that are left, then finish the run folder; where it is asked to stop, save and return.

    Raises:
        TrainingError: on every rank, where one is lost, stands still or computes what is not finite.
    """
    with ExitStack() as stack:
        barrier()  # whoever reads its checkpoint for a minute longer than rank zero is not silent
        run.watchdog.start()
        stack.callback(run.watchdog.stop)
        run.stop.listen()
        stack.callback(run.stop.stop_listening)
        writer = None
        if run.place.world.is_main:
            writer = stack.enter_context(
                RunWriter(run.folder.path, steps=run.config.train.steps, first_step=run.progress.step)
            )
        try:
            reason = run.stop.agreed_now() or _look_before_first_step(run, writer) or _take_steps(run, writer)
            reason = reason or _finish(run, writer)
        except (UserError, TrainingError) as error:
            run.watchdog.confess(error)
            raise
        except RuntimeError as error:
            if is_lost_connection(error):
                raise run.watchdog.lost(error) from error
            raise
    if reason:
        log.info(
            "stopped after step %d of %d (%s). %s goes on from there.",
            *(run.progress.step, run.config.train.steps, reason),
            "With that file removed the same command" if run.folder.stop.exists() else "The same command",
        )


def _take_steps(run: Run, writer: RunWriter | None) -> str | None:
    """Train; returns why it was stopped before the last step, if it was."""
    steps, progress = run.config.train.steps, run.progress
    if writer:
        writer.start_clock()
    window = _restored_window(run)
    for step in range(progress.step, steps):
        if progress.owes_evaluation:
            window.pause(_timed(_look_in_between, run, writer))
        if progress.owes_evaluation:
            return run.stop.agreed_now()
        result = run.stepper.step(step, run.batches)
        window.add(result.sums, skipped=result.skipped, data_wait_seconds=result.data_wait_seconds)
        progress.step = step + 1
        if writer:
            writer.advance()
        saving = _due(step + 1, run.config.train.save_every, steps)
        if saving or _due(step + 1, run.config.train.log_every, steps):
            window = _log(run, writer, window, result)  # it also refuses to save what is not finite
        reason = run.stop.agreed_after(step + 1)
        progress.owes_evaluation = _due(step + 1, run.config.train.eval_every) and step + 1 < steps
        if progress.owes_evaluation and not reason:
            window.pause(_timed(_look_in_between, run, writer))
            if progress.owes_evaluation:
                reason = run.stop.agreed_now()
        if saving or reason:
            window.pause(_timed(_save, run, writer, window))
        if reason:
            return reason
        if writer:
            writer.start_clock()
    return None


def _due(step: int, every: int, last: int | None = None) -> bool:
    return step == last or (every > 0 and step % every == 0)


def _timed(action: Callable[..., None], *arguments: Any) -> float:
    started = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - started


def _log(run: Run, writer: RunWriter | None, window: Window, result: StepResult) -> Window:
    """Reduce the window over ranks once, write it on rank zero, and open the next one."""
    run.stepper.refuse_non_finite()
    sums = all_reduce_sum(window.sums).tolist()
    seconds = window.seconds()
    run.progress.seconds += seconds
    if writer:
        writer.training(training_record(run, window, result, sums, seconds))
    return Window(len(TERMS), run.place.device)


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


def _look_before_first_step(run: Run, writer: RunWriter | None) -> str | None:
    """Evaluate the first student; returns why it was stopped meanwhile, if it was."""
    if run.progress.step:
        return None
    if run.heldout:
        log.info("evaluating on held-out text, before the first step")
        try:
            figures = _evaluate(run, run.heldout, run.config.train.eval_maskings)
        except InterruptedEvaluation:
            return run.stop.agreed_now()
        run.progress.heldout = {"student_start": figures["student"]}
        if "teacher" in figures:
            run.progress.heldout = {"teacher": figures["teacher"], "student_start": figures["student"]}
    if writer:
        if run.heldout:
            writer.evaluation(0, figures)
        _write_samples(run, writer)
    return None


def _look_in_between(run: Run, writer: RunWriter | None) -> None:
    """Evaluate; where a request to stop came meanwhile, the evaluation is still owed."""
    try:
        figures = _evaluate(run, run.heldout, _QUICK_MASKINGS) if run.heldout else None
    except InterruptedEvaluation:
        return
    run.progress.owes_evaluation = False
    if writer:
        if figures:
            writer.evaluation(run.progress.step, figures)
        _write_samples(run, writer)


def _write_samples(run: Run, writer: RunWriter) -> list[str]:
    sentences = run.config.data.sample_sentences
    answers = fill_masks(
        run.student, run.models.family, run.models.tokenizer.hugging_face, sentences, device=run.place.device
    )
    lines = as_lines(answers)
    writer.text("fill_mask", "\n".join(f"- {line}" for line in lines), run.progress.step)
    return lines


def _save(run: Run, writer: RunWriter | None, window: Window) -> None:
    run.stepper.refuse_non_finite()
    at(Place.SAVING)
    progress, world = run.progress, run.place.world
    rows = torch.zeros(world.size, len(TERMS), dtype=torch.float64, device=run.place.device)
    rows[world.rank] = window.sums
    open_window = window.state(all_reduce_sum(rows).tolist()) if window.steps else None
    state = {"seconds": progress.seconds, "heldout": progress.heldout}
    state |= {"owes_evaluation": progress.owes_evaluation, "window": open_window}
    if writer:
        writer.sync()
    run.checkpoints.save(run.engine, step=progress.step, world_size=world.size, state=state)


def _restored_window(run: Run) -> Window:
    """The window of logging that was open when the checkpoint was saved, or a new one."""
    window = Window(len(TERMS), run.place.device)
    if run.progress.window:
        window.restore(run.progress.window, rank=run.place.world.rank, world_size=run.place.world.size)
    return window


def _finish(run: Run, writer: RunWriter | None) -> str | None:
    """Final figures, the exported student, summary.json, DONE, and the console's last screen.

    Returns why it was stopped in the evaluation, if it was.
    """
    heldout = dict(run.progress.heldout or {})
    if writer:
        writer.end_bar()
    if run.heldout:
        log.info("evaluating on held-out text, after the last step")
        try:
            figures = _evaluate(run, run.heldout, run.config.train.eval_maskings)
        except InterruptedEvaluation:
            return run.stop.agreed_now()
        heldout["student"] = figures["student"]
    summary = {"heldout": heldout, "train": _train_summary(run)}

    def finish_on_main() -> None:
        """What rank zero writes, DONE last."""
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
        print("\n" + _last_screen(run, as_console(rows) if heldout else "", samples), flush=True)

    at(Place.FINISHING)
    on_main(finish_on_main)
    return None


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
