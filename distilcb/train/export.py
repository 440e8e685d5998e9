"""A run folder's checkpoint, as a Hugging Face folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from distilcb.config import Config, flatten
from distilcb.engine.checkpoint import Checkpoint, Checkpoints
from distilcb.errors import CheckpointError
from distilcb.eval.report import as_markdown, heldout_rows
from distilcb.export.hugging_face import export_checkpoint, with_longest_text, with_tokenizer_ids, write_model
from distilcb.export.model_card import CardFacts
from distilcb.hub import public_name
from distilcb.recipe import load_recipe
from distilcb.train.models import load_models
from distilcb.train.run_folder import RunFolder, find_run

_SECTIONS = ("loss", "masking", "optim", "student")
_MAY_BE_PATHS = ("student.init", "student.config")
_TEXTS_TOLD = 3


def export_run(run_dir: Path, *, step: int | None, output: Path) -> Path:
    """Export the checkpoint of `step`, or the newest good one, to `output`.

    Raises:
        CheckpointError: no run folder, no such checkpoint, or an output that is there already.
    """
    folder = find_run(run_dir)
    if output.exists():
        raise CheckpointError(f"{output} is there already. Name another folder, or move it aside.")
    checkpoint = _find(folder, step)
    heldout: dict[str, Any] = {}
    if folder.summary.is_file():
        summary = folder.read_summary()
        if summary["train"]["steps"] == checkpoint.step:  # the figures are of the last step
            heldout = summary["heldout"]
    return write_student(folder, checkpoint, load_recipe(folder.config), heldout, output)


def write_student(
    folder: RunFolder, checkpoint: Checkpoint, config: Config, heldout: dict[str, Any], output: Path
) -> Path:
    """Export a run's checkpoint with a model card that holds `heldout`, as in summary.json; empty: no table."""
    facts = card_facts(config, name=folder.path.name, steps=checkpoint.step, heldout=heldout)
    return export_checkpoint(checkpoint.path, folder.model, output, facts)


def export_untrained(config: Config, output: Path) -> Path:
    """Write the student as it is before its first step to `output`.

    Raises:
        ConfigError, ModelError: whatever does not fit together.
        CheckpointError: an output that is there already.
    """
    if output.exists():
        raise CheckpointError(f"{output} is there already. Name another folder, or move it aside.")
    models = load_models(config)
    model, words = models.student.eval(), models.tokenizer.hugging_face
    model.config = with_tokenizer_ids(model.config, words)
    facts = card_facts(config, name=output.name, steps=0, heldout={})
    return write_model(output, model, with_longest_text(words, model.config), facts)


def card_facts(config: Config, *, name: str, steps: int, heldout: dict[str, Any]) -> CardFacts:
    """For the card of a student after so many steps; heldout: as in summary.json, empty for no table."""
    with_mask = [each for each in config.data.sample_sentences if each.count("<mask>") == 1]
    facts = CardFacts(
        name=name,
        teacher=config.teacher.model and public_name(config.teacher.model),
        steps=steps,
        tokens=steps * config.optim.global_batch * config.data.seq_len,
        table=as_markdown(heldout_rows(heldout)) if heldout else "",
        settings={
            name: public_name(value) if value and name in _MAY_BE_PATHS else value
            for name, value in flatten(config).items()
            if name.split(".")[0] in _SECTIONS
        },
        widget=tuple(with_mask),
        base_model=_hub_name(config.teacher.model),
        language=config.card.language,
        license=config.card.license,
        datasets=config.card.datasets,
        text=_texts_of(config),
    )
    return replace(facts, example=with_mask[0]) if with_mask else facts


def _texts_of(config: Config) -> tuple[str, ...]:
    """What the card is to say of them, else the names of files, of which a corpus may have a thousand."""
    names = list(dict.fromkeys(map(public_name, config.data.train)))
    more = (f"{len(names) - _TEXTS_TOLD:,} more",) if len(names) > _TEXTS_TOLD else ()
    return config.card.datasets or (*names[:_TEXTS_TOLD], *more)


def _hub_name(model: str | None) -> str | None:
    """A model's name, unless it is a path."""
    return model if model and not Path(model).expanduser().exists() else None


def _find(folder: RunFolder, step: int | None) -> Checkpoint:
    checkpoints = Checkpoints(folder.checkpoints, keep=1)
    found = checkpoints.newest() if step is None else checkpoints.of_step(step)
    if found is None:
        there = ", ".join(str(s) for s in checkpoints.steps()) or "none"
        wanted = "" if step is None else f" of step {step}"
        raise CheckpointError(
            f"{folder.checkpoints}: no good checkpoint{wanted}. Steps there: {there} (older ones are deleted)."
        )
    return found
