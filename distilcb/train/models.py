"""Teacher, student and tokenizer of a run: built, checked against each other, and compiled where that is asked for."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from distilcb.config import Config, LossConfig
from distilcb.data.tokenizer import TextTokenizer
from distilcb.engine.deepspeed_config import DTYPES
from distilcb.errors import ConfigError, ModelError
from distilcb.machine import uses_cuda
from distilcb.models.cpu_layers import use_cpu_inference, use_cpu_training
from distilcb.models.families import Family, family_of
from distilcb.models.loading import hash_weights, load_language_model
from distilcb.models.student import build_student
from distilcb.models.teacher import Teacher
from distilcb.models.whole_blocks import use_whole_blocks

if TYPE_CHECKING:
    from distilcb.train.build import Place


@dataclass(frozen=True)
class Models:
    """Teacher (on its device), student (fp32, still on the CPU) and the tokenizer that both understand."""

    teacher: Teacher | None
    student: Any
    family: Family
    tokenizer: TextTokenizer
    teacher_hash: str | None = None


def build_models(config: Config, place: Place) -> Models:
    """Load the teacher and build the student.

    Raises:
        ConfigError, ModelError: whatever does not fit together.
    """
    (models,) = build_models_of([config], place)
    return models


def build_models_of(configs: Sequence[Config], place: Place) -> list[Models]:
    """The models of students that share teacher and tokenizer: both are loaded once.

    Raises:
        ConfigError, ModelError: whatever does not fit together.
    """
    if configs[0].train.compile:
        check_compiler()
    teacher, tokenizer = _load_teacher(configs[0]), _load_tokenizer(configs[0])
    built = [_with_student(config, teacher, tokenizer) for config in configs]
    if teacher is not None:
        teacher_hash = hash_weights(teacher.model)
        built = [replace(models, teacher_hash=teacher_hash) for models in built]
        teacher.model.to(device=place.device, dtype=DTYPES[place.precision])
    for config, models in zip(configs, built, strict=True):
        if config.train.activation_checkpointing:
            models.student.gradient_checkpointing_enable({"use_reentrant": False})
        use_fast_layers(models, place, compiled=config.train.compile)
    return built


def load_models(config: Config) -> Models:
    """Teacher and student in fp32 on the CPU, and the tokenizer; all that fits together.

    Raises:
        ConfigError, ModelError: whatever does not.
    """
    return _with_student(config, _load_teacher(config), _load_tokenizer(config))


def _load_teacher(config: Config) -> Teacher | None:
    if config.teacher.model is None:
        return None
    pickle = config.teacher.allow_pickle
    # In fp32 at first: the student's master weights are copied from it.
    return Teacher(load_language_model(config.teacher.model, dtype=torch.float32, allow_pickle=pickle))


def _load_tokenizer(config: Config) -> TextTokenizer:
    return TextTokenizer(config.data.tokenizer or config.teacher.model or config.student.init)


def _with_student(config: Config, teacher: Teacher | None, tokenizer: TextTokenizer) -> Models:
    """The student built, and seen to fit the others."""
    student, family = build_student(
        config.student,
        teacher=teacher.model if teacher else None,
        vocab_size=tokenizer.vocabulary.size,
        seed=config.train.seed,
    )
    models = Models(teacher, student, family, tokenizer)
    _check_models(config, models)
    return models


def check_compiler() -> None:
    """Raise ConfigError where torch.compile would find no compiler: Triton takes a C one, a CPU a C++ one."""
    variable, usual = ("CC", ("gcc", "clang")) if uses_cuda() else ("CXX", ("g++",))
    if not any(map(shutil.which, [os.environ[variable]] if variable in os.environ else usual)):
        raise ConfigError(
            f"train.compile: torch.compile needs a compiler: {' or '.join(usual)} in PATH, or its name in {variable} "
            "(apt-get install g++, or module load gcc)."
        )


def use_fast_layers(models: Models, place: Place, *, compiled: bool = False) -> None:
    """Have the student, and the teacher where it now lies, compute by torch.compile; or on a CPU in ways of our own.

    Causal ones then take every row for a whole block.
    """
    if compiled:
        _compile_layers(models)
    elif place.device.type == "cpu":
        use_cpu_training(models.student)
        if models.teacher:
            use_cpu_inference(models.teacher.model, models.teacher.family.layers(models.teacher.model))
    if models.family.causal:
        for model in [models.student, *([models.teacher.model] if models.teacher else [])]:
            use_whole_blocks(model)


def _compile_layers(models: Models) -> None:
    """Have torch.compile take each transformer layer at its first call: one compilation serves all that are alike."""
    teacher = [(models.teacher.model, models.teacher.family)] if models.teacher else []
    for model, family in [*teacher, (models.student, models.family)]:
        for layer in family.layers(model):
            layer.compile(dynamic=False)  # every micro-batch has the same shape


def _check_models(config: Config, built: Models) -> None:
    """Raise ConfigError, with every fault, where the models, the tokenizer and the block length do not fit."""
    teacher, student, tokenizer = built.teacher, built.student, built.tokenizer
    faults = []
    models = [("student", student, built.family)] + ([("teacher", teacher.model, teacher.family)] if teacher else [])
    for name, model, its_family in models:
        longest = its_family.max_seq_len(model.config)
        if config.data.seq_len > longest:
            faults.append(
                f"data.seq_len={config.data.seq_len}: the {name} has positions for {longest} tokens. "
                f"Use {longest} or less."
            )
        if model.config.vocab_size < tokenizer.vocabulary.size:
            faults.append(
                f"tokenizer {tokenizer.folder} has {tokenizer.vocabulary.size} tokens, the {name}'s vocabulary "
                f"{model.config.vocab_size}: it is not this model's tokenizer. Leave data.tokenizer out."
            )
    faults += kind_faults(config.loss, student, teacher.model if teacher else None) + _tokenizer_faults(built)
    if teacher is not None:
        ours, theirs = student.config, teacher.model.config
        if ours.vocab_size != theirs.vocab_size:
            faults.append(f"student's vocab_size {ours.vocab_size}, teacher's {theirs.vocab_size}: they must be equal.")
        if config.data.tokenizer and (other := _other_tokenizer(config, tokenizer)):
            faults.append(other)
        if ours.hidden_size != theirs.hidden_size and config.loss.cos:
            faults.append(
                f"student's hidden_size {ours.hidden_size}, teacher's {theirs.hidden_size}: loss.cos must be 0."
            )
        faults += relation_faults(config.loss, built.family, student, teacher)
    if faults:
        raise ConfigError("\n  ".join(faults))


def relation_faults(loss: LossConfig, family: Family, student: Any, teacher: Teacher) -> list[str]:
    """What is wrong where tokens' relations are to be learnt."""
    if not loss.relation:
        return []
    faults, layers = [], len(teacher.family.layers(teacher.model))
    if (loss.relation_layer or layers) > layers:
        faults.append(f"loss.relation_layer={loss.relation_layer}: the teacher has {layers} layers, counted from 1.")
    ours, theirs = student.config.hidden_size, teacher.model.config.hidden_size
    if ours % loss.relation_heads or theirs % loss.relation_heads:
        both = math.gcd(ours, theirs)
        most = max(heads for heads in range(1, min(loss.relation_heads, both) + 1) if both % heads == 0)
        faults.append(
            f"loss.relation_heads={loss.relation_heads}: the hidden sizes, student {ours} and teacher {theirs}, must "
            f"be multiples of it. Use {most}, say."
        )
    for model, its_family in ((student, family), (teacher.model, teacher.family)):
        try:
            its_family.projections(model, 0)
        except ConfigError as error:
            faults.append(str(error))
    return faults


