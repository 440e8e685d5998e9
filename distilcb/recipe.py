"""A recipe file -> a Config, checked all at once; each setting's name, type and meaning, for help and messages.

This module imports no torch, so `--help` answers at once.
"""

import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import TypeAdapter

from distilcb.config import Config, DataConfig, flatten
from distilcb.errors import ConfigError


def load_recipe(path: Path) -> Config:
    """The configuration of a recipe file without overrides."""
    faults: list[str] = []
    return validate(read_recipe(path, faults), faults)


def read_recipe(path: Path, faults: list[str]) -> dict[str, Any]:
    """The sections of a recipe file, unchecked; what keeps it from being read is added to `faults`."""
    try:
        text = path.read_text(encoding="utf-8").replace("{recipe_dir}", str(path.resolve().parent))
        tree = yaml.load(text, Loader=UniqueKeyLoader)
    except OSError as error:
        beside = [each.name for each in path.parent.glob("*.yaml") if each.name != path.name]
        near = difflib.get_close_matches(path.name, beside, n=1)
        meant = f" Did you mean {path.parent / near[0]}?" if near else ""
        faults.append(f"recipe {path}: {error.strerror or error}. Give a YAML file, such as recipes/mini.yaml.{meant}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else ""
        faults.append(f"recipe {path} is not readable as YAML: {' '.join(str(error).split())}.{what}")
        return {}
    if tree is not None and not isinstance(tree, dict):
        faults.append(f"recipe {path}: came {type(tree).__name__}, needed sections such as 'optim:' with names below")
        return {}
    sections = {field.name for field in fields(Config) if is_dataclass(field.default)}
    tree = {name: {} if value is None and name in sections else value for name, value in (tree or {}).items()}
    tree.pop("provenance", None)  # a run folder's config.yaml serves as a recipe
    return tree


def validate(tree: dict[str, Any], faults: Sequence[str] = ()) -> Config:
    """A Config from nested dicts.

    Raises:
        ConfigError: naming `faults` found earlier and all those of `tree` together.
    """
    found = list(faults)
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        found += [*dict.fromkeys(map(_describe, error.errors())), *_boolean_faults(tree)]
    else:
        found += [*_boolean_faults(tree), *_cross_faults(config)]
        if not found:
            return config
    raise ConfigError("\n  ".join(found) if len(found) == 1 else "\n  ".join([f"{len(found)} faults:", *found]))


def options(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, default, meaning) of every setting."""
    meanings = {name: info.description or "" for name, info in cls.__pydantic_fields__.items()}  # type: ignore[attr-defined]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from options(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", hint, field.default, meanings[field.name]


def type_name(hint: Any) -> str:
    """How a user may write a type: int, [int,...]|null, linear|cosine."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return "|".join(type_name(argument) for argument in arguments)
    if origin is tuple:
        return "[" + ",".join("..." if a is Ellipsis else type_name(a) for a in arguments) + "]"
    return getattr(hint, "__name__", str(hint))


def with_nearest(name: str, names: Sequence[str], *, dashes: str = "") -> str:
    """`name` and what may have been meant: the same word elsewhere, a like one, or all that its section has."""
    section, _, word = name.rpartition(".")
    inside = {each.rpartition(".")[2]: each for each in names if each.rpartition(".")[0] == section}
    near = [each for each in names if each.rpartition(".")[2] == word]
    near = near or [inside[each] for each in difflib.get_close_matches(word, list(inside), n=1, cutoff=0.5)]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if near:
        return f"{name}: did you mean {dashes}{near[0]}?"
    return f"{name}: {section} has {', '.join(inside)}" if section and inside else f"{name}: --help lists every one"


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key written twice is a fault: plain YAML lets the second win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            second = [node.value[place][0].start_mark for place, key in enumerate(keys) if str(key) in twice][-1]
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} written twice", second)
        return super().construct_mapping(node, deep)


