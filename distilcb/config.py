"""What a run is told: frozen sections, read from defaults < recipe < command line, checked all at once.

The sections are pydantic dataclasses, because pydantic reports every fault of an input together where other
config libraries stop at the first. This module imports no torch, so `--help` answers at once.
"""

import argparse
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform

import pydantic
import yaml
from pydantic import BeforeValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass as pydantic_dataclass

from distilcb.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = REPOSITORY / "recipes" / "mini.yaml"


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type) -> Any:
    """A frozen, checked dataclass that refuses unknown names; the string below a field is its help text."""
    settings = pydantic.ConfigDict(
        extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False
    )
    return pydantic_dataclass(frozen=True, kw_only=True, config=settings)(cls)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Paths = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], BeforeValidator(_as_list)]
Weight = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


@section
class TeacherConfig:
    model: str | None = "camembert-base"
    """folder or hub name of the teacher; null trains the student alone"""
    allow_pickle: bool = False
    """read a pickled pytorch_model.bin where there is no safetensors file; a pickle can run code: trust its author"""


@section
class StudentConfig:
    init: str = "teacher"
    """where the first weights come from: 'teacher', 'random', or the folder of a model to continue from"""
    num_layers: Count | None = None
    """transformer layers; null: half of the teacher's"""
    init_layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """for each student layer the source layer it copies, from 0; null: spread evenly, the first and last included"""
    config: str | None = None
    """a config.json for the student, in place of the one derived from the teacher"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """dropout of hidden states and attention while training; null: the source model's own"""
    freeze_position_embeddings: bool = False
    """keep the position embeddings as they were copied"""


@section
class DataConfig:
    train: Paths = ()
    """prepared folder, or text to prepare first: files, folders, globs (.txt .jsonl .parquet, also .gz .xz .zst), \
hub:NAME:CONFIG:SPLIT"""
    heldout: Paths = ()
    """the same, for evaluation; empty: no evaluation"""
    seq_len: Annotated[int, Field(ge=8)] = 512
    """tokens in a block, separators included"""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training blocks to use, drawn once from train.seed"""
    tokenizer: str | None = None
    """tokenizer folder; null: the teacher's, or that of student.init"""
    text_field: str = "text"
    """name of the text in .jsonl records and .parquet columns"""
    workers: Annotated[int, Field(ge=0)] = 2
    """processes that make batches ahead of time, a rank; 0: none"""
    sample_sentences: tuple[str, ...] = (
        "La jeune <mask> se mit à pleurer.",
        "Je vous remercie, monsieur le <mask>.",
        "Il était une <mask> un roi.",
    )
    """sentences with one <mask> each, filled by the student as it learns"""
    cache: str | None = None
    """where text given raw is kept once prepared; null: $XDG_CACHE_HOME/distilcb or ~/.cache/distilcb"""


@section
class MaskingConfig:
    rate: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    """share of a block's tokens to predict"""
    mask_share: Annotated[float, Field(ge=0, le=1)] = 0.8
    """of those, the share that becomes <mask>"""
    random_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    """of those, the share that becomes another word; the rest stay"""
    smoothing: Annotated[float, Field(ge=0, le=4)] = 0.7
    """a token is chosen with weight count^-smoothing, so rare ones are learned more often; 0: all alike"""
    whole_word: bool = False
    """choose whole words in place of single tokens"""


