"""launch/evaluate.py: its options, and what they ask for. Imports no torch, so `--help` answers at once."""

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcb.command_line import Parser, number, some_name, some_path
from distilcb.durability import write_durably
from distilcb.errors import ConfigError, writing
from distilcb.finetune.command import LENGTHS
from distilcb.hub import HUB_PREFIX
from distilcb.launcher import discover
from distilcb.machine import keep_freed_memory, size_cpu_threads, uses_cuda
from distilcb.tasks.declarations import TASKS, Task, task_named

if TYPE_CHECKING:
    from distilcb.eval.speed import Timed
    from distilcb.finetune.evaluation import AskedTask, Evaluation

TASKS_FOLDER = "tasks"
_OF_TASKS = (
    *("data", "zero_shot", "seeds", "split", "by_length", "train_rows"),
    *("epochs", "lr", "batch", "warmup", "max_length", "stride"),
)
_OF_TEXT = ("seq_len", "text_field", "maskings", "int8")
_DEFAULTS: dict[str, Any] = {"epochs": 3.0, "lr": 5e-5, "batch": 8, "warmup": 0.0, "stride": 128}
_TEXT_DEFAULTS: dict[str, Any] = {"seq_len": 128, "text_field": "text", "maskings": 8}


def parser_of(description: str | None) -> Parser:
    """The options of launch/evaluate.py."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "models", nargs="+", type=some_name, metavar="MODEL", help="folders or hub names, such as runs/mini/student"
    )
    parser.add_argument(
        "--teacher", type=some_name, metavar="MODEL", help="kl, agreement and shares retained are with it"
    )
    parser.add_argument(
        "--output", type=some_path, required=True, metavar="DIR", help="folder of results, or to go on in"
    )
    text = parser.add_argument_group("held-out text")
    text.add_argument("--heldout", nargs="+", metavar="NAME", help="text or blocks (default: the shipped text)")
    text.add_argument("--seq_len", type=number(8, 65_536), help="tokens in a block (default: 128)")
    text.add_argument("--text_field", help="the text's name in .jsonl and .parquet (default: text)")
    text.add_argument("--maskings", type=number(2), help="fixed maskings to average over (default: 8)")
    text.add_argument("--int8", action="store_true", help="each MODEL's quantised export (launch/export.py) beside it")
    tasks = parser.add_argument_group("labelled tasks, in place of text unless --heldout is given too")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME[=DATA]",
        help=f"of {', '.join(TASKS)}; or YAML files that declare one. DATA: its folder, or hub:NAME[:CONFIG]",
    )
    tasks.add_argument("--data", metavar="DIR", help="where folders with the tasks' names are")
    tasks.add_argument(
        "--zero_shot",
        nargs="+",
        metavar="NAME:NAME[=DATA]",
        help="models that have learnt the first task are measured on the second too, such as ner_en:ner_fr",
    )
    tasks.add_argument(
        "--seeds", type=number(0), nargs="+", help="(default: 0 1 2; of under 3,000 training rows 0 1 2 3 4)"
    )
    tasks.add_argument(
        "--split", choices=["dev", "test"], help="rows to measure on (default: test where there is one; of hub: dev)"
    )
    real: dict[str, Any] = {"type": number(1e-9, kind=float)}
    tasks.add_argument("--epochs", **real, help="passes over the training rows (default: 3)")
    tasks.add_argument("--lr", **real, help="(default: 5e-5)")
    tasks.add_argument("--batch", type=number(1), help="sequences a step (default: 8)")
    tasks.add_argument("--warmup", type=number(0, 1, kind=float), help="share of the steps (default: 0)")
    tasks.add_argument(
        "--max_length",
        type=number(16, 65_536),
        help="tokens of a sequence (default: 384 for questions, 256 for tags, else 128)",
    )
    tasks.add_argument("--stride", type=number(1), help="tokens between windows of questions (default: 128)")
    tasks.add_argument(
        "--by_length", action="store_true", help="train on batches of rows of like lengths: less padding"
    )
    tasks.add_argument("--train_rows", type=number(1), metavar="COUNT", help="take the first rows only, for a try")
    speed = parser.add_argument_group("size and speed, in place of text unless --heldout is given too")
    speed.add_argument("--speed", action="store_true", help="parameters, bytes, time a text; beside the teacher's")
    speed.add_argument("--lengths", type=number(1), nargs="+", help="tokens of a text (default: 16 128 512)")
    parser.add_argument(
        "--card", action="store_true", help="also write tasks and speed into each model's own README.md, its card"
    )
    parser.add_argument(
        "--check", action="store_true", help="look at the options and at what they name but MODEL, and end"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Fill in the defaults.

    Raises:
        ConfigError: every fault of the options, in one message.
    """
    faults = []
    given = vars(options)
    if not options.tasks:
        faults += [f"--{name} is of labelled tasks: name some with --tasks" for name in _OF_TASKS if given[name]]
    if not _text_is_wanted(options):
        faults += [f"--{name} is of held-out text: name it with --heldout" for name in _OF_TEXT if given[name]]
    if (options.tasks or options.speed) and not options.check and discover().size > 1:
        faults.append(
            "one process fine-tunes and times: start --tasks and --speed with python, in a Slurm job with "
            "sbatch --ntasks-per-node=1 (and --gres=gpu:1 for --tasks)"
        )
    if options.card and not (options.tasks or options.speed):
        faults.append("--card is filled from --tasks or --speed: add one of them, or leave --card out")
    if options.lengths and not options.speed:
        faults.append("--lengths is of --speed")
    if options.seeds and len(set(options.seeds)) < len(options.seeds):
        faults.append(f"--seeds {' '.join(map(str, options.seeds))}: one stands there twice")
    if options.data and not Path(options.data).expanduser().is_dir():
        faults.append(f"--data {options.data}: no such folder. Needed: one that holds a folder a task")
    for words in options.zero_shot or []:
        if words.count(":") < 1 or not all(words.partition(":")[::2]):
            faults.append(f"--zero_shot {words}: needed NAME:NAME, such as ner_en:ner_fr")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    for name, value in (_DEFAULTS | _TEXT_DEFAULTS).items():
        if given[name] is None:
            setattr(options, name, value)


