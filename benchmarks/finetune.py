"""Do soft targets help in fine-tuning? The mini student on three tasks, with and without its teacher's, seed by seed.

python benchmarks/finetune.py --tasks DATA [--student runs/mini/student] [--quick] [--report FILE]

The teacher is the mini teacher, fine-tuned on each task; the student is a run's (README's first command makes
runs/mini/student). DATA has a folder a task. Each task is launch/finetune.py in a folder of its own under --runs, so
what is stopped goes on, and what is done is left alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from side_by_side import parser_of, tell

from distilcb import distributed
from distilcb.config import REPOSITORY
from distilcb.errors import TrainingError
from distilcb.finetune.report import as_table

TEACHER = REPOSITORY / "recipes" / "mini" / "teacher"
# Models of this size take ten and twenty times the published learning rate. Rows and lengths are for two CPU cores.
BUDGETS = {
    "pos_fr_gsd": ["--epochs", "4", "--teacher_epochs", "6", "--batch", "16", "--lr", "1e-3"],
    "allocine_fr": ["--epochs", "3", "--batch", "16", "--lr", "5e-4", "--max_length", "64", "--train_rows", "900"],
    "piaf_qa": [
        *("--epochs", "3", "--batch", "16", "--lr", "5e-4", "--max_length", "256"),
        *("--train_rows", "400", "--split", "dev"),
    ],
}
QUICK = ["--train_rows", "48", "--epochs", "1", "--teacher_epochs", "1", "--seeds", "0", "1"]


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--tasks", type=Path, required=True, help=f"folder of {', '.join(BUDGETS)}")
    parser.add_argument("--student", type=Path, default=Path("runs/mini/student"))
    parser.add_argument("--runs", type=Path, default=Path("runs/finetune"))
    options = parser.parse_args(words)
    figures: dict[str, Any] = {}
    parts = []
    for task, budget in BUDGETS.items():
        figures[task] = one_task(task, budget + (QUICK if options.quick else []), options)
        read, columns = figures[task]["read"], list(figures[task]["summary"]["teacher"]["mean"])
        parts.append(
            f"## {task}\n\n{read['train']['rows']} rows to train on, {read['heldout']['rows']} held out "
            f"({read['split']}). `{' '.join(budget)}`\n\n{as_table(figures[task]['summary'], columns)}"
        )
    tell("Fine-tuning in the small", "\n\n".join(parts), figures, options, "python benchmarks/finetune.py")


def one_task(task: str, budget: list[str], options: Any) -> dict[str, Any]:
    """results.json of launch/finetune.py, which trains what is not trained yet."""
    output = options.runs / task
    words = ["--task", task, "--data", str(options.tasks / task), "--student", str(options.student)]
    words += ["--teacher_base", str(TEACHER), "--output", str(output), *budget]
    print(f"--- {output}", flush=True)
    ended = subprocess.run([sys.executable, str(REPOSITORY / "launch" / "finetune.py"), *words], check=False)
    if ended.returncode:
        raise TrainingError(f"{output} ended with {ended.returncode}.")
    found: dict[str, Any] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
