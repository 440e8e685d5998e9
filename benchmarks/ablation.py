"""Which part of the objective brings what? The published ablation in the small, and what later work adds.

python benchmarks/ablation.py --train fr_train.txt.xz --heldout fr_valid.txt.xz --results docs/results/ablation.json

Each arm differs from the triplet loss (recipes/mini.yaml) as its name says and has the same text, order, masks and
steps, and as many seeds. The arms of a seed are students of one `launch/train.py --students`, so the teacher reads each
batch once for all; --together cuts them into groups, for a machine with little memory or time. --results is read before
and written after each group: what stands there is not done again, on whatever machine it was made; runs that were
stopped go on where their folders are. --report writes the table as Markdown.

With --equal_time they have not the same steps: arms get as many as the triplet takes time for, by short runs of all of
them in turn, and train one by one. The steps are kept in --results, so that what is done later has the same.

Published, DistilBERT section 4, as the change of the mean GLUE score: without the teacher's distribution -2.96, without
cosine -1.46, without masked words -0.31, from random weights -3.69.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from distilcb import distributed
from distilcb.command_line import new_file, number
from distilcb.config import REPOSITORY, RESULT_NEUTRAL, flatten
from distilcb.data.corpus import find_sources, read_documents
from distilcb.data.damage import Damage
from distilcb.durability import write_durably
from distilcb.errors import ConfigError, TrainingError
from distilcb.eval.report import as_console, as_markdown
from distilcb.finetune.runs import alone_in

RECIPE = REPOSITORY / "recipes" / "mini.yaml"
BASE = "triplet"
ARMS: dict[str, dict[str, dict[str, Any]]] = {
    BASE: {},
    "without kl": {"loss": {"kl": 0.0}},
    "without cos": {"loss": {"cos": 0.0}},
    "without mlm": {"loss": {"mlm": 0.0}},
    "words alone": {"loss": {"kl": 0.0, "cos": 0.0, "mlm": 1.0}},
    "random weights": {"student": {"init": "random"}},
    "first of pairs": {"student": {"init_layers": "first_of_pairs"}},
    "last of pairs": {"student": {"init_layers": "last_of_pairs"}},
    "first layers": {"student": {"init_layers": [0, 1, 2, 3, 4, 5]}},
    "last layers": {"student": {"init_layers": [6, 7, 8, 9, 10, 11]}},
    "first and last three": {"student": {"init_layers": [0, 1, 2, 9, 10, 11]}},
    "temperature 1": {"loss": {"temperature": 1.0}},
    "temperature 4": {"loss": {"temperature": 4.0}},
    "kl on masked words": {"loss": {"kl_positions": "masked"}},
    "relations too": {"loss": {"relation": 0.3, "relation_heads": 32}},
    "relations lightly": {"loss": {"relation": 0.03, "relation_heads": 32}},
    "relations for cos": {"loss": {"relation": 0.3, "relation_heads": 32, "cos": 0.0}},
    "kl off in the last quarter": {"loss": {"kl_until": 0.75}},
    "first layers and kl on masked words": {
        "student": {"init_layers": [0, 1, 2, 3, 4, 5]},
        "loss": {"kl_positions": "masked"},
    },
}
PUBLISHED = {"without kl": -2.96, "without cos": -1.46, "without mlm": -0.31, "random weights": -3.69}
FIGURES = {"kl": "kl (nats)", "agreement": "agreement", "mlm_accuracy": "words right", "mlm_loss": "loss (nats)"}
MASKINGS = 4
# Turns; steps of each, of which the first ones warm up; held-out documents, which are not timed.
TIMED_TURNS, TIMED_STEPS, TIMED_FROM, TIMED_EVERY = 3, 12, 4, 100
_SHARES = ("agreement", "mlm_accuracy")

Results = dict[str, dict[str, dict[str, float]]]


def main(words: list[str]) -> None:
    options = parser().parse_args(words)
    arms = options.arms or list(ARMS)
    if unknown := [name for name in arms if name not in ARMS]:
        raise ConfigError(f"--arms {', '.join(unknown)}: there are {', '.join(ARMS)}.")
    settings = {name: getattr(options, name) for name in ("steps", "heldout_every", "equal_time")}
    computed = {name: value for name, value in flatten(recipe_of(BASE)).items() if name not in RESULT_NEUTRAL}
    settings |= {"maskings": MASKINGS, "recipe": hash_of(computed)}
    # Where text lies may differ from machine to machine; what is in it may not.
    settings |= {name: content_of(getattr(options, name)) for name in ("train", "heldout")}
    # Runs of other settings have folders of their own.
    options.runs /= hash_of([settings, options.train, options.heldout])[:8]
    with alone_in(options.runs):
        compare(arms, settings, options)


def compare(arms: Sequence[str], settings: dict[str, Any], options: argparse.Namespace) -> None:
    """Train what is not trained yet, and write results and table."""
    results, steps = read(options.results, settings)
    if options.equal_time and (untimed := [name for name in arms if name not in steps]):
        steps |= steps_in_equal_time(untimed, options)

    def keep() -> None:
        options.results.parent.mkdir(parents=True, exist_ok=True)
        changes = {name: ARMS[name] for name in results if name in ARMS}
        found = {"settings": settings, "changes": changes, "steps": steps, "arms": results}
        write_durably(options.results, json.dumps(found, indent=1) + "\n")

    keep()
    for seed in range(options.seeds):  # seeds outside, so that what is stopped early compares like with like
        missing = [name for name in arms if str(seed) not in results.get(name, {})]
        size = 1 if options.equal_time else options.together or len(ARMS)
        for group in (missing[first : first + size] for first in range(0, len(missing), size)):
            for name, figures in train(group, seed, steps.get(group[0], options.steps), options).items():
                results.setdefault(name, {})[str(seed)] = figures
            keep()
    rows = table({name: results[name] for name in arms if name in results})
    print(f"\n{as_console(rows)}")
    if options.report:
        told = ", ".join(f"{name} {value}" for name, value in (settings | steps).items())
        write_durably(options.report, f"{as_markdown(rows)}\n\n{told}\n")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = RECIPE.parent / "mini" / "text"
    made.add_argument("--train", default=str(text / "train"), help="text to train on (default: the shipped text)")
    made.add_argument(
        "--heldout", default=str(text / "heldout"), help="text to evaluate on (default: the shipped text)"
    )
    made.add_argument(
        "--heldout_every", type=number(1), default=3, metavar="N", help="take every Nth document of it (default: 3)"
    )
    made.add_argument("--equal_time", action="store_true", help="as many steps as the triplet takes time for")
    made.add_argument("--arms", nargs="+", metavar="NAME", help=f"of {', '.join(ARMS)} (default: all)")
    made.add_argument(
        "--steps", type=number(1), default=125, help="steps of 64 x 128 tokens (default: 125, 1 M tokens)"
    )
    made.add_argument("--seeds", type=number(1), default=3)
    made.add_argument("--together", type=number(1), metavar="N", help="arms that train together (default: all)")
    made.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    made.add_argument(
        "--results", type=Path, default=Path("runs/ablation/results.json"), help="JSON file to go on with"
    )
    made.add_argument("--report", type=new_file, help="Markdown file to write")
    return made


def hash_of(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def content_of(names: str) -> str:
    """What a text is, wherever it lies: the last part of its first name, and a hash of its documents."""
    made = hashlib.sha256()
    for document in documents_of(names):
        made.update(f"{document}\n".encode())
    return f"{Path(names.split(',')[0]).name} {made.hexdigest()[:16]}"


def documents_of(names: str) -> Iterator[str]:
    sources = find_sources(names.split(","))
    return chain.from_iterable(read_documents(each, text_field="text", damage=Damage()) for each in sources)


def read(path: Path, settings: dict[str, Any]) -> tuple[Results, dict[str, int]]:
    """What earlier starts found, and the steps of arms at equal time.

    Raises:
        ConfigError: with other settings, or an arm that was something else then.
    """
    if not path.is_file():
        return {}, {}
    there = json.loads(path.read_text(encoding="utf-8"))
    if there["settings"] != settings:
        raise ConfigError(
            f"{path} has results of {there['settings']}, asked for are {settings}. Name another --results."
        )
    other = [name for name, change in there["changes"].items() if name in ARMS and change != ARMS[name]]
    if other:
        raise ConfigError(f"{path} has results of other settings of {', '.join(other)}. Name another --results.")
    return there["arms"], there["steps"]


def steps_in_equal_time(arms: Sequence[str], options: argparse.Namespace) -> dict[str, int]:
    """Steps of each arm that take as long as --steps of the triplet: medians of short runs in turn."""
    rates: dict[str, list[float]] = {name: [] for name in {BASE: 0} | dict.fromkeys(arms)}
    for turn in range(TIMED_TURNS):
        for name, found in rates.items():
            folder = options.runs / "timed" / f"turn_{turn}"
            run = folder / file_name(name)
            words = ["--recipe", str(write_recipe(folder, name)), "--run_dir", str(run), "--fresh"]
            words += ["--train.steps", str(TIMED_STEPS), "--train.log_every", "1", "--train.eval_every", "0"]
            launch([*words, *text_of(options, every=TIMED_EVERY)], run)
            found.append(mean_rate(run, ARMS[name].get("loss", {}).get("kl_until", 1.0)))
    shares = {
        name: statistics.median(own / base for own, base in zip(found, rates[BASE], strict=True))
        for name, found in rates.items()
    }
    return {name: round(options.steps * shares[name]) for name in arms}


def mean_rate(run: Path, kl_until: float) -> float:
    """Tokens a second of a whole training, from the steps of a short one, whose last ones may go without kl."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rates = {each["step"]: each["tokens_per_second"] for each in map(json.loads, lines) if "loss" in each}
    last_taught = round(kl_until * TIMED_STEPS)
    taught = statistics.median(rate for step, rate in rates.items() if TIMED_FROM <= step <= last_taught)
    if kl_until == 1:
        return taught
    untaught = statistics.median(rate for step, rate in rates.items() if step > last_taught)
    return 1 / (kl_until / taught + (1 - kl_until) / untaught)