@section
class LossConfig:
    kl: Weight = 0.5
    """weight of T^2 KL(teacher || student)"""
    mlm: Weight = 0.2
    """weight of the masked words' cross-entropy"""
    clm: Weight = 0.0
    """weight of the next word's cross-entropy (causal models; none is supported yet, so it must be 0)"""
    cos: Weight = 0.3
    """weight of 1 - cosine of last hidden states"""
    mse: Weight = 0.0
    """weight of the squared distance of raw logits"""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: softens both distributions in kl"""
    kl_positions: Literal["attended", "masked"] = "attended"
    """where kl and mse are taken: on every token, or on masked ones only"""


@section
class OptimConfig:
    name: Literal["adamw", "adamw_torch"] = "adamw"
    """optimizer: adamw is DeepSpeed's fused Adam with decoupled weight decay, adamw_torch torch's own"""
    global_batch: Count = 4096
    """sequences an optimizer step, over all ranks and accumulation"""
    micro_batch: Count = 8
    """sequences a forward pass on one rank"""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """peak learning rate"""
    warmup: Annotated[float, Field(ge=0)] = 0.05
    """below 1: share of the steps; else: number of steps over which the rate rises linearly"""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """what follows the warm-up; linear and cosine end at 0"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.98)
    """Adam's decay rates"""
    eps: Annotated[float, Field(gt=0)] = 1e-6
    """Adam's epsilon"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """decoupled weight decay, on matrices only (never on biases and layer norms)"""
    clip: Annotated[float, Field(ge=0)] = 5.0
    """largest norm of the whole gradient; 0: no clipping"""


@section
class TrainConfig:
    steps: Count = 100_000
    """optimizer steps"""
    log_every: Count = 10
    """steps between two lines of metrics.jsonl"""
    eval_every: Annotated[int, Field(ge=0)] = 1000
    """steps between evaluations on data.heldout; 0: at the start and the end only"""
    eval_maskings: Annotated[int, Field(ge=2)] = 8
    """fixed maskings of the held-out text that an evaluation at the start and the end averages over"""
    save_every: Annotated[int, Field(ge=0)] = 500
    """steps between checkpoints; 0: at the end only"""
    keep_checkpoints: Count = 2
    """how many of the newest checkpoints stay"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """seed of the order, the masks, dropout and random weights"""


@section
class Config:
    """The whole of a run. Only train/build.py sees all of it; each part is given its own section."""

    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    data: DataConfig = DataConfig()
    masking: MaskingConfig = MaskingConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    deepspeed: str = "auto"
    """a file of ds_configs/, or 'auto': fp16 on CUDA, bf16 on CPUs that have it, else fp32"""


# A run may be resumed with another value of these: they change how it is cut, watched or kept, not what it computes
# beyond rounding.
RESULT_NEUTRAL = frozenset(
    {
        "teacher.model",  # told by a hash of its weights,
        "data.train",  # and these by a hash of their text
        "data.heldout",
        "data.workers",
        "data.cache",
        "data.sample_sentences",
        "optim.micro_batch",
        "train.log_every",
        "train.eval_every",
        "train.save_every",
        "train.keep_checkpoints",
    }
)


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line: the configuration, and what concerns this start only."""

    config: Config
    recipe: Path
    run_dir: Path
    fresh: bool
    dry_run: bool
    words: tuple[str, ...]


