"""The command line of launch/train.py: a recipe, run options, and --section.name VALUE over the recipe's settings;
and what the parsers of the other commands share.

Imports no torch, so `--help` answers at once.
"""

import argparse
import difflib
import json
import math
import re
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distilcb.config import DEFAULT_RECIPE, Config, Paths, shared_faults, to_plain
from distilcb.errors import ConfigError
from distilcb.recipe import options, read_recipe, type_name, validate, with_nearest


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the configuration, and what concerns this start only."""

    config: Config
    recipe: Path
    run_dir: Path
    fresh: bool
    dry_run: bool
    words: tuple[str, ...]


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Read `--recipe`, run options and `--section.name value` overrides into a checked configuration.

    Raises:
        ConfigError: with every fault found, one a line.
    """
    known, unknown = _parser().parse_known_args(list(words))
    if known.students:
        raise ConfigError("--students is launch/train.py's alone: name one recipe here, with --recipe FILE.")
    recipe = Path(known.recipe or DEFAULT_RECIPE).resolve()
    config = _resolve(known, recipe, _unknown_options(unknown))
    if known.print_config:
        print(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    run_dir = Path(known.run_dir) if known.run_dir else Path("runs") / recipe.stem
    if known.print_run_dir:
        print(run_dir.absolute())
        raise SystemExit(0)
    return CommandLine(config, recipe, run_dir.absolute(), known.fresh, known.dry_run, tuple(words))


def parse_command_lines(words: Sequence[str]) -> list[CommandLine]:
    """A command line for each student of launch/train.py: for each recipe of `--students`, or the one of `--recipe`.

    Overrides hold for all of them. Run folders are runs/<the recipe's name>, or with `--run_dir DIR` those in DIR.

    Raises:
        ConfigError: with every fault found, one a line; also where the students cannot be trained together.
    """
    known, unknown = _parser().parse_known_args(list(words))
    if not known.students:
        return [parse_command_line(words)]
    faults = [*_unknown_options(unknown), *_options_of_one_recipe(known)]
    recipes = {name: Path(name).resolve() for name in known.students}
    configs = _resolve_all(known, recipes, faults)
    if known.print_config:
        for name, config in configs.items():
            print(f"--- # {name}\n{yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True)}", end="")
        raise SystemExit(0)
    above = Path(known.run_dir or "runs").absolute()
    run_dirs = {name: above / recipe.stem for name, recipe in recipes.items()}
    if known.print_run_dir:
        print(_last_to_be_done(list(run_dirs.values())))
        raise SystemExit(0)
    return [
        CommandLine(config, recipes[name], run_dirs[name], known.fresh, False, tuple(words))
        for name, config in configs.items()
    ]


def _last_to_be_done(run_dirs: Sequence[Path]) -> Path:
    """Of students that are trained together the folder that tells how far all are: the last that is furthest back."""
    undone = [run_dir for run_dir in run_dirs if not (run_dir / "DONE").exists()] or list(run_dirs)

    def saved_step(run_dir: Path) -> int:
        latest = run_dir / "checkpoints" / "latest"
        return int(re.sub(r"\D", "", latest.read_text(encoding="utf-8")) or 0) if latest.is_file() else 0

    return min(reversed(undone), key=saved_step)


def _resolve(known: argparse.Namespace, recipe: Path, faults: list[str]) -> Config:
    """A recipe under the options' overrides, checked; `faults` were found before and are told with those of it."""
    overrides = {name: value for name, value in vars(known).items() if value is not None and "." in name}
    if known.deepspeed is not None:
        overrides["deepspeed"] = known.deepspeed
    found = len(faults)
    tree = read_recipe(recipe, faults)
    readable = len(faults) == found
    for name, text in overrides.items():
        _set(tree, name, _parse_value(name, text))
    if readable and not (known.dry_run or known.print_config or _names_text(tree)):
        faults.append("data.train is empty: name text or prepared blocks with --data.train FILE_OR_FOLDER")
    return validate(tree, faults)


def _resolve_all(known: argparse.Namespace, recipes: dict[str, Path], faults: list[str]) -> dict[str, Config]:
    """The configuration of each recipe. What is wrong with several alike, as an override is, is told once."""
    configs, wrong = {}, dict[str, list[str]]()
    for name, recipe in recipes.items():
        try:
            configs[name] = _resolve(known, recipe, [])
        except ConfigError as error:
            wrong.setdefault(str(error), []).append(name)
    faults += [f"{', '.join(names)}: {fault}" for fault, names in wrong.items()]
    if not wrong:
        faults += shared_faults(configs)
    if faults:
        raise ConfigError("\n  ".join(["--students:", *faults]))
    return configs


def _options_of_one_recipe(known: argparse.Namespace) -> list[str]:
    """What is wrong with the options that stand beside --students, and with its list."""
    faults = []
    if known.recipe:
        faults.append(f"--recipe {known.recipe} beside --students: name all recipes after --students.")
    if known.dry_run:
        faults.append("--dry_run takes one student: --recipe FILE in the place of --students.")
    files: dict[str, list[str]] = {}
    for name in known.students:
        files.setdefault(Path(name).resolve().stem, []).append(name)
    for stem, names in files.items():
        if len(names) > 1:
            faults.append(
                f"{', '.join(names)}: one run folder, {stem}, for {len(names)} recipes. Rename, or leave out."
            )
    return faults


class Parser(argparse.ArgumentParser):
    """A parser whose faults are those of a user: one message, on one rank."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message + self._meant(message))

    def _meant(self, message: str) -> str:
        """The options that unknown ones are likely to stand for."""
        unknown = message.split() if message.startswith("unrecognized arguments:") else []
        wrong = (word.partition("=")[0].removeprefix("--") for word in unknown if word.startswith("--"))
        shown = (action for action in self._actions if action.help != argparse.SUPPRESS and action.dest != "help")
        # Without the dashes, which all have in common.
        names = [name.removeprefix("--") for action in shown for name in action.option_strings]
        near = [difflib.get_close_matches(name, names, n=1) for name in wrong]
        return "".join(f". Did you mean --{found[0]}?" for found in near if found)


def number(least: float, most: float = math.inf, *, kind: Callable[[str], float] = int) -> Callable[[str], Any]:
    """What reads an option's number for argparse, whose message names the option where it is none of `least` to `most`.

    kind: int or float; nan and infinity are none.
    """
    limits = f"{least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
    needed = f"{'a whole number' if kind is int else 'a number'}, {limits}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most) or value == math.inf:
            raise argparse.ArgumentTypeError(f"came {text}, needed {needed}")
        return value

    return read


def some_name(text: str) -> str:
    """One that is not empty, for argparse, as a variable of the shell that is not set would make it."""
    if not text:
        raise argparse.ArgumentTypeError("came nothing, needed a name")
    return text


def some_path(text: str) -> Path:
    """The same of what may have to be made: of an empty name Path makes the folder that one is in."""
    return Path(some_name(text))


def folder(name: str) -> Path:
    """One that is there, for argparse."""
    if not name or not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name or 'nothing'} is no folder. Make it, or name another.")
    return Path(name)


def new_file(name: str) -> Path:
    """One that can be written when all is done, for argparse: in a folder that is there."""
    if not name or Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"came {name or 'nothing'}, needed the name of a file")
    return folder(str(Path(name).parent)) / Path(name).name


def _parser() -> argparse.ArgumentParser:
    parser = Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [--recipe FILE | --students FILE FILE ...] [--section.name VALUE ...]"
    parser.description = (
        "Distil a teacher into a smaller student. Every setting of a recipe can be given here as --section.name VALUE. "
        "Defaults are those of the published recipe; recipes/mini.yaml, which runs where none is named, sets its own."
    )
    parser.add_argument("--recipe", metavar="FILE", help="YAML recipe (default: recipes/mini.yaml)")
    parser.add_argument(
        "--students",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="recipes of students that learn from the same passes of a teacher",
    )
    parser.add_argument(
        "--run_dir", help="run folder (default: runs/<the recipe's name>); with --students the folder above theirs"
    )
    parser.add_argument("--fresh", action="store_true", help="start anew; a folder that is there is moved aside")
    parser.add_argument("--dry_run", action="store_true", help="a few real steps on random tokens, then a report")
    parser.add_argument("--print_run_dir", action="store_true", help="print the run folder's path and end")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    groups: dict[str, Any] = {}
    for name, hint, default, meaning in options():
        head = name.split(".")[0] if "." in name else "other"
        group = groups.setdefault(head, parser.add_argument_group(head))
        shown = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
        help_text = f"{meaning} (default: {shown})".replace("%", "%%")
        group.add_argument(f"--{name}", dest=name, metavar=type_name(hint).replace("%", "%%"), help=help_text)
    return parser


def _unknown_options(unknown: Sequence[str]) -> list[str]:
    names = [name for name, *_ in options()] + [
        "recipe",
        "students",
        "run_dir",
        "fresh",
        "dry_run",
        "print_run_dir",
        "print_config",
    ]
    faults = []
    for word in unknown:
        if word.startswith("--"):
            faults.append(f"unknown option --{with_nearest(word[2:].split('=')[0], names, dashes='--')}")
        elif not faults:
            faults.append(
                f"unexpected word {word!r}: options are written --section.name VALUE, several files as a.txt,b.txt "
                "or as a glob in quotes, a name with spaces in quotes"
            )
    return faults


def _parse_value(name: str, text: str) -> object:
    hint = next(hint for option, hint, *_ in options() if option == name)
    words = type_name(hint).split("|")
    if "null" in words and text == "null":
        return None
    if "str" in words or (hint is Paths and not text.startswith("[")):
        return text.split(",") if hint is Paths else text
    if any(re.match(r"\[(int|float)\b", word) for word in words) and "," in text and "[" not in text:
        text = f"[{text}]"  # 0,2,4
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _names_text(tree: dict[str, Any]) -> bool:
    data = tree.get("data")
    return isinstance(data, dict) and bool(data.get("train"))


def _set(tree: dict[str, Any], dotted: str, value: object) -> None:
    *sections, name = dotted.split(".")
    for part in sections:
        inner = tree.get(part, {})
        if not isinstance(inner, dict):
            return  # a section that is none: validate says so
        tree[part] = dict(inner)
        tree = tree[part]
    tree[name] = value
