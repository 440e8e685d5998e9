"""What does distillation bring? Three students of one size, several seeds each, on the same text, beside the teacher.

python benchmarks/study.py --train fr_train.txt.xz --heldout fr_valid.txt.xz --sources fr_valid.sources.tsv.xz

- distilled: the teacher's layers, then kl, mlm and cos (recipes/mini.yaml)
- words alone: the same layers, then mlm only
- random layers: kl, mlm and cos, from random weights

Each run is `launch/train.py` in a folder of its own under --runs, so the same command resumes what was stopped and
leaves alone what is done; figures by source are kept beside each run as they are made. --sources has, for each line of
the held-out text, its source before a tab. --report writes the tables as Markdown and all figures as JSON.
"""

import argparse
import json
import lzma
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from distilcb import distributed
from distilcb.config import REPOSITORY, DataConfig, MaskingConfig, cache_folder, load_recipe
from distilcb.data.blocks import Blocks
from distilcb.data.corpus import Damage, read_documents
from distilcb.data.loader import HeldoutBatches
from distilcb.data.masking import Masking
from distilcb.data.prepare import prepare_cached
from distilcb.data.tokenizer import TextTokenizer
from distilcb.engine.checkpoint import write_durably
from distilcb.eval.masked_lm import evaluate
from distilcb.eval.report import as_console, as_markdown
from distilcb.models.loading import load_masked_lm
from distilcb.models.teacher import Teacher

RECIPE = REPOSITORY / "recipes" / "mini.yaml"
STUDENTS = {
    "distilled": [],
    "words alone": ["--loss.kl", "0", "--loss.cos", "0", "--loss.mlm", "1"],
    "random layers": ["--student.init", "random"],
}
FIGURES = {"kl": "kl (nats)", "agreement": "agreement", "mlm_accuracy": "words right", "mlm_loss": "loss (nats)"}
_SHARES = ("agreement", "mlm_accuracy")
# Sources with fewer held-out blocks say little by themselves.
_FEWEST_BLOCKS = 20
_MASKINGS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="text to train on")
    parser.add_argument("--heldout", required=True, help="text to evaluate on, a document a line")
    parser.add_argument("--sources", help="file with each line's source")
    parser.add_argument("--steps", type=int, default=370, help="steps of 64 x 128 tokens (default: 370, 3.03 M tokens)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", type=Path, help="Markdown file to write; its figures go beside it as .json")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):  # seeds outside, so that a study stopped early compares like with like
        for name, settings in STUDENTS.items():
            train(run_folder(options.runs, name, seed), settings, seed, options)
    figures = gather(options)
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


def train(folder: Path, settings: Sequence[str], seed: int, options: argparse.Namespace) -> None:
    """One run, or what is left of it."""
    words = ["--recipe", str(RECIPE), "--run_dir", str(folder), "--train.seed", str(seed), *settings]
    words += ["--data.train", options.train, "--data.heldout", options.heldout, "--train.steps", str(options.steps)]
    words += ["--train.eval_every", str(max(1, options.steps // 5)), "--train.save_every", "50"]
    print(f"--- {folder.name}", flush=True)
    subprocess.run([sys.executable, str(REPOSITORY / "launch" / "train.py"), *words], check=True)


def gather(options: argparse.Namespace) -> dict[str, Any]:
    """{student: {source: {figure: [one a seed]}}} and the teacher's own, {source: {figure: value}}."""
    teacher = Teacher(load_masked_lm(str(load_recipe(RECIPE).teacher.model), dtype=torch.float32))
    tokenizer = TextTokenizer(str(load_recipe(RECIPE).teacher.model))
    texts = {"all": open_text(options.heldout, tokenizer)}
    if options.sources:
        texts |= by_source(Path(options.heldout), Path(options.sources), tokenizer)
    found: dict[str, Any] = {"teacher": {}, "blocks": {source: len(blocks) for source, blocks in texts.items()}}
    for name in STUDENTS:
        found[name] = {source: {figure: [] for figure in FIGURES} for source in texts}
        for seed in range(options.seeds):
            folder = run_folder(options.runs, name, seed)
            for source, figures in _kept_figures(folder, texts, teacher, tokenizer).items():
                found["teacher"][source] = figures["teacher"]
                for figure in FIGURES:
                    found[name][source][figure].append(figures["student"][figure])
    return found


def _kept_figures(folder: Path, texts: dict[str, Blocks], teacher: Teacher, tokenizer: TextTokenizer) -> dict[str, Any]:
    """The held-out figures of a finished run by source, made once and kept in its folder; in fp32, as exported."""
    kept = folder / "by_source.json"
    figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    contents = {source: blocks.description.content for source, blocks in texts.items()}
    if missing := [s for s, content in contents.items() if figures.get(s, {}).get("content") != content]:
        print(f"--- evaluating {folder.name}", flush=True)
        student = load_masked_lm(str(folder / "student"), dtype=torch.float32)
        for source in missing:
            figures[source] = {"content": contents[source]} | evaluate(
                student,
                teacher,
                teacher.family,
                heldout_batches(texts[source], tokenizer),
                maskings=_MASKINGS,
                device=torch.device("cpu"),
            )
        write_durably(kept, json.dumps(figures, indent=1) + "\n")
    return figures


def heldout_batches(blocks: Blocks, tokenizer: TextTokenizer) -> HeldoutBatches:
    """The masks that a run's own evaluation uses."""
    seq_len = blocks.description.seq_len
    masking = Masking(MaskingConfig(smoothing=0.0), tokenizer.vocabulary, blocks.token_counts, seq_len=seq_len, seed=0)
    return HeldoutBatches(blocks, masking, micro_batch=64, rank=0, world_size=1)


def open_text(name: str, tokenizer: TextTokenizer) -> Blocks:
    """The blocks of a text file."""
    seq_len = load_recipe(RECIPE).data.seq_len
    cache = cache_folder(DataConfig())
    return Blocks(prepare_cached([name], tokenizer=tokenizer, cache=cache, seq_len=seq_len, text_field="text"))


def by_source(heldout: Path, sources: Path, tokenizer: TextTokenizer) -> dict[str, Blocks]:
    """The held-out text cut by source; sources of few blocks are left out."""
    documents: dict[str, list[str]] = {}
    opener = lzma.open if sources.suffix == ".xz" else open
    with opener(sources, "rt", encoding="utf-8") as lines:
        names = [line.split("\t")[0].strip() for line in lines]
    texts = list(read_documents(heldout, text_field="text", damage=Damage()))
    if len(texts) != len(names):
        raise SystemExit(f"{heldout}: {len(texts)} documents, {sources}: {len(names)} lines; they must be as many")
    for name, text in zip(names, texts, strict=True):
        documents.setdefault(name, []).append(text)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, parts in documents.items():
            path = Path(folder) / f"{name}.txt"
            path.write_text("\n".join(parts) + "\n", encoding="utf-8")
            found[name] = open_text(str(path), tokenizer)
    return {name: blocks for name, blocks in found.items() if len(blocks) >= _FEWEST_BLOCKS}


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
    sources = sorted((s for s in figures["blocks"] if s != "all"), key=lambda s: -figures["blocks"][s])
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
    distributed.use_own_tools()
    main()