def flatten(config: object, prefix: str = "") -> dict[str, Any]:
    """Dotted names to values, such as {"optim.lr": 5e-4}, of a dataclass or nested dict."""
    tree = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    assert isinstance(tree, dict)
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        dotted = f"{prefix}{name}"
        flat |= flatten(value, f"{dotted}.") if isinstance(value, dict) else {dotted: value}
    return flat


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as nested dicts and lists, fit for YAML and JSON."""
    return json.loads(json.dumps(asdict(config)))


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """Lines 'name: old -> new' for each setting that differs and can alter the result."""
    before = flatten({name: value for name, value in old.items() if name != "provenance"})
    after = flatten(to_plain(new))
    return [
        f"{name}: {before.get(name)!r} -> {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if name not in RESULT_NEUTRAL and before.get(name) != after.get(name)
    ]


def parse_command_line(words: Sequence[str]) -> CommandLine:
    """Read `--recipe`, run options and `--section.name value` overrides into a checked configuration.

    Raises:
        ConfigError: with every fault found, one a line.
    """
    parser = _parser()
    known, unknown = parser.parse_known_args(list(words))
    overrides = {name: value for name, value in vars(known).items() if value is not None and "." in name}
    if known.deepspeed is not None:
        overrides["deepspeed"] = known.deepspeed
    faults = _unknown_options(unknown)
    recipe = Path(known.recipe).resolve()
    found = len(faults)
    tree = _read_recipe(recipe, faults)
    readable = len(faults) == found
    for name, text in overrides.items():
        _set(tree, name, _parse_value(name, text))
    if readable and not (known.dry_run or known.print_config or _names_text(tree)):
        faults.append("data.train is empty: name text or prepared blocks with --data.train FILE_OR_FOLDER")
    config = validate(tree, faults)
    if known.print_config:
        print(yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True), end="")
        raise SystemExit(0)
    run_dir = Path(known.run_dir) if known.run_dir else Path("runs") / recipe.stem
    return CommandLine(config, recipe, run_dir.absolute(), known.fresh, known.dry_run, tuple(words))


def load_recipe(path: Path) -> Config:
    """The configuration of a recipe file without overrides."""
    faults: list[str] = []
    return validate(_read_recipe(path, faults), faults)


def validate(tree: dict[str, Any], faults: Sequence[str] = ()) -> Config:
    """A Config from nested dicts.

    Raises:
        ConfigError: naming `faults` found earlier and all those of `tree` together.
    """
    found = list(faults)
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except pydantic.ValidationError as error:
        found += [*map(_describe, error.errors()), *_boolean_faults(tree)]
    else:
        found += [*_boolean_faults(tree), *_cross_faults(config)]
        if not found:
            return config
    raise ConfigError("\n  ".join(found) if len(found) == 1 else "\n  ".join([f"{len(found)} faults:", *found]))


def accumulation_steps(optim: OptimConfig, world_size: int) -> int:
    """Micro-batches each rank runs for one optimizer step.

    Raises:
        ConfigError: the global batch is not a multiple of ranks x micro-batch; names the nearest that are.
    """
    per_pass = world_size * optim.micro_batch
    steps, rest = divmod(optim.global_batch, per_pass)
    if rest:
        near = [size for size in (steps * per_pass, (steps + 1) * per_pass) if size]
        raise ConfigError(
            f"optim.global_batch={optim.global_batch} sequences: {world_size} ranks x "
            f"optim.micro_batch={optim.micro_batch} make {per_pass} a pass, and {optim.global_batch} is not a "
            f"multiple. Use {' or '.join(map(str, near))}."
        )
    return steps


def cache_folder(data: DataConfig) -> Path:
    """Where prepared text is cached."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(data.cache) if data.cache else Path(home) / "distilcb"


def _options(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, Any, str]]:
    """(dotted name, type, default, meaning) of every setting."""
    meanings = {name: info.description or "" for name, info in cls.__pydantic_fields__.items()}  # type: ignore[attr-defined]
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _options(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{field.name}", hint, field.default, meanings[field.name]


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return "|".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return "[" + ",".join("..." if a is Ellipsis else _type_name(a) for a in arguments) + "]"
    return getattr(hint, "__name__", str(hint))


class _Parser(argparse.ArgumentParser):
    """A parser whose faults are those of a user: one message, on one rank."""

    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.usage = "%(prog)s [--recipe FILE] [--section.name VALUE ...]"
    parser.description = (
        "Distil a teacher into a smaller student. Every setting of a recipe can be given here as --section.name VALUE. "
        "Defaults are those of the published recipe; recipes/mini.yaml, which runs where none is named, sets its own."
    )
    parser.add_argument("--recipe", default=str(DEFAULT_RECIPE), help="YAML recipe (default: recipes/mini.yaml)")
    parser.add_argument("--run_dir", help="run folder (default: runs/<the recipe's name>)")
    parser.add_argument("--fresh", action="store_true", help="start anew; a folder that is there is moved aside")
    parser.add_argument("--dry_run", action="store_true", help="a few real steps on random tokens, then a report")
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and end")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    groups: dict[str, Any] = {}
    for name, hint, default, meaning in _options():
        head = name.split(".")[0] if "." in name else "other"
        group = groups.setdefault(head, parser.add_argument_group(head))
        shown = default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)
        help_text = f"{meaning} (default: {shown})".replace("%", "%%")
        group.add_argument(f"--{name}", dest=name, metavar=_type_name(hint).replace("%", "%%"), help=help_text)
    return parser


