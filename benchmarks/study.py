"""What does distillation bring? Three students of one size, several seeds each, on the same text, beside the teacher.

python benchmarks/study.py --train fr_train.txt.xz --heldout fr_valid.txt.xz --sources fr_valid.sources.tsv.xz

- distilled: the teacher's layers, then kl, mlm and cos (recipes/mini.yaml)
- words alone: the same layers, then mlm only
- random weights: kl, mlm and cos, embeddings and head drawn at random too

Each run is `launch/train.py` in a folder of its own under --runs, so the same command resumes what was stopped and
leaves alone what is done. While a run trains its curves follow a tenth of the held-out text; its figures, on all of it
and by source, are made once it is done and kept beside it. --sources has, for each line of the held-out text, its
source before a tab. --report writes the tables as Markdown and all figures as JSON.
"""

import argparse
import json
import lzma
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distilcb import distributed
from distilcb.command_line import new_file
from distilcb.config import REPOSITORY, DataConfig, cache_folder
from distilcb.data.blocks import Blocks
from distilcb.data.corpus import read_documents
from distilcb.data.damage import Damage
from distilcb.data.loader import HeldoutBatches, fixed_heldout_batches
from distilcb.data.prepare import prepare_cached
from distilcb.data.tokenizer import TextTokenizer
from distilcb.durability import write_durably
from distilcb.errors import DataError, TrainingError
from distilcb.eval.masked_lm import evaluate
from distilcb.eval.report import as_console, as_markdown
from distilcb.models.loading import load_language_model
from distilcb.models.teacher import Teacher
from distilcb.recipe import load_recipe

