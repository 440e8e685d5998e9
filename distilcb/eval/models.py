"""Held-out figures of finished models, the teacher's beside them, on all ranks."""

import json
import logging
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from distilcb.config import REPOSITORY
from distilcb.data.blocks import Blocks, check_fits
from distilcb.data.loader import Batch, fixed_heldout_batches
from distilcb.data.prepare import prepare_cached
from distilcb.data.tokenizer import TextTokenizer
from distilcb.distributed import device
from distilcb.errors import ConfigError, DataError, ModelError, first_line, writing
from distilcb.eval.masked_lm import Figures, Rows, evaluate
from distilcb.eval.report import NAMES_IN_A_RUN, as_markdown, heldout_tables
from distilcb.export.onnx import INT8, OnnxModel
from distilcb.hub import model_folder
from distilcb.launcher import World
from distilcb.machine import cores_a_rank
from distilcb.models.families import family_of
from distilcb.models.loading import load_config, load_language_model
from distilcb.models.teacher import Teacher

log = logging.getLogger(__name__)

_TOKENS_A_PASS = 8192
_TOKENS_A_BATCH_INT8 = 1024
"""fewer: its logits of all words that a batch asks for are there at once"""
_BAND_ENDS = (100, 1_000, 10_000)
BANDS = ("the 100 most frequent", "100 to 1,000", "1,000 to 10,000", "rarer ones")
"""tokens by how often they are in the held-out text"""


def evaluate_models(
    models: Sequence[str],
    *,
    teacher: str | None,
    text: Sequence[str],
    seq_len: int,
    text_field: str,
    cache: Path,
    maskings: int,
    world: World,
    int8: bool = False,
) -> dict[str, Figures]:
    """{model: figures} of masked words of the text, as a run's own evaluation makes them; the teacher's as "teacher".

    A model is called as `names_in_results` says. With `int8` each is followed by "model, int8", its quantised export,
    which `check_int8` has looked at. That answers on the CPU whatever the others are on, and a block at a time, as it
    would one text: its activations are scaled by the largest of a pass, so beside other blocks it says something else.

    All models must share one tokenizer, or their figures are of different words.

    Raises:
        ConfigError: a model named twice, two tokenizers, or blocks longer than a model's positions.
        DataError, ModelError: what is not there or cannot be read.
    """
    if maskings < 2:
        raise ConfigError(f"maskings={maskings}: a standard error needs 2 or more.")
    shown = names_in_results(models)
    if teacher:
        model_folder(teacher, weights=False)  # a name that is not there is a model's, not a tokenizer's
    for name in [*([teacher] if teacher else []), *models]:
        load_config(name)  # a folder that is no model is told as such, not as one without a tokenizer
    tokenizer = TextTokenizer(teacher or models[0])
    for name in models:
        if TextTokenizer(name).vocabulary.fingerprint != tokenizer.vocabulary.fingerprint:
            raise ConfigError(
                f"{name} has another tokenizer than {tokenizer.folder}: they would be asked for different words. "
                "Evaluate it by itself."
            )
    heldout = _heldout(text, tokenizer, cache=cache, seq_len=seq_len, text_field=text_field)
    taught_by = _on_device(Teacher(load_language_model(teacher, dtype=_dtype()))) if teacher else None
    figures_of = partial(
        _figures, taught_by=taught_by, heldout=heldout, tokenizer=tokenizer, maskings=maskings, world=world
    )
    found: dict[str, Figures] = {}
    for name in models:
        model = load_language_model(name, dtype=_dtype()).to(device())
        _check_model(name, model, taught_by, tokenizer, seq_len=seq_len)
        figures = figures_of(name, model)
        found |= {"teacher": figures["teacher"]} if "teacher" in figures else {}
        found[shown[name]] = figures["student"]
        if int8:
            threads = cores_a_rank(world) if device().type == "cuda" else torch.get_num_threads()
            small = OnnxModel(model_folder(name, weights=False) / INT8, threads=threads)
            found[f"{shown[name]}, int8"] = figures_of(f"{name}, int8", model, int8=small)["student"]
    return found


