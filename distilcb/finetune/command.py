"""launch/finetune.py: its options, and how they become a comparison. Imports no torch, so `--help` answers at once."""

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distilcb.command_line import Parser, number, some_name, some_path
from distilcb.config import DataConfig, cache_folder
from distilcb.errors import ConfigError
from distilcb.hub import HUB_PREFIX
from distilcb.launcher import discover
from distilcb.machine import keep_freed_memory, size_cpu_threads, uses_cuda
from distilcb.tasks.declarations import TASKS, task_named

if TYPE_CHECKING:
    from distilcb.finetune.comparison import Comparison
    from distilcb.finetune.subjects import Subject

log = logging.getLogger(__name__)

CAUSAL = "causal"
_ARMS = {"both": ("without", "with"), "on": ("with",), "off": ("without",)}
LENGTHS = {"question_answering": 384, "classification": 128, "regression": 128, "tagging": 256, CAUSAL: 1024}

# Options that decide what comes out; the others are kept by what they became.
_KEPT = (
    *("task", "data", "as_it_runs", "heldout", "student", "teacher", "teacher_base"),
    *("alpha_soft", "alpha_hard", "temperature", "stride", "train_rows"),
)


def parser_of(description: str | None) -> Parser:
    """The options of launch/finetune.py."""
    parser = Parser(description=description, allow_abbrev=False)
    tasks = ", ".join([*TASKS, CAUSAL])
    parser.add_argument("--task", required=True, metavar="NAME", help=f"of {tasks}; or a YAML file that declares one")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="NAME",
        help="folder of train, dev and test.jsonl(.gz), or hub:NAME[:CONFIG]; of causal the training text",
    )
    parser.add_argument(
        "--as_it_runs", action="store_true", help="of causal: line ends too, no end-of-text tokens, as for WikiText"
    )
    parser.add_argument("--heldout", nargs="+", metavar="NAME", help="text to measure on, of causal alone")
    parser.add_argument(
        "--split", choices=["dev", "test"], help="rows to measure on (default: test where there is one; of hub: dev)"
    )
    parser.add_argument(
        "--student", type=some_name, required=True, metavar="MODEL", help="folder or hub name, such as a run's student"
    )
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher", type=some_name, metavar="MODEL", help="a model that has been fine-tuned on the task"
    )
    teacher.add_argument(
        "--teacher_base", type=some_name, metavar="MODEL", help="a model to fine-tune as the teacher first"
    )
    parser.add_argument(
        "--soft_targets", choices=list(_ARMS), help="with and without, or one (default: both where there is a teacher)"
    )
    parser.add_argument("--seeds", type=number(0), nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--output", type=some_path, required=True, metavar="DIR", help="folder to write, or to go on in"
    )
    real: dict[str, Any] = {"type": number(1e-9, kind=float)}
    parser.add_argument("--epochs", **real, default=3.0, help="passes over the data (default: 3, published)")
    parser.add_argument("--lr", **real, default=5e-5, help="(default: 5e-5, of the published script)")
    parser.add_argument("--batch", type=number(1), default=8, help="sequences a step (default: 8, likewise)")
    parser.add_argument("--warmup", type=number(0, 1, kind=float), default=0.0, help="share of the steps (default: 0)")
    parser.add_argument("--teacher_epochs", **real, help="of --teacher_base (default: as --epochs)")
    parser.add_argument("--teacher_lr", **real, help="of --teacher_base (default: as --lr)")
    parser.add_argument(
        "--max_length",
        type=number(16, 65_536),
        help="tokens of a sequence (default: 384 for questions, 1024 for causal, 256 for tags, else 128)",
    )
    parser.add_argument(
        "--stride", type=number(1), default=128, help="tokens between windows (default: 128, published)"
    )
    zero: dict[str, Any] = {"type": number(0, kind=float)}
    parser.add_argument("--alpha_soft", **zero, default=0.5, help="weight of soft targets (default: 0.5, published)")
    parser.add_argument(
        "--alpha_hard", **zero, default=0.5, help="weight of labels beside them (default: 0.5, published)"
    )
    parser.add_argument("--temperature", **real, default=2.0, help="of soft targets (default: 2, published)")
    parser.add_argument("--by_length", action="store_true", help="batches of rows of like lengths: less padding")
    parser.add_argument("--train_rows", type=number(1), metavar="COUNT", help="take the first rows only (default: all)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="where prepared text of causal is kept")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    return parser


def comparison_of(options: argparse.Namespace) -> "Comparison":
    """What the options ask for, with data and models checked.

    Raises:
        UserError: options that do not go together, data or models that cannot be used.
    """
    arms = check_options(options)
    if not uses_cuda():
        size_cpu_threads(discover())
        keep_freed_memory()
    from distilcb.finetune.comparison import Comparison
    from distilcb.finetune.models import check_same_tokenizer, content_of, longest_sequence
    from distilcb.finetune.objective import Weights
    from distilcb.finetune.training import Recipe, precision

    teacher = options.teacher or options.teacher_base
    names = [options.student, *([teacher] if teacher else [])]
    if teacher:
        check_same_tokenizer(options.student, teacher)
    kind = CAUSAL if options.task == CAUSAL else task_named(options.task).kind
    longest = longest_sequence(names, options.max_length or LENGTHS[kind])
    subject = subject_of(options, longest)
    recipe = Recipe(options.epochs, options.lr, options.batch, options.warmup, by_length=options.by_length)
    teacher_recipe = replace(
        recipe, epochs=options.teacher_epochs or options.epochs, lr=options.teacher_lr or options.lr
    )
    weights = Weights(hard=options.alpha_hard, soft=options.alpha_soft, temperature=options.temperature)
    settings = {
        **{name: getattr(options, name) for name in _KEPT},
        # What the names stood for: a folder may hold something else by the time that it is named again.
        "declared": None if options.task == CAUSAL else asdict(task_named(options.task)),
        "content": subject.content,
        "models": {name: content_of(name) for name in names},
        "precision": precision(),
        "split": subject.facts.get("split"),
        "max_length": longest,
        "recipe": asdict(recipe),
        "teacher_recipe": asdict(teacher_recipe) if options.teacher_base else None,
    }
    for name in names:  # a wrong one is told before hours of the others
        subject.load(name, fine_tuned=name == options.teacher)
    if not (options.soft_targets or teacher):
        log.info("neither --teacher nor --teacher_base is named: the student learns from the labels alone")
    return Comparison(
        subject=subject,
        student=options.student,
        teacher=options.teacher,
        teacher_base=options.teacher_base,
        recipe=recipe,
        teacher_recipe=teacher_recipe,
        weights=weights,
        arms=arms,
        seeds=tuple(options.seeds),
        settings=settings,
    )


def check_options(options: argparse.Namespace) -> tuple[str, ...]:
    """The arms that are wanted.

    Raises:
        ConfigError: every fault of the options, in one message.
    """
    faults = []
    has_teacher = bool(options.teacher or options.teacher_base)
    asked = options.soft_targets or ("both" if has_teacher else "off")
    if asked != "off" and not has_teacher:
        faults.append(f"--soft_targets {asked} needs --teacher, or --teacher_base to have one fine-tuned")
    if asked == "off" and options.teacher_base:
        faults.append("--soft_targets off leaves --teacher_base without a use: leave one of them out")
    if asked != "off" and not options.alpha_soft:
        faults.append("--alpha_soft 0 leaves no soft targets: give more, or --soft_targets off")
    if len(set(options.seeds)) < len(options.seeds):
        faults.append(f"--seeds {' '.join(map(str, options.seeds))}: one stands there twice")
    if options.task == CAUSAL:
        if not options.heldout:
            faults.append("--task causal needs --heldout, the text to measure on")
        wrong = [name for name in ("split", "train_rows", "by_length") if getattr(options, name)]
        faults += [f"--{name} is of labelled tasks, and causal has none" for name in wrong]
    else:
        if len(options.data) > 1:
            faults.append(f"--data names {len(options.data)} places: a labelled task has one folder, or hub:NAME")
        if options.as_it_runs:
            faults.append("--as_it_runs is of --task causal, whose text may be read as it is")
        if options.heldout:
            faults.append("--heldout is of --task causal; a labelled task measures on its --split")
        if not options.data[0].startswith(HUB_PREFIX) and not Path(options.data[0]).expanduser().is_dir():
            faults.append(f"--data {options.data[0]}: no such folder. Needed: one with train.jsonl(.gz), or hub:NAME")
    if discover().size > 1:
        faults.append("one process fine-tunes: start it with python, and several tasks beside each other")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
    return _ARMS[asked]


def subject_of(options: argparse.Namespace, longest: int) -> "Subject":
    """Task or text, read and encoded for sequences of `longest` tokens."""
    from distilcb.finetune.subjects import LabelledTask, NextWords

    if options.task == CAUSAL:
        cache = options.cache or cache_folder(DataConfig())
        runs = options.as_it_runs
        return NextWords(
            options.data, options.heldout, options.student, max_length=longest, cache=cache, as_it_runs=runs
        )
    wanted: dict[str, Any] = {"split": options.split, "train_rows": options.train_rows}
    task = task_named(options.task)
    return LabelledTask(task, options.data[0], options.student, max_length=longest, stride=options.stride, **wanted)