def _unknown_options(unknown: Sequence[str]) -> list[str]:
    names = [name for name, *_ in _options()] + ["recipe", "run_dir", "fresh", "dry_run", "print_config"]
    faults = []
    for word in unknown:
        if word.startswith("--"):
            faults.append(f"unknown option --{_with_nearest(word[2:].split('=')[0], names)}")
        elif not faults:
            faults.append(
                f"unexpected word {word!r}: options are written --section.name VALUE, several files as a.txt,b.txt "
                "or as a glob in quotes, a name with spaces in quotes"
            )
    return faults


def _with_nearest(name: str, names: Sequence[str]) -> str:
    """`name` and what may have been meant: the same word elsewhere, a like one, or all that its section has."""
    section, _, word = name.rpartition(".")
    inside = {each.rpartition(".")[2]: each for each in names if each.rpartition(".")[0] == section}
    near = [each for each in names if each.rpartition(".")[2] == word]
    near = near or [inside[each] for each in difflib.get_close_matches(word, list(inside), n=1, cutoff=0.5)]
    near = near or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if near:
        return f"{name}: did you mean {near[0]}?"
    return f"{name}: {section} has {', '.join(inside)}" if section and inside else f"{name}: --help lists every one"


def _read_recipe(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8").replace("{recipe_dir}", str(path.resolve().parent))
        tree = yaml.load(text, Loader=_UniqueKeyLoader)
    except OSError as error:
        faults.append(f"recipe {path}: {error.strerror or error}. Give a YAML file, such as recipes/mini.yaml.")
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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML in which a key written twice is a fault: plain YAML lets the second win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {str(key) for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{sorted(twice)} written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _parse_value(name: str, text: str) -> object:
    hint = next(hint for option, hint, *_ in _options() if option == name)
    words = _type_name(hint).split("|")
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


def _describe(fault: Any) -> str:
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        sections = [field.name for field in fields(Config)]
        return f"unknown setting {_with_nearest(path, [name for name, *_ in _options()] + sections)}"
    if fault["type"] == "tuple_type":
        return f"{path}={fault['input']!r}: needed a list, such as [0,2,4]"
    if fault["type"] == "dataclass_type":
        return f"{path}={fault['input']!r}: needed settings below it, such as '{path}:' and indented names"
    return f"{path}={fault['input']!r}: {fault['msg']}"


def _boolean_faults(tree: dict[str, Any]) -> list[str]:
    """true and false where a number belongs: pydantic takes them for 1 and 0."""
    kinds = {name: _type_name(hint).split("|")[0] for name, hint, *_ in _options()}
    return [
        f"{name}={value!r}: Input should be a number, not a boolean"
        for name, value in flatten(tree).items()
        if isinstance(value, bool) and kinds.get(name) in ("int", "float")
    ]


def _cross_faults(config: Config) -> list[str]:
    """Faults that lie between settings; each names the settings and the mend."""
    found = []
    loss, student, teacher, masking = config.loss, config.student, config.teacher, config.masking
    if not any((loss.kl, loss.mlm, loss.cos, loss.mse)):
        found.append("loss: every weight is 0, so there is nothing to learn. Give loss.mlm or loss.kl a weight.")
    if loss.clm:
        found.append(
            f"loss.clm={loss.clm}: next-word prediction needs a causal model, and none is supported yet. Use 0."
        )
    if teacher.model is None:
        needing = [name for name in ("kl", "cos", "mse") if getattr(loss, name)]
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
    if masking.mask_share + masking.random_share > 1 + 1e-9:
        found.append(
            f"masking.mask_share={masking.mask_share} + masking.random_share={masking.random_share} is over 1."
        )
    if student.init_layers is not None and student.num_layers not in (None, len(student.init_layers)):
        found.append(
            f"student.init_layers lists {len(student.init_layers)} layers, student.num_layers={student.num_layers}: "
            "they must agree; leave one out."
        )
    return found