def check_int8(models: Sequence[str]) -> None:
    """Each model's quantised export is there, and gives logits of its vocabulary.

    Raises:
        ConfigError: those that have none, all in one message; no onnxruntime; or one whose figures would stand under
            another model's name.
        ModelError: a file that is something else.
    """
    shown = names_in_results(models)
    if double := {f"{name}, int8" for name in shown.values()} & {*shown.values()}:
        raise ConfigError(f"--int8: {min(double)} is a model of its own too. Name its folder in another way.")
    paths = {name: model_folder(name, weights=False) / INT8 for name in models}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise ConfigError(
            f"--int8: {' and '.join(missing)}: no {INT8} there (from the hub none is fetched). Make it in a folder of "
            "the model with `python launch/export.py --model FOLDER --onnx --int8`."
        )
    for name, path in paths.items():
        (logits, *_) = OnnxModel(path).run(torch.full((1, 8), 9))
        words = load_config(name).vocab_size
        if logits.shape != (1, 8, words):
            raise ModelError(
                f"{path} gives {tuple(logits.shape)} of 8 tokens, needed (1, 8, {words}): logits of the vocabulary. "
                "Export it again."
            )


@dataclass(frozen=True)
class _Heldout:
    """Blocks of all the text and, where several are named, of each; band_of: (vocab,) each token's in BANDS."""

    whole: Blocks
    by_source: dict[str, Blocks]
    band_of: torch.Tensor


def _heldout(text: Sequence[str], tokenizer: TextTokenizer, *, cache: Path, seq_len: int, text_field: str) -> _Heldout:
    def blocks_of(names: Sequence[str]) -> Blocks:
        folder = prepare_cached(names, tokenizer=tokenizer, cache=cache, seq_len=seq_len, text_field=text_field)
        found = Blocks(folder)
        check_fits(found, seq_len=seq_len, fingerprint=tokenizer.vocabulary.fingerprint, tokenizer=tokenizer.folder)
        return found

    whole, by_source = blocks_of(text), {}
    for name in text if len(text) > 1 else ():
        try:
            by_source[name] = blocks_of([name])
        except DataError as error:  # too short by itself; in the whole it counts
            log.warning("%s has no figures of its own: %s", name, first_line(error))
    return _Heldout(whole, by_source, torch.from_numpy(frequency_bands(whole.token_counts)).to(device()))


def _check_model(name: str, model: Any, taught_by: Teacher | None, tokenizer: TextTokenizer, *, seq_len: int) -> None:
    """Raise ConfigError where model, teacher, tokenizer and block length do not go together."""
    family = family_of(model.config, where=name)
    if family.causal != tokenizer.vocabulary.is_causal:
        raise ConfigError(
            f"{name} is {'causal' if family.causal else 'an encoder'} ({model.config.model_type}), and its "
            f"tokenizer has {'no' if tokenizer.vocabulary.is_causal else 'a'} mask token: they do not go together."
        )
    if taught_by is not None and taught_by.family.causal != family.causal:
        raise ConfigError(f"{name} and its --teacher: one predicts the next word, the other masked ones.")
    if seq_len > family.max_seq_len(model.config):
        raise ConfigError(f"seq_len={seq_len}: {name} has positions for {family.max_seq_len(model.config)} tokens.")


