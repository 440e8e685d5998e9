"""What a run is told: frozen sections of settings, and which of them two runs may differ in.

The sections are pydantic dataclasses, because pydantic reports every fault of an input together where other
config libraries stop at the first. This module imports no torch, so `--help` answers at once.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform

import pydantic
from pydantic import BeforeValidator, Field
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

# Tokens of a pass beyond which a GPU gets no faster; and on a CPU, where memory is no limit but the caches are.
MOST_TOKENS = {"cuda": 65_536, "cpu": 2048}


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
    relation: Weight = 0.0
    """weight of the KL of tokens' relations in one layer, by queries, keys and values (MiniLMv2)"""
    relation_layer: Count | None = None
    """the teacher's layer that the student's last one is to relate like, counted from 1; null: the last"""
    relation_heads: Count = 48
    """into how many parts hidden states are cut for relations, whatever the heads of attention"""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T: softens both distributions in kl"""
    kl_positions: Literal["attended", "masked"] = "attended"
    """where kl and mse are taken: on every token, or on masked ones only"""
    kl_until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """share of the steps after which kl and mse are left out, and what is left is learnt alone"""

    @property
    def needs_teacher(self) -> bool:
        """Whether a term with a weight is learnt from a teacher."""
        return bool(self.kl or self.mse or self.cos or self.relation)

    def at(self, step: int, steps: int) -> "LossConfig":
        """The objective of step `step`, counted from 0, of `steps`."""
        return replace(self, kl=0.0, mse=0.0) if step >= round(self.kl_until * steps, 6) else self


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
class CardConfig:
    language: Annotated[
        tuple[Annotated[str, Field(pattern="^([a-z]{2,3}|multilingual)$")], ...], BeforeValidator(_as_list)
    ] = ()
    """of the student, for its model card, as the hub has them: fr, en, multilingual"""
    license: Annotated[str, Field(pattern="^[a-z0-9.-]+$")] | None = None
    """of the student, as the hub names it: mit, apache-2.0, cc-by-sa-4.0"""
    datasets: Paths = ()
    """hub names of what it was trained on"""


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
    card: CardConfig = CardConfig()
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
        "card.language",
        "card.license",
        "card.datasets",
        "deepspeed",  # precision is a fact of the run, and stage 2 the only one there is
    }
)

# In these students that learn from the same passes of a teacher over the same batches may differ; a setting that is not
# named here decides what they share. Whole sections stand for all of theirs.
FREE_AMONG_STUDENTS = frozenset(
    {
        "student",
        "card",
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
    """Lines 'name: old -> new' for each setting that differs and can alter the result.

    A setting that there was none of when the old ones were written had its default: a new one's must alter nothing.
    """
    before = flatten(to_plain(Config()))
    before |= flatten({name: value for name, value in old.items() if name != "provenance"})
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


def even_sizes(config: Config, world_size: int, *, device_type: str) -> list[int]:
    """Micro-batches that cut the global batch evenly, from small to large, up to as many tokens as make sense."""
    share = config.optim.global_batch // world_size
    most = max(1, MOST_TOKENS[device_type] // config.data.seq_len)
    return [size for size in range(1, min(share, most) + 1) if share % size == 0]


def cache_folder(data: DataConfig) -> Path:
    """Where prepared text is cached."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(data.cache) if data.cache else Path(home) / "distilcb"