RECIPE = REPOSITORY / "recipes" / "mini.yaml"
STUDENTS = {
    "distilled": [],
    "words alone": ["--loss.kl", "0", "--loss.cos", "0", "--loss.mlm", "1"],
    "random weights": ["--student.init", "random"],
}
FIGURES = {"kl": "kl (nats)", "agreement": "agreement", "mlm_accuracy": "words right", "mlm_loss": "loss (nats)"}
_SHARES = ("agreement", "mlm_accuracy")
# Sources with fewer held-out blocks say little by themselves: they count in the whole only.
_FEWEST_BLOCKS = 20
_MASKINGS = 4
_SAMPLE_EVERY = 10


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--heldout", required=True, help="text to evaluate on, a document a line")
    parser.add_argument("--sources", help="file with each line's source")
    parser.add_argument("--steps", type=int, default=370, help="steps of 64 x 128 tokens (default: 370, 3.03 M tokens)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", type=new_file, help="Markdown file to write; its figures go beside it as .json")
    options = parser.parse_args(words)
    options.runs.mkdir(parents=True, exist_ok=True)
    texts = Texts(options)
    for seed in range(options.seeds):  # seeds outside, so that a study stopped early compares like with like
        for name, settings in STUDENTS.items():
            folder = run_folder(options.runs, name, seed)
            train(folder, settings, seed, options, texts.sample)
            kept_figures(folder, texts)
    figures = gather(options, texts)
    tables = report(figures)
    for title, rows in tables.items():
        print(f"\n{title}\n{as_console(rows)}")
    if options.report:
        text = "\n\n".join(f"## {title}\n\n{as_markdown(rows)}" for title, rows in tables.items())
        write_durably(options.report, text + "\n")
        write_durably(options.report.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")


def run_folder(runs: Path, name: str, seed: int) -> Path:
    """Where one run lies."""
    return runs / f"{name.replace(' ', '_')}_{seed}"


def train(folder: Path, settings: Sequence[str], seed: int, options: argparse.Namespace, sample: Path) -> None:
    """One run, or what is left of it."""
    words = ["--recipe", str(RECIPE), "--run_dir", str(folder), "--train.seed", str(seed), *settings]
    words += ["--data.train", options.train, "--data.heldout", str(sample), "--train.steps", str(options.steps)]
    words += ["--train.eval_every", str(max(1, options.steps // 10)), "--train.save_every", "50"]
    print(f"--- {folder.name}", flush=True)
    done = subprocess.run([sys.executable, str(REPOSITORY / "launch" / "train.py"), *words], check=False)
    if done.returncode:
        raise TrainingError(f"{folder} ended with {done.returncode}; what it said stands above")


class Texts:
    """The held-out text: a sample for the runs' own curves, and blocks of each source.

    sample: a .txt of every tenth document.
    blocks: {source: blocks}; one source, "all", where none are told.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        recipe = load_recipe(RECIPE)
        self.teacher = Teacher(load_language_model(str(recipe.teacher.model), dtype=torch.float32))
        self.tokenizer = TextTokenizer(str(recipe.teacher.model))
        self.seq_len = recipe.data.seq_len
        documents = list(read_documents(Path(options.heldout), text_field="text", damage=Damage()))
        sources = _sources(Path(options.sources)) if options.sources else ["all"] * len(documents)
        if len(documents) != len(sources):
            raise DataError(f"{len(documents)} documents in {options.heldout}, {len(sources)} lines in --sources")
        folder = options.runs / "heldout"
        folder.mkdir(parents=True, exist_ok=True)
        self.sample = _write(folder / "sample.txt", documents[::_SAMPLE_EVERY])
        self.blocks: dict[str, Blocks] = {}
        for number, source in enumerate(dict.fromkeys(sources)):
            own = [document for document, its in zip(documents, sources, strict=True) if its == source]
            try:
                self.blocks[source] = self._open(_write(folder / f"source_{number}.txt", own))
            except DataError as error:
                print(f"{source} is left out: {error}")

    def _open(self, path: Path) -> Blocks:
        cache = cache_folder(DataConfig())
        folder = prepare_cached(
            [str(path)], tokenizer=self.tokenizer, cache=cache, seq_len=self.seq_len, text_field="text"
        )
        return Blocks(folder)

    def batches(self, source: str) -> HeldoutBatches:
        """The masks that a run's own evaluation uses."""
        return fixed_heldout_batches(self.blocks[source], self.tokenizer.vocabulary, micro_batch=64)


def _sources(path: Path) -> list[str]:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [line.split("\t")[0].strip() for line in lines]


def _write(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("\n".join(documents) + "\n", encoding="utf-8")
    return path


def kept_figures(folder: Path, texts: Texts) -> dict[str, Any]:
    """The held-out figures of a finished run by source, made once and kept in its folder; in fp32, as exported."""
    kept = folder / "by_source.json"
    figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    contents = {source: f"{blocks.description.content} x {_MASKINGS}" for source, blocks in texts.blocks.items()}
    if missing := [s for s, content in contents.items() if figures.get(s, {}).get("content") != content]:
        print(f"--- evaluating {folder.name}", flush=True)
        student = load_language_model(str(folder / "student"), dtype=torch.float32)
        for source in missing:
            figures[source] = {"content": contents[source]} | evaluate(
                student,
                texts.teacher,
                texts.teacher.family,
                texts.batches(source),
                maskings=_MASKINGS,
                device=torch.device("cpu"),
            )
        write_durably(kept, json.dumps(figures, indent=1) + "\n")
    return figures


def gather(options: argparse.Namespace, texts: Texts) -> dict[str, Any]:
    """{student: {source: {figure: [one a seed]}}} and the teacher's own, {source: {figure: value}}; "all" too."""
    sizes = {source: len(blocks) for source, blocks in texts.blocks.items()}
    found: dict[str, Any] = {"blocks": sizes | {"all": sum(sizes.values())}, "teacher": {}}
    for name in STUDENTS:
        found[name] = {source: {figure: [] for figure in FIGURES} for source in found["blocks"]}
        for seed in range(options.seeds):
            figures = kept_figures(run_folder(options.runs, name, seed), texts)
            for figure in FIGURES:
                values = {source: figures[source]["student"][figure] for source in sizes}
                for source, value in (values | {"all": _whole(values, sizes)}).items():
                    found[name][source][figure].append(value)
    for figure in ("mlm_accuracy", "mlm_loss"):
        values = {source: figures[source]["teacher"][figure] for source in sizes}
        for source, value in (values | {"all": _whole(values, sizes)}).items():
            found["teacher"].setdefault(source, {})[figure] = value
    return found


def _whole(values: dict[str, float], sizes: dict[str, int]) -> float:
    """The mean over all text: every block has as many masked words."""
    return sum(values[source] * sizes[source] for source in sizes) / sum(sizes.values())


def report(figures: dict[str, Any]) -> dict[str, list[list[str]]]:
    """Tables by title: all figures on all text, then each student's kl and agreement by source."""
    tables = {"All held-out text": [["", *FIGURES.values()]]}
    tables["All held-out text"] += [
        [name, *(spread(figures[name]["all"][figure], figure) for figure in FIGURES)] for name in STUDENTS
    ]
    teacher = figures["teacher"]["all"]
    tables["All held-out text"].append(
        ["teacher", "–", "–", *(spread([teacher[figure]], figure) for figure in ("mlm_accuracy", "mlm_loss"))]
    )
    large = [source for source, blocks in figures["blocks"].items() if blocks >= _FEWEST_BLOCKS and source != "all"]
    sources = sorted(large, key=lambda source: -figures["blocks"][source])
    for figure, title in FIGURES.items() if sources else ():
        with_teacher = figure in figures["teacher"]["all"]
        rows = [["source", "blocks", *STUDENTS, *(["teacher"] if with_teacher else [])]]
        for source in sources:
            row = [source, f"{figures['blocks'][source]:,}"]
            row += [spread(figures[name][source][figure], figure) for name in STUDENTS]
            row += [spread([figures["teacher"][source][figure]], figure)] if with_teacher else []
            rows.append(row)
        tables[f"By source: {title}"] = rows
    return tables


def spread(values: Sequence[float], figure: str) -> str:
    """Mean ± standard deviation over seeds."""
    scale, form = (100, "{:.1f}") if figure in _SHARES else (1, "{:.3f}")
    text = form.format(scale * statistics.mean(values))
    text += f" ± {form.format(scale * statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{text} %" if figure in _SHARES else text


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
