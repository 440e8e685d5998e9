"""What a run is told: frozen sections, read from a recipe over the defaults, checked all at once.

The sections are pydantic dataclasses, because pydantic reports every fault of an input together where other
config libraries stop at the first. This module imports no torch, so `--help` answers at once.
"""

import difflib
import json
import os
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
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
    init_layers: tuple[Annotated[int, Field(ge=0)], ...] | Literal["first_of_pairs", "last_of_pairs"] | None = None
    """for each student layer the source layer it copies, from 0; the first or the last of each pair (or of as many as \
one student layer stands for); null: spread evenly, the first and last included"""
    architecture: str | None = None
    """the student's model_type where it is another than the teacher's: distilbert for a BERT; null: the same"""
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
    """the same, for evaluation; []: no evaluation"""
    seq_len: Annotated[int, Field(ge=8)] = 512
    """tokens in a block, separators included"""
    language_exponent: Annotated[float, Field(ge=0, le=1)] | None = None
    """each name in train is a language, shown in proportion to its blocks^exponent (1: to its size, 0: all alike); \
null: the names are one text"""
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the training blocks to use, of each language where there are several, drawn once from train.seed"""
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
    """weight of the next word's cross-entropy, in mlm's place for causal models"""
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
    name: Literal["adamw", "adamw_torch", "lamb"] = "adamw"
    """adamw: DeepSpeed's fused Adam with decoupled weight decay; adamw_torch: torch's; lamb: for the largest batches"""
    global_batch: Count = 4096
    """sequences an optimizer step, over all ranks and accumulation"""
    micro_batch: Count | Literal["auto"] = 8
    """sequences a forward pass on one rank; auto: the most that fit a GPU, 2,048 tokens on a CPU"""
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

    @property
    def sequences_a_pass(self) -> int:
        """micro_batch; 1 while it is auto, for what that becomes cuts every batch that 1 does."""
        return 1 if self.micro_batch == "auto" else self.micro_batch


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
    activation_checkpointing: bool = False
    """keep of each student layer its input alone, and compute the rest again in the backward pass: less memory"""
    compile: bool = False
    """run the layers of teacher and student through torch.compile while training: a minute at the start"""
    stall_minutes: Annotated[float, Field(gt=0)] = 10.0
    """minutes without a move of any rank after which the run ends and names the one that stands still"""
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
        "train.stall_minutes",
        "train.activation_checkpointing",
        "train.compile",
        "deepspeed",  # precision is a fact of the run, and stage 2 the only one there is
    }
)

# In these students that learn from the same passes of a teacher over the same batches may differ; a setting that is not
# named here decides what they share. Whole sections stand for all of theirs.
FREE_AMONG_STUDENTS = frozenset(
    {
        "student",
        "data.sample_sentences",
        "loss",
        "optim.name",
        "optim.lr",
        "optim.warmup",
        "optim.schedule",
        "optim.betas",
        "optim.eps",
        "optim.weight_decay",
        "optim.clip",
        "train.log_every",
        "train.eval_every",
        "train.eval_maskings",
        "train.save_every",
        "train.keep_checkpoints",
        "train.activation_checkpointing",
    }
)


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


def shared_faults(configs: Mapping[str, Config]) -> list[str]:
    """What keeps students from being trained together, a line each; none where they differ in nothing that is shared.

    Args:
        configs: by the name of their recipe, two or more.
    """
    flat = {recipe: flatten(to_plain(config)) for recipe, config in configs.items()}
    faults = []
    for name in next(iter(flat.values())):
        values = {recipe: settings.get(name) for recipe, settings in flat.items()}
        free = name in FREE_AMONG_STUDENTS or name.split(".")[0] in FREE_AMONG_STUDENTS
        if not free and len({repr(value) for value in values.values()}) > 1:
            told = ", ".join(f"{value!r} in {recipe}" for recipe, value in values.items())
            faults.append(f"{name}: {told}. It must be the same in all; --{name} VALUE sets it for all of them.")
    one = next(iter(configs.values()))
    if one.teacher.model is None:
        faults.append("teacher.model is null: there is no teacher to share. Train the students one by one.")
    if one.optim.micro_batch == "auto":
        faults.append("optim.micro_batch: auto is found for one student alone. Give a number: --optim.micro_batch 8.")
    return faults


def load_recipe(path: Path) -> Config:
    """The configuration of a recipe file without overrides."""
    faults: list[str] = []
    return validate(read_recipe(path, faults), faults)


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


def accumulation_steps(optim: OptimConfig, world_size: int) -> int:
    """Micro-batches each rank runs for one optimizer step.

    Raises:
        ConfigError: the global batch is not a multiple of ranks x micro-batch; names the micro-batch that fits, where
            one does, and the nearest global batches that are.
    """
    per_pass = world_size * optim.sequences_a_pass
    steps, rest = divmod(optim.global_batch, per_pass)
    if rest:
        near = [size for size in (steps * per_pass, (steps + 1) * per_pass) if size]
        others = f"--optim.global_batch {' or '.join(map(str, near))}"
        fitting = _largest_micro_batch(optim, world_size)
        advice = f"--optim.micro_batch {fitting}; in a new run also {others}" if fitting else f"{others} in a new run"
        raise ConfigError(
            f"optim.global_batch={optim.global_batch} sequences: {world_size} rank(s) x "
            f"optim.micro_batch={optim.micro_batch} make {per_pass} a pass, and {optim.global_batch} is not a "
            f"multiple. Use {advice}{'' if fitting else '; a run that goes on needs another number of ranks'}."
        )
    return steps


def _largest_micro_batch(optim: OptimConfig, world_size: int) -> int | None:
    """The largest micro-batch up to the one asked for that cuts the global batch evenly: it needs no more memory."""
    share, rest = divmod(optim.global_batch, world_size)
    return None if rest else max(size for size in range(1, optim.sequences_a_pass + 1) if share % size == 0)


def cache_folder(data: DataConfig) -> Path:
    """Where prepared text is cached."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(data.cache) if data.cache else Path(home) / "distilcb"


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


def read_recipe(path: Path, faults: list[str]) -> dict[str, Any]:
    """The sections of a recipe file, unchecked; what keeps it from being read is added to `faults`."""
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
    if not any((loss.kl, loss.mlm, loss.cos, loss.mse, loss.clm)):
        found.append("loss: every weight is 0, so there is nothing to learn. Give loss.mlm or loss.kl a weight.")
    if loss.mlm and loss.clm:
        found.append(
            f"loss.mlm={loss.mlm} and loss.clm={loss.clm}: a model predicts masked words or the next one. Set one to 0."
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