def _figures(
    name: str,
    model: Any,
    *,
    taught_by: Teacher | None,
    heldout: _Heldout,
    tokenizer: TextTokenizer,
    maskings: int,
    world: World,
    int8: OnnxModel | None = None,
) -> dict[str, Figures]:
    """The model's and its teacher's, of all words, "by_band" and "by_source"; int8: answers in the model's place."""
    family = family_of(model.config, where=name)
    at_once = _TOKENS_A_PASS if int8 is None else _TOKENS_A_BATCH_INT8

    def of(blocks: Blocks, band_of: torch.Tensor | None = None) -> dict[str, Figures]:
        batches = fixed_heldout_batches(
            blocks,
            tokenizer.vocabulary,
            micro_batch=max(1, at_once // blocks.seq_len),
            rank=world.rank,
            world_size=world.size,
        )
        return evaluate(
            model,
            taught_by,
            family,
            batches,
            maskings=maskings,
            device=device(),
            band_of=band_of,
            answers=None if int8 is None else _answers_of(int8),
        )

    how = "in %d parts; launch/perplexity.py scores running text" if family.causal else "under %d maskings"
    log.info(f"%s: %d blocks of %d tokens {how}", name, len(heldout.whole), heldout.whole.seq_len, maskings)
    found = of(heldout.whole, heldout.band_of)
    for figures in found.values():
        figures["by_band"] = {BANDS[band]: part for band, part in figures["by_band"].items()}
    for source, blocks in heldout.by_source.items():
        for who, part in of(blocks).items():
            found[who].setdefault("by_source", {})[source] = part
    return found


def _answers_of(onnx: OnnxModel) -> Callable[[Batch], Rows]:
    def answers(batch: Batch) -> Rows:
        ids, rows = batch.input_ids.cpu(), batch.labelled_rows.cpu()
        length = ids.shape[1]
        of_block = [rows // length == number for number in range(len(ids))]
        parts = [onnx.run(ids[[number]])[0][0, rows[own] % length] for number, own in enumerate(of_block)]
        asked = torch.empty(len(rows), parts[0].shape[-1])
        for own, logits in zip(of_block, parts, strict=True):
            asked[own] = logits
        asked = asked.to(batch.labels.device)
        return lambda some: asked[some].log_softmax(-1)

    return answers


def frequency_bands(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """(vocab,) the number of each token's band in BANDS, by how often it is in a text; counts: (vocab,)."""
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(-counts, kind="stable")] = np.arange(len(counts))
    return np.searchsorted(_BAND_ENDS, ranks, side="right")


def names_in_results(models: Sequence[str]) -> dict[str, str]:
    """What each model is called in the results: as it was named, but ./student where that is a name of a run's models.

    Raises:
        ConfigError: a model named twice, in whatever words.
        ModelError: one that is not there.
    """
    folders: dict[Path, str] = {}
    for name in models:
        folder = model_folder(name, weights=False).resolve()
        if folder in folders:
            raise ConfigError(f"{folders[folder]} and {name}: a model is named twice. Name each once.")
        folders[folder] = name
    return {name: f"./{name}" if name in NAMES_IN_A_RUN else name for name in models}


def write_results(output: Path, figures: dict[str, Figures], settings: dict[str, Any]) -> None:
    """results.json and results.md; what is there of an earlier evaluation is replaced. For rank zero.

    Raises:
        DataError: a folder that cannot be written to.
    """
    where: dict[str, Any] = {"host": platform.node(), "torch": torch.__version__}
    where |= {"device": str(device()), "dtype": str(_dtype())}
    if settings.get("int8"):
        where["int8"] = {"device": "cpu", "onnxruntime": version("onnxruntime")}
    made = {"made": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "settings": settings, "where": where}
    with writing(output, DataError, "Name a folder that can be written to."):
        output.mkdir(parents=True, exist_ok=True)
        text = json.dumps(made | {"heldout": figures}, indent=2, ensure_ascii=False)
        (output / "results.json").write_text(text + "\n", encoding="utf-8")
        tables = [as_markdown(rows) for rows in heldout_tables(figures)]
        (output / "results.md").write_text("\n\n".join(tables) + "\n", encoding="utf-8")


def default_text() -> str:
    """The held-out text that the repository ships."""
    return str(REPOSITORY / "recipes" / "mini" / "text" / "heldout")


def _dtype() -> torch.dtype:
    """Half precision where it costs nothing in accuracy that these figures show; a CPU computes in fp32."""
    return torch.float16 if device().type == "cuda" else torch.float32


def _on_device(teacher: Teacher) -> Teacher:
    teacher.model.to(device())
    return teacher