def kind_faults(loss: LossConfig, student: Any, teacher: Any | None) -> list[str]:
    """What is wrong where causal models and encoders meet each other or the objective."""
    causal, kind, faults = family_of(student.config, where="student").causal, _kind(student), []
    if causal and loss.mlm:
        faults.append(
            f"loss.mlm={loss.mlm}: the student is {kind} and predicts the next word. Give loss.clm the weight, and "
            "loss.mlm 0."
        )
    if not causal and loss.clm:
        faults.append(
            f"loss.clm={loss.clm}: the student is {kind} and predicts masked words. Give loss.mlm the weight, and "
            "loss.clm 0."
        )
    if teacher is not None and family_of(teacher.config, where="teacher").causal != causal:
        faults.append(
            f"teacher.model: a {teacher.config.model_type}, and the student is {kind}: one predicts the next word, the "
            "other masked ones, and neither can teach the other. Use a recipe of the teacher's kind."
        )
    return faults


def _tokenizer_faults(built: Models) -> list[str]:
    """What is wrong where the tokenizer is not of the student's kind; of the teacher's it may be."""
    causal, tokenizer = built.family.causal, built.tokenizer
    if built.teacher is not None and built.teacher.family.causal != causal:
        return []
    if causal == tokenizer.vocabulary.is_causal:
        return []
    return [
        f"tokenizer {tokenizer.folder} has {'a' if causal else 'no'} mask token, and the student is "
        f"{_kind(built.student)}: it is not this model's tokenizer. Leave data.tokenizer out."
    ]


def _kind(model: Any) -> str:
    causal = family_of(model.config, where="student").causal
    return f"{'causal' if causal else 'an encoder'} ({model.config.model_type})"


def _other_tokenizer(config: Config, tokenizer: TextTokenizer) -> str | None:
    """What is wrong where data.tokenizer is not the teacher's own; a teacher may come without one."""
    assert config.teacher.model is not None
    try:
        own = TextTokenizer(config.teacher.model).vocabulary
    except ModelError:
        return None
    if own.fingerprint == tokenizer.vocabulary.fingerprint:
        return None
    return (
        f"data.tokenizer {tokenizer.folder} is not the tokenizer of teacher {config.teacher.model}: its words, ids or "
        "special tokens differ, and the teacher would read another text. Leave data.tokenizer out."
    )
