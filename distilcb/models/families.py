"""What is peculiar to each architecture, in one place each; nothing else asks which model it holds.

A new architecture is a subclass of Family and a line in FAMILIES.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from distilcb.errors import ModelError


class Family(ABC):
    """How to reach the parts of one architecture's masked language model, teacher or student."""

    @abstractmethod
    def encode(self, model: nn.Module, input_ids: Tensor) -> Tensor:
        """(blocks, tokens, hidden) last hidden states of full blocks, (blocks, tokens) int64."""

    @abstractmethod
    def head_features(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """(rows, hidden) what stands before the decoder, from (rows, hidden) last hidden states."""

    @abstractmethod
    def decoder(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight (vocab, hidden) and bias (vocab,) or None of the vocabulary head."""

    @abstractmethod
    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The transformer layers, first to last."""

    @abstractmethod
    def beside_layers(self, model: nn.Module) -> list[nn.Module]:
        """Everything that is not a transformer layer: embeddings and head, in a fixed order."""

    @abstractmethod
    def position_embeddings(self, model: nn.Module) -> nn.Embedding:
        """The learned positions."""

    @abstractmethod
    def max_seq_len(self, config: Any) -> int:
        """The longest block that the positions allow."""

    def with_layers(self, config: Any, num_layers: int) -> Any:
        """A copy of a model's configuration with another depth."""
        copied = type(config).from_dict(config.to_dict())
        copied.num_hidden_layers = num_layers
        return copied

    def set_dropout(self, config: Any, dropout: float) -> None:
        """Set dropout of hidden states and attention in a configuration."""
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout

    def dropout(self, config: Any) -> float:
        """The largest dropout that a model of this configuration uses while training."""
        return max(config.hidden_dropout_prob, config.attention_probs_dropout_prob)


class Roberta(Family):
    """CamemBERT and RoBERTa: one architecture under two names."""

    def encode(self, model: Any, input_ids: Tensor) -> Tensor:
        # Blocks hold no padding, so positions need not be counted from the ids, and attention needs no mask.
        first = model.config.pad_token_id + 1
        positions = torch.arange(first, first + input_ids.shape[1], device=input_ids.device)
        return model.roberta(input_ids, position_ids=positions.expand_as(input_ids)).last_hidden_state

    def head_features(self, model: Any, hidden: Tensor) -> Tensor:
        head = model.lm_head
        return head.layer_norm(nn.functional.gelu(head.dense(hidden)))

    def decoder(self, model: Any) -> tuple[Tensor, Tensor | None]:
        return model.lm_head.decoder.weight, model.lm_head.decoder.bias

    def layers(self, model: Any) -> nn.ModuleList:
        return model.roberta.encoder.layer

    def beside_layers(self, model: Any) -> list[nn.Module]:
        return [model.roberta.embeddings, model.lm_head]

    def position_embeddings(self, model: Any) -> nn.Embedding:
        return model.roberta.embeddings.position_embeddings

    def max_seq_len(self, config: Any) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1


FAMILIES: dict[str, Family] = {"camembert": Roberta(), "roberta": Roberta()}


def family_of(config: Any, *, where: str) -> Family:
    """The family of a model's configuration.

    Raises:
        ModelError: an architecture that is not supported; names those that are.
    """
    family = FAMILIES.get(getattr(config, "model_type", ""))
    if family is None:
        raise ModelError(
            f"{where}: model_type '{getattr(config, 'model_type', None)}' is not supported. Supported: "
            f"{', '.join(FAMILIES)}. distilcb/models/families.py is where another is added."
        )
    return family