def run(options: argparse.Namespace) -> None:
    """Evaluate, print tables and say where the files are.

    Raises:
        UserError: what cannot be evaluated.
        TrainingError: a model whose every seed diverged.
    """
    check_options(options)
    if options.check:
        _check_names(options)
        return
    _check_output(options)
    if options.card:
        _check_cards(options)
    if options.lengths:
        _check_lengths(options)
    if options.int8:
        from distilcb.eval.models import check_int8

        check_int8(options.models)
    # What is kept piece by piece comes first, so that a job that is stopped in it repeats nothing else.
    made = _evaluate_tasks(options) if options.tasks else None
    if _text_is_wanted(options):
        _evaluate_text(options)
    speed = _time(options) if options.speed else None
    if made:
        _write_page(options.output / TASKS_FOLDER, made)
    if options.card:
        _fill_cards(options, made, speed)
    if made:
        from distilcb.finetune.evaluation import check_none_is_lost

        check_none_is_lost(made, options.output / TASKS_FOLDER)


def _check_names(options: argparse.Namespace) -> None:
    """What is named is there, but for the models, which may be made later; data sets of the hub are not fetched.

    Raises:
        ConfigError, DataError, ModelError: what is not.
    """
    from distilcb.data.corpus import find_sources
    from distilcb.hub import model_folder
    from distilcb.tasks.rows import TaskRows

    if options.teacher:
        model_folder(options.teacher, weights=False)
    find_sources(options.heldout or [])
    for asked in _asked_tasks(options):
        for each, needs_training in ((asked, True), *((other, False) for other in asked.zero_shot)):
            if each.source.startswith(HUB_PREFIX):
                continue
            rows = TaskRows(each.source)
            splits = [options.split or rows.heldout_split(), *(["train"] if needs_training else [])]
            for split in splits:
                rows.read(each.task, split, limit=1)


