"""What is peculiar to each architecture, in one place each; nothing else asks which model it holds.

A new architecture is a subclass of Family and a line in FAMILIES. A student may be of another architecture than the
model that it is copied from, where its family says how (`config_like`, `pairs`).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distilcb.errors import ConfigError, ModelError


class Family(ABC):
    """How to reach the parts of one architecture's language model with its head, teacher or student."""

    causal = False
    """whether it predicts the next token from those before; else masked ones from both sides"""

    def model_class(self) -> Any:
        """The class of transformers' that makes and reads its models."""
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

        return AutoModelForCausalLM if self.causal else AutoModelForMaskedLM

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

    def projections(self, model: Any, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        """What makes queries, keys and values in a layer, counted from 0; (blocks, tokens, hidden) each.

        Raises:
            ConfigError: they are not made apart.
        """
        raise ConfigError(f"loss.relation: no layer of a {model.config.model_type} makes them apart. Set it to 0.")

    def config_like(self, config: Any) -> Any:
        """A configuration of this architecture with the sizes of another one's.

        Raises:
            ConfigError: this architecture has no place for what that one computes.
        """
        raise ConfigError(f"student.architecture: a {config.model_type} teacher has no student of this kind.")

    def pairs(
        self, source: nn.Module, source_family: "Family", target: nn.Module, layers: Sequence[int]
    ) -> list[tuple[nn.Module, nn.Module]]:
        """(module of the source, module of this family's target) for all that is copied; their weights have one shape.

        layers: for each layer of the target the one of the source.
        """
        if type(source_family) is not type(self):
            raise ConfigError(f"student: nothing is known of how {type(self).__name__} follows from another kind.")
        own, others = self.layers(target), self.layers(source)
        beside = zip(self.beside_layers(source), self.beside_layers(target), strict=True)
        return [*beside, *((others[layer], own[i]) for i, layer in enumerate(layers))]

    def finish_copy(self, source: nn.Module, target: nn.Module) -> None:  # noqa: B027  (most need nothing)
        """What a student needs beyond the pairs."""

    def feed_forward_size(self, config: Any) -> int:
        """Units between a layer's two feed-forward products."""
        return config.intermediate_size

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
    """CamemBERT, RoBERTa and XLM-RoBERTa: one architecture under three names."""

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

    def projections(self, model: Any, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = model.roberta.encoder.layer[layer].attention.self
        return attention.query, attention.key, attention.value

    def beside_layers(self, model: Any) -> list[nn.Module]:
        return [model.roberta.embeddings, model.lm_head]

    def position_embeddings(self, model: Any) -> nn.Embedding:
        return model.roberta.embeddings.position_embeddings

    def max_seq_len(self, config: Any) -> int:
        return config.max_position_embeddings - config.pad_token_id - 1


class Bert(Family):
    """BERT: segment embeddings, of which text without pairs uses the first; the pooler and its task are not loaded."""

    def encode(self, model: Any, input_ids: Tensor) -> Tensor:
        return model.bert(input_ids).last_hidden_state

    def head_features(self, model: Any, hidden: Tensor) -> Tensor:
        return model.cls.predictions.transform(hidden)

    def decoder(self, model: Any) -> tuple[Tensor, Tensor | None]:
        return model.cls.predictions.decoder.weight, model.cls.predictions.decoder.bias

    def layers(self, model: Any) -> nn.ModuleList:
        return model.bert.encoder.layer

    def projections(self, model: Any, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = model.bert.encoder.layer[layer].attention.self
        return attention.query, attention.key, attention.value

    def beside_layers(self, model: Any) -> list[nn.Module]:
        return [model.bert.embeddings, model.cls]

    def position_embeddings(self, model: Any) -> nn.Embedding:
        return model.bert.embeddings.position_embeddings

    def max_seq_len(self, config: Any) -> int:
        return config.max_position_embeddings


class DistilBert(Family):
    """DistilBERT: BERT without segments and pooler, its modules under other names."""

    def encode(self, model: Any, input_ids: Tensor) -> Tensor:
        return model.distilbert(input_ids).last_hidden_state

    def head_features(self, model: Any, hidden: Tensor) -> Tensor:
        return model.vocab_layer_norm(model.activation(model.vocab_transform(hidden)))

    def decoder(self, model: Any) -> tuple[Tensor, Tensor | None]:
        return model.vocab_projector.weight, model.vocab_projector.bias

    def layers(self, model: Any) -> nn.ModuleList:
        return model.distilbert.transformer.layer

    def projections(self, model: Any, layer: int) -> tuple[nn.Module, nn.Module, nn.Module]:
        attention = model.distilbert.transformer.layer[layer].attention
        return attention.q_lin, attention.k_lin, attention.v_lin

    def beside_layers(self, model: Any) -> list[nn.Module]:
        return [model.distilbert.embeddings, model.vocab_transform, model.vocab_layer_norm, model.vocab_projector]

    def position_embeddings(self, model: Any) -> nn.Embedding:
        return model.distilbert.embeddings.position_embeddings

    def max_seq_len(self, config: Any) -> int:
        return config.max_position_embeddings

    def set_dropout(self, config: Any, dropout: float) -> None:
        config.dropout = config.attention_dropout = dropout

    def dropout(self, config: Any) -> float:
        return max(config.dropout, config.attention_dropout)

    def feed_forward_size(self, config: Any) -> int:
        return config.hidden_dim

    def config_like(self, config: Any) -> Any:
        """That of a DistilBERT with a BERT's sizes; ConfigError for any other teacher."""
        from transformers import DistilBertConfig

        if config.model_type != "bert":
            return super().config_like(config)
        if config.layer_norm_eps != _DISTILBERT_EPSILON:
            raise ConfigError(
                f"student.architecture: DistilBERT's layer norms have epsilon {_DISTILBERT_EPSILON}, the teacher's "
                f"{config.layer_norm_eps}: it would not compute the same. Leave student.architecture out."
            )
        return DistilBertConfig(
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            n_layers=config.num_hidden_layers,
            n_heads=config.num_attention_heads,
            dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            dropout=config.hidden_dropout_prob,
            attention_dropout=config.attention_probs_dropout_prob,
            activation=config.hidden_act,
            initializer_range=config.initializer_range,
            pad_token_id=config.pad_token_id,
            tie_word_embeddings=config.tie_word_embeddings,
        )

    def pairs(
        self, source: Any, source_family: Family, target: Any, layers: Sequence[int]
    ) -> list[tuple[nn.Module, nn.Module]]:
        """Of a BERT by its names and DistilBERT's; of another DistilBERT as usual."""
        if not isinstance(source_family, Bert):
            return super().pairs(source, source_family, target, layers)
        head, embeddings, own = source.cls.predictions, source.bert.embeddings, target.distilbert.embeddings
        found = [
            (embeddings.word_embeddings, own.word_embeddings),
            (embeddings.position_embeddings, own.position_embeddings),
            (embeddings.LayerNorm, own.LayerNorm),
            (head.transform.dense, target.vocab_transform),
            (head.transform.LayerNorm, target.vocab_layer_norm),
            (head.decoder, target.vocab_projector),
        ]
        for i, layer in enumerate(layers):
            theirs, ours = source.bert.encoder.layer[layer], self.layers(target)[i]
            found += [(theirs.get_submodule(name), ours.get_submodule(own)) for name, own in _DISTILBERT_NAMES.items()]
        return found

    def finish_copy(self, source: Any, target: Any) -> None:
        """The first segment's embedding goes into the positions, so that the embeddings are the teacher's exactly."""
        if hasattr(source, "bert"):
            segment = source.bert.embeddings.token_type_embeddings.weight[0].to(torch.float32)
            self.position_embeddings(target).weight.add_(segment)


class Gpt2(Family):
    """GPT-2: causal; the last layer norm's output counts as hidden states, and goes to the decoder as it is."""

    causal = True

    def encode(self, model: Any, input_ids: Tensor) -> Tensor:
        return model.transformer(input_ids, use_cache=False).last_hidden_state

    def head_features(self, model: Any, hidden: Tensor) -> Tensor:
        return hidden

    def decoder(self, model: Any) -> tuple[Tensor, Tensor | None]:
        return model.lm_head.weight, None

    def layers(self, model: Any) -> nn.ModuleList:
        return model.transformer.h

    def beside_layers(self, model: Any) -> list[nn.Module]:
        return [model.transformer.wte, model.transformer.wpe, model.transformer.ln_f, model.lm_head]

    def position_embeddings(self, model: Any) -> nn.Embedding:
        return model.transformer.wpe

    def max_seq_len(self, config: Any) -> int:
        return config.n_positions

    def with_layers(self, config: Any, num_layers: int) -> Any:
        if config.scale_attn_by_inverse_layer_idx and num_layers != config.num_hidden_layers:
            raise ConfigError(
                "this GPT-2 divides its attention by the layer's number (scale_attn_by_inverse_layer_idx), and a "
                "copied layer would have another one: no student of another depth can be made of it."
            )
        return super().with_layers(config, num_layers)

    def set_dropout(self, config: Any, dropout: float) -> None:
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = dropout

    def dropout(self, config: Any) -> float:
        return max(config.resid_pdrop, config.embd_pdrop, config.attn_pdrop)

    def feed_forward_size(self, config: Any) -> int:
        return config.n_inner or 4 * config.n_embd


_DISTILBERT_EPSILON = 1e-12

# BERT's names of what is in a layer, and DistilBERT's.
_DISTILBERT_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


FAMILIES: dict[str, Family] = {
    "camembert": Roberta(),
    "roberta": Roberta(),
    "xlm-roberta": Roberta(),
    "bert": Bert(),
    "distilbert": DistilBert(),
    "gpt2": Gpt2(),
}


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
