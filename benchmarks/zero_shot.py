"""What a multilingual student has learnt in one language, asked of it in others: names, English to French and German.

python benchmarks/zero_shot.py --text DATA --tasks TASKS [--quick] [--json FILE]

A multilingual teacher in the small is trained on the three languages, first three layers on short blocks, then six that
begin as two copies of each. It is distilled into three by recipes/distilmbert.yaml; then it, its student and one that
began with random weights, distilled as long, are fine-tuned on English names and measured on all three. DATA has
{fr,en,de}_{train,valid}.txt.xz, TASKS the folders ner_{en,fr,de}. All goes on where it was stopped, under --runs.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from families import KINDS, run, text_and_steps, untaught, weights, write_teacher_shape
from side_by_side import parser_of, tell

from distilcb import distributed
from distilcb.config import REPOSITORY
from distilcb.errors import TrainingError
from distilcb.finetune.evaluation_report import as_markdown

RECIPE = "distilmbert"
SHORT, LONG = 32, 128
# French is 83 % of the text; as XLM-RoBERTa's authors did, small languages are shown more often than they are written.
EXPONENT = "0.3"
ROWS = "3000"


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--text", type=Path, required=True, help="folder of {fr,en,de}_{train,valid}.txt.xz")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of ner_en, ner_fr and ner_de")
    parser.add_argument("--runs", type=Path, default=Path("runs/zero_shot"))
    options = parser.parse_args(words)
    home = options.runs / "quick" if options.quick else options.runs
    short, long, students = (20, 10, 10) if options.quick else (3000, 1200, 300)
    kind = replace(KINDS[RECIPE], hidden=64 if options.quick else 128, vocabulary=8000, positions=LONG)
    shape = write_teacher_shape(RECIPE, kind, options.text, home / "shape")
    texts = {
        length: [*text_and_steps(kind, options.text, length), "--data.language_exponent", EXPONENT]
        for length in (SHORT, LONG)
    }
    if options.quick:  # the whole of it takes minutes to read
        valid = json.dumps([str(options.text / f"{each}_valid.txt.xz") for each in kind.languages])
        shipped = str(REPOSITORY / "recipes" / "mini" / "text" / "heldout")
        texts = {length: [*each, "--data.train", valid, "--data.heldout", shipped] for length, each in texts.items()}
    alone = [*untaught(shape), *weights({"mlm": 1.0})]
    first = [*texts[SHORT], *alone, "--student.init", "random", "--student.num_layers", "3"]
    grown = run(RECIPE, home / "short", first, short, lr=2e-3)
    second = [*texts[LONG], *alone, "--student.init", str(grown / "student"), "--student.init_layers", "[0,0,1,1,2,2]"]
    teacher = run(RECIPE, home / "teacher", [*second, "--student.num_layers", "6"], long, lr=1.5e-3)
    taught = [*texts[LONG], "--teacher.model", str(teacher / "student"), "--student.num_layers", "3"]
    models = {}
    for name, init in (("distilled", "teacher"), ("random_weights", "random")):
        settings = [*taught, "--student.init", init]
        models[name] = run(RECIPE, home / name, settings, students, lr=1.5e-3) / "student"
    evaluation = home / "evaluation"
    asked = ["--tasks", "ner_en", "--zero_shot", "ner_en:ner_fr", "ner_en:ner_de", "--data", str(options.tasks)]
    asked += ["--teacher", str(teacher / "student"), "--output", str(evaluation), "--by_length", "--batch", "16"]
    asked += (
        ["--train_rows", "32", "--epochs", "1", "--seeds", "0", "--split", "dev"]
        if options.quick
        else ["--train_rows", ROWS, "--lr", "5e-4"]
    )
    evaluate(*map(str, models.values()), *asked)
    made = json.loads((evaluation / "tasks" / "results.json").read_text())
    text = json.dumps({"models": made["models"], "tasks": made["tasks"]})
    for name, model in models.items():  # as results.json calls them by
        text = text.replace(json.dumps(str(model)), json.dumps(name))
    figures = json.loads(text)
    tell("Across languages", as_markdown(figures), figures, options, "python benchmarks/zero_shot.py")


def evaluate(*words: str) -> None:
    """launch/evaluate.py; raises TrainingError."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "launch" / "evaluate.py"), *words], check=False)
    if done.returncode:
        raise TrainingError(f"launch/evaluate.py ended with {done.returncode}.")


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