def train(arms: Sequence[str], seed: int, steps: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{arm: held-out figures} of a group of arms that learn from the same passes of the teacher."""
    folder = options.runs / f"seed_{seed}"
    recipes = folder / "recipes"
    files = [write_recipe(recipes, name) for name in arms]
    one = ["--recipe", str(files[0]), "--run_dir", str(folder / file_name(arms[0]))]
    words = one if len(arms) == 1 else ["--students", *map(str, files), "--run_dir", str(folder)]
    words += ["--train.seed", str(seed), *text_of(options, every=options.heldout_every)]
    words += ["--train.steps", str(steps), "--train.eval_every", "0", "--train.save_every", "20"]
    print(f"--- seed {seed}: {', '.join(arms)}", flush=True)
    launch([*words, "--train.eval_maskings", str(MASKINGS)], folder)
    return {name: figures_of(folder / file_name(name)) for name in arms}


def launch(words: Sequence[str], folder: Path) -> None:
    """launch/train.py; raises TrainingError where it fails."""
    done = subprocess.run([sys.executable, str(REPOSITORY / "launch" / "train.py"), *words], check=False)
    if done.returncode:
        raise TrainingError(f"{folder} ended with {done.returncode}; what it said stands above")


def text_of(options: argparse.Namespace, *, every: int) -> list[str]:
    """The options that name text; of the held-out one every so-many-th document, as a file."""
    documents = documents_of(options.heldout)
    sample = options.runs / f"heldout_{every}.txt"
    sample.parent.mkdir(parents=True, exist_ok=True)
    write_durably(sample, "".join(f"{' '.join(each.split())}\n" for each in islice(documents, 0, None, every)))
    return ["--data.train", options.train, "--data.heldout", str(sample)]


def file_name(arm: str) -> str:
    """An arm's recipe and run folder."""
    return arm.replace(" ", "_")


def write_recipe(folder: Path, arm: str) -> Path:
    """The mini recipe with what the arm changes, as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{file_name(arm)}.yaml"
    text = yaml.safe_dump(recipe_of(arm), sort_keys=False)
    path.write_text(text.replace("{recipe_dir}", str(RECIPE.parent)), encoding="utf-8")
    return path


def recipe_of(arm: str) -> dict[str, Any]:
    """The mini recipe, its batch in one piece, with what the arm changes; paths as the recipe has them."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["optim"]["micro_batch"] = recipe["optim"]["global_batch"]  # one process: in one piece it goes faster
    for section, settings in ARMS[arm].items():
        recipe.setdefault(section, {}).update(settings)
    return recipe


def figures_of(run: Path) -> dict[str, float]:
    """Those of the finished student, at the last step."""
    found = json.loads((run / "summary.json").read_text(encoding="utf-8"))["heldout"]["student"]
    return {name: found[name] for name in FIGURES}


def table(results: Results) -> list[list[str]]:
    """Each arm's figures, how far it is from the triplet seed by seed, and the sign that was published."""
    head = ["", *FIGURES.values(), "words right, less the triplet's", "published, GLUE", "signs", "seeds"]
    rows = []
    for name, by_seed in results.items():
        figures = [spread([each[figure] for each in by_seed.values()], figure) for figure in FIGURES]
        apart = differences(name, results)
        told = f"{statistics.mean(apart):+.2f}" if apart else "–"
        told += f" ± {statistics.stdev(apart):.2f}" if len(apart) > 1 else ""
        published = f"{PUBLISHED[name]:+.2f}" if name in PUBLISHED else "–"
        rows.append([name, *figures, told, published, signs(name, apart), str(len(by_seed))])
    return [head, *rows]


def differences(name: str, results: Results) -> list[float]:
    """Words right, less the triplet's, in hundredths, of each seed that both have; empty of the triplet itself."""
    if name == BASE or BASE not in results:
        return []
    own, base = results[name], results[BASE]
    return [100 * (own[seed]["mlm_accuracy"] - base[seed]["mlm_accuracy"]) for seed in own if seed in base]


def signs(name: str, apart: Sequence[float]) -> str:
    """How many of the seeds go the published way."""
    if name not in PUBLISHED or not apart:
        return "–"
    same = sum(each * PUBLISHED[name] > 0 for each in apart)
    return "as published" if same == len(apart) else f"{same} of {len(apart)} as published"


def spread(values: Sequence[float], figure: str) -> str:
    """Mean ± standard deviation over seeds."""
    scale, form = (100, "{:.2f}") if figure in _SHARES else (1, "{:.4f}")
    text = form.format(scale * statistics.mean(values))
    text += f" ± {form.format(scale * statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{text} %" if figure in _SHARES else text


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