def _describe(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        sections = [field.name for field in fields(Config)]
        return f"unknown setting {with_nearest(path, [name for name, *_ in options()] + sections)}"
    hints = {name: hint for name, hint, *_ in options()}
    setting = path.rpartition(".")[0]
    if setting in hints and not isinstance(fault["loc"][-1], int):  # one of several types that it may have
        return f"{setting}={fault['input']!r}: needed {type_name(hints[setting])}"
    if fault["type"] == "tuple_type":
        return f"{path}={fault['input']!r}: needed a list, such as [0,2,4]"
    if fault["type"] == "dataclass_type":
        return f"{path}={fault['input']!r}: needed settings below it, such as '{path}:' and indented names"
    return f"{path}={fault['input']!r}: {fault['msg']}"


def _boolean_faults(tree: dict[str, Any]) -> list[str]:
    """true and false where a number belongs: pydantic takes them for 1 and 0."""
    kinds = {name: type_name(hint).split("|")[0] for name, hint, *_ in options()}
    return [
        f"{name}={value!r}: Input should be a number, not a boolean"
        for name, value in flatten(tree).items()
        if isinstance(value, bool) and kinds.get(name) in ("int", "float")
    ]


def _cross_faults(config: Config) -> list[str]:
    """Faults that lie between settings; each names the settings and the mend."""
    found = []
    loss, student, teacher, masking = config.loss, config.student, config.teacher, config.masking
    if not any((loss.kl, loss.mlm, loss.cos, loss.mse, loss.clm, loss.relation)):
        found.append("loss: every weight is 0, so there is nothing to learn. Give loss.mlm or loss.kl a weight.")
    if loss.kl_until < 1 and not any((loss.mlm, loss.cos, loss.clm, loss.relation)):
        found.append(
            f"loss.kl_until={loss.kl_until:g}: kl and mse end there, and no other term has a weight. Give loss.mlm one."
        )
    if loss.mlm and loss.clm:
        found.append(
            f"loss.mlm={loss.mlm} and loss.clm={loss.clm}: a model predicts masked words or the next one. Set one to 0."
        )
    if teacher.model is None:
        needing = [name for name in ("kl", "cos", "mse", "relation") if getattr(loss, name)]
        if needing:
            found.append(
                f"teacher.model is null, but {', '.join('loss.' + n for n in needing)} need one: set them to 0."
            )
        if student.init == "teacher":
            found.append("teacher.model is null, but student.init is 'teacher': use 'random' or a folder.")
        if student.init == "random" and not (student.config and config.data.tokenizer):
            found.append(
                "teacher.model is null and student.init is 'random': give student.config (a config.json) and "
                "data.tokenizer (a folder)."
            )
    if config.optim.warmup >= config.train.steps:
        found.append(
            f"optim.warmup={config.optim.warmup:g} steps, train.steps={config.train.steps}: the learning rate would "
            "never reach its peak. Use fewer, or a share below 1."
        )
    for name in ("activation_checkpointing", "compile"):
        if loss.relation and getattr(config.train, name):
            found.append(
                f"loss.relation={loss.relation:g} and train.{name}: what a layer makes inside is not to be had then. "
                f"Set train.{name} false, or loss.relation 0."
            )
    found += _language_faults(config.data)
    if masking.mask_share + masking.random_share > 1 + 1e-9:
        found.append(
            f"masking.mask_share={masking.mask_share} + masking.random_share={masking.random_share} is over 1."
        )
    if isinstance(student.init_layers, tuple) and student.num_layers not in (None, len(student.init_layers)):
        found.append(
            f"student.init_layers lists {len(student.init_layers)} layers, student.num_layers={student.num_layers}: "
            "they must agree; leave one out."
        )
    return found


def _language_faults(data: DataConfig) -> list[str]:
    """What is wrong with the names of data.train where each is a language."""
    found: list[str] = []
    if data.language_exponent is None:
        return found
    if len(data.train) == 1:
        found.append(
            f"data.language_exponent={data.language_exponent:g}, but data.train names one text, {data.train[0]}: each "
            "language needs a name of its own, such as --data.train fr,en,de. Name several, or give "
            "--data.language_exponent null."
        )
    twice = sorted({name for name in data.train if data.train.count(name) > 1})
    if twice:
        found.append(f"data.train names {', '.join(twice)} twice: each name is a language. Name each once.")
    return found
