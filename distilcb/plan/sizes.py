"""Sizes of a run's teacher and student, from their configurations alone: no weights are read, none are made."""

from dataclasses import dataclass
from typing import Any

from distilcb.config import Config
from distilcb.errors import ConfigError, ModelError
from distilcb.hub import model_folder
from distilcb.models.families import Family, family_of
from distilcb.models.student import build_student
from distilcb.monitor.metrics import ModelShape, shape_of
from distilcb.train.models import kind_faults

# camembert-base as its config.json has it, for a machine that cannot reach the hub.
_KNOWN: dict[str, dict[str, Any]] = {
    "camembert-base": {
        "model_type": "camembert",
        "vocab_size": 32005,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "pad_token_id": 1,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
    }
}


@dataclass(frozen=True)
class ModelSizes:
    """One model. parameters: all; trained: those with a gradient; heads: of attention; dropout: the largest."""

    shape: ModelShape
    parameters: int
    trained: int
    heads: int
    dropout: float


@dataclass(frozen=True)
class Sizes:
    """teacher: None where there is none."""

    teacher: ModelSizes | None
    student: ModelSizes


def sizes_of(config: Config) -> Sizes:
    """Both models' sizes.

    Raises:
        ModelError: a model whose configuration cannot be read.
        ConfigError: settings of the student that do not fit, or an objective of the other kind.
    """
    import torch

    if config.student.init not in ("teacher", "random"):
        raise ConfigError(
            f"student.init {config.student.init}: a plan is made for students of a teacher, or random ones"
        )
    with torch.device("meta"):
        teacher = _empty(config.teacher.model) if config.teacher.model else None
        vocab = 1 if teacher is None else teacher.config.vocab_size
        student, family = build_student(config.student, teacher=teacher, vocab_size=vocab, seed=0)
    if faults := kind_faults(config.loss, student, teacher):
        raise ConfigError("\n  ".join(faults))
    taught_by = None if teacher is None else _sizes(teacher, family_of(teacher.config, where="teacher"))
    return Sizes(taught_by, _sizes(student, family))


def _empty(name: str) -> Any:
    """The model on torch's meta device."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(model_folder(name, weights=False)))
    except ModelError:
        known = _KNOWN.get(name.rpartition("/")[2])
        if known is None:
            raise
        config = AutoConfig.for_model(**known)
    except (OSError, ValueError) as error:
        raise ModelError(f"teacher {name}: its config.json cannot be read ({error}).") from error
    return family_of(config, where="teacher").model_class().from_config(config)


def _sizes(model: Any, family: Family) -> ModelSizes:
    weights = list(model.parameters())
    return ModelSizes(
        shape_of(model.config, feed_forward_size=family.feed_forward_size(model.config)),
        sum(weight.numel() for weight in weights),
        sum(weight.numel() for weight in weights if weight.requires_grad),
        model.config.num_attention_heads,
        family.dropout(model.config),
    )
