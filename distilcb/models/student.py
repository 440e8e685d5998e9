"""The student: half the layers, whatever it starts from, in fp32 (DeepSpeed casts it)."""

from typing import Any

import torch

from distilcb.config import StudentConfig
from distilcb.errors import ConfigError
from distilcb.models.families import FAMILIES, Family, family_of
from distilcb.models.layer_copy import copy_weights, source_layers_of
from distilcb.models.loading import load_config, load_language_model


def build_student(student: StudentConfig, *, teacher: Any | None, vocab_size: int, seed: int) -> tuple[Any, Family]:
    """A language model in fp32, and its family.

    Args:
        student: what to build and from what.
        teacher: the loaded teacher model, or None where there is none.
        vocab_size: of the tokenizer; a model with fewer entries is refused.
        seed: of random weights.

    Raises:
        ConfigError, ModelError: sizes that do not fit, a layer map out of range, an unreadable folder.
    """
    source = _source(student, teacher)
    template = _template(student, teacher, source)
    family = family_of(template, where="student")
    config = family.with_layers(template, _depth(student, teacher, source, template))
    if student.architecture is not None and student.architecture != config.model_type:
        family = _family_called(student.architecture)
        config = family.config_like(config)
    if student.dropout is not None:
        family.set_dropout(config, student.dropout)
    if config.vocab_size < vocab_size:
        raise ConfigError(
            f"student: vocab_size {config.vocab_size}, but the tokenizer has {vocab_size} tokens, so it is not "
            "this model's. Leave data.tokenizer out, or mend student.config."
        )
    model = _random_model(family, config, seed)
    if source is not None:
        source_family = family_of(source.config, where="student.init")
        alike = type(source_family) is type(family)
        _refuse_other_shape(source.config if alike else family.config_like(source.config), config)
        depths = (source.config.num_hidden_layers, config.num_hidden_layers)
        layers = source_layers_of(student.init_layers, *depths)
        copy_weights(source, source_family, model, family, layers)
    if student.freeze_position_embeddings:
        family.position_embeddings(model).weight.requires_grad_(False)
    return model, family


def _family_called(architecture: str) -> Family:
    if architecture not in FAMILIES:
        raise ConfigError(f"student.architecture={architecture!r} is none of {', '.join(FAMILIES)}.")
    return FAMILIES[architecture]


def _source(student: StudentConfig, teacher: Any | None) -> Any | None:
    if student.init == "random":
        return None
    if student.init == "teacher":
        return teacher
    return load_language_model(student.init, dtype=torch.float32)


def _template(student: StudentConfig, teacher: Any | None, source: Any | None) -> Any:
    if student.config:
        return load_config(student.config)
    model = source if source is not None else teacher
    assert model is not None  # recipe.py refuses a random student without teacher and student.config
    return model.config


def _depth(student: StudentConfig, teacher: Any | None, source: Any | None, template: Any) -> int:
    if student.num_layers is not None:
        return student.num_layers
    if isinstance(student.init_layers, tuple):
        return len(student.init_layers)
    if student.config or (source is not None and source is not teacher):
        return template.num_hidden_layers
    return max(1, template.num_hidden_layers // 2)


# Settings under which the same weights compute something else.
_SHAPE = (
    *("num_attention_heads", "pad_token_id", "tie_word_embeddings"),
    *("hidden_act", "activation", "activation_function", "layer_norm_eps", "layer_norm_epsilon"),
    *("sinusoidal_pos_embds", "scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)


def _refuse_other_shape(source: Any, config: Any) -> None:
    changed = [
        f"{name} {getattr(source, name, None)} -> {getattr(config, name, None)}"
        for name in _SHAPE
        if getattr(source, name, None) != getattr(config, name, None)
    ]
    if changed:
        raise ConfigError(
            f"student.config differs from the source of its weights: {', '.join(changed)}. Only depth and dropout "
            "may; give student.init random for another shape."
        )


def _random_model(family: Family, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.model_class().from_config(config, dtype=torch.float32)