def _check_output(options: argparse.Namespace) -> None:
    """It can be a folder, and what will be replaced there is an earlier evaluation's.

    Raises:
        ConfigError: names the file that is not.
    """
    whole = options.output.absolute()
    there = next(each for each in (whole, *whole.parents) if each.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        fault = "may not be written to" if there.is_dir() else "is a file"
        raise ConfigError(f"{options.output} cannot be written ({there} {fault}). Name another --output: a folder.")
    asked = {"tasks/results.json": options.tasks, "results.json": _text_is_wanted(options), "speed.json": options.speed}
    keys = {"tasks/results.json": "tasks", "results.json": "heldout", "speed.json": "seconds"}
    for name in (name for name, wanted in asked.items() if wanted):
        file = options.output / name
        beside = (found for each in (".md", ".html") if (found := file.with_suffix(each)).is_file())
        other = file if file.is_file() else next(beside, None)  # which are written after it
        if other and not (other == file and _has_key(file, keys[name])):
            raise ConfigError(f"{other} is of something else than this evaluation. Move it, or name another --output.")


def _has_key(file: Path, key: str) -> bool:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(found, dict) and key in found


def _check_cards(options: argparse.Namespace) -> None:
    """Before hours of work."""
    from distilcb.finetune.cards import card_of

    for model in options.models:
        card_of(model)


def _check_lengths(options: argparse.Namespace) -> None:
    from distilcb.eval.speed import check_lengths

    check_lengths(_names(options), options.lengths)


def _fill_cards(options: argparse.Namespace, made: "dict[str, Any] | None", speed: "Timed | None") -> None:
    from distilcb.finetune.cards import fill_card

    tasks = {asked.task.name: asked.task for asked in _asked_tasks(options)} if options.tasks else {}
    for name, model in _names(options).items():
        if model != options.teacher:
            print(f"card: {fill_card(model, name, made=made, tasks=tasks, speed=speed)}")


def _text_is_wanted(options: argparse.Namespace) -> bool:
    return bool(options.heldout) or not (options.tasks or options.speed)


def _evaluate_text(options: argparse.Namespace) -> None:
    from distilcb import distributed
    from distilcb.config import DataConfig, cache_folder
    from distilcb.eval.models import default_text, evaluate_models, write_results
    from distilcb.eval.report import as_console, heldout_tables

    text = options.heldout or [default_text()]
    cut = {name: getattr(options, name) for name in _OF_TEXT}
    world = distributed.start()
    models, cache = options.models, cache_folder(DataConfig())
    figures = evaluate_models(models, teacher=options.teacher, text=text, cache=cache, world=world, **cut)
    settings = {"models": models, "teacher": options.teacher, "text": text, "ranks": world.size} | cut
    distributed.on_main(lambda: write_results(options.output, figures, settings))
    if world.is_main:
        tables = "\n\n".join(as_console(rows) for rows in heldout_tables(figures))
        print(f"{tables}\n\nresults: {options.output}")
    distributed.stop()


def _evaluate_tasks(options: argparse.Namespace) -> dict[str, Any]:
    output = options.output / TASKS_FOLDER
    evaluation = evaluation_of(options)
    from distilcb.finetune.evaluation_report import as_markdown

    made = evaluation.run(output)
    print(f"{as_markdown(made)}\n\nresults: {output}")
    return made


def _write_page(output: Path, made: dict[str, Any]) -> None:
    """results.html, with speeds where they have been measured into the same folder."""
    from distilcb.finetune.evaluation_report import as_markdown
    from distilcb.finetune.plots import as_page
    from distilcb.finetune.runs import ON_FULL_DISK, read_json

    file = output.parent / "speed.json"
    speed = read_json(file) if file.is_file() else None
    of_a_cpu = speed is not None and speed["where"]["device"] == "cpu"  # earlier versions timed on a GPU too
    page = as_page(made, as_markdown(made), speed["seconds"] if speed and of_a_cpu else None)
    if page is not None:
        with writing(output, ConfigError, ON_FULL_DISK):
            write_durably(output / "results.html", page)


def _time(options: argparse.Namespace) -> "Timed":
    size_cpu_threads(discover())
    from distilcb.eval.speed import LENGTHS as TIMED
    from distilcb.eval.speed import time_models, write_speeds

    timed = time_models(_names(options), lengths=options.lengths or TIMED)
    print(f"{write_speeds(options.output, timed)}\n\nresults: {options.output}")
    return timed


def _names(options: argparse.Namespace) -> dict[str, str]:
    """What each model is called -> where it is; the teacher, if there is one, first."""
    from distilcb.eval.models import names_in_results

    named = names_in_results([*([options.teacher] if options.teacher else []), *options.models])
    return {"teacher" if model == options.teacher else shown: model for model, shown in named.items()}


def evaluation_of(options: argparse.Namespace) -> "Evaluation":
    """What the options ask for, its names looked up."""
    tasks = _asked_tasks(options)
    if not uses_cuda():
        size_cpu_threads(discover())
        keep_freed_memory()
    from distilcb.finetune.evaluation import Evaluation
    from distilcb.finetune.training import Recipe

    names = _names(options)
    lengths = {kind: options.max_length or length for kind, length in LENGTHS.items()}
    return Evaluation(
        models=names,
        tasks=tasks,
        recipe=Recipe(options.epochs, options.lr, options.batch, options.warmup, by_length=options.by_length),
        max_lengths=lengths,
        stride=options.stride,
        seeds=tuple(options.seeds) if options.seeds else None,
        split=options.split,
        train_rows=options.train_rows,
    )


def _asked_tasks(options: argparse.Namespace) -> "tuple[AskedTask, ...]":
    from distilcb.finetune.evaluation import AskedTask

    named = options.tasks or []
    sources = {task.name: (task, source) for task, source in (_placed(words, options) for words in named)}
    if len(sources) < len(named):
        raise ConfigError(f"--tasks {' '.join(options.tasks)}: one stands there twice.")
    others: dict[str, list[AskedTask]] = {}
    for words in options.zero_shot or []:
        first, _, second = words.partition(":")
        if first not in sources:
            raise ConfigError(f"--zero_shot {words}: {first} is not among --tasks {' '.join(sources)}.")
        others.setdefault(first, []).append(AskedTask(*_placed(second, options)))
    return tuple(AskedTask(task, source, tuple(others.get(name, ()))) for name, (task, source) in sources.items())


def _placed(words: str, options: argparse.Namespace) -> tuple[Task, str]:
    """The task of NAME[=DATA], and where its rows are."""
    name, _, given = words.partition("=")
    task = task_named(name, option="--tasks")
    if given and not given.startswith(HUB_PREFIX) and not Path(given).expanduser().is_dir():
        raise ConfigError(f"--tasks {words}: no such folder. Needed: one with train.jsonl(.gz), or hub:NAME.")
    return task, given or _found(task, options.data)


def _found(task: Task, data: str | None) -> str:
    """The folder of a task's name under `data`, or in a folder there.

    Raises:
        ConfigError: there is none.
    """
    places = (
        [Path(data).expanduser() / task.name, *sorted(Path(data).expanduser().glob(f"*/{task.name}"))] if data else []
    )
    for place in places:
        if place.is_dir():
            return str(place)
    came = f"no folder {task.name} in {data}" if data else "no place for its rows"
    raise ConfigError(
        f"--tasks {task.name}: {came}. Needed: --data with a folder of that name in it, or {task.name}=FOLDER, or "
        f"{task.name}=hub:NAME."
    )
