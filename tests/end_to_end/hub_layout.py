"""A folder laid out as camembert-base lies on the hub, with random weights of its true size.

Older than today's transformers: LayerNorm.gamma and .beta, a pooler, a buffer of position ids, the output bias under
lm_head.bias alone; SentencePiece's own file, with or without tokenizer.json; weights as safetensors or pickled.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_model

from distilcb.config import DEFAULT_RECIPE

VOCABULARY = 32_005
CONFIG = {
    "architectures": ["CamembertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "bos_token_id": 5,
    "eos_token_id": 6,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "model_type": "camembert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "output_past": True,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": VOCABULARY,
}
_MINI_TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"


def write_camembert_base(folder: Path, *, pickled: bool = False) -> dict[str, torch.Tensor]:
    """Make the folder; returns its weights under the names that they have there."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    weights = _weights()
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_sentencepiece(folder / "sentencepiece.bpe.model", pieces=VOCABULARY - 5)
    return weights


def write_sentencepiece(path: Path, *, pieces: int) -> None:
    """The mini teacher's SentencePiece model, filled up with words that no text holds."""
    model = sentencepiece_model.ModelProto()
    model.ParseFromString((_MINI_TEACHER / "sentencepiece.bpe.model").read_bytes())
    lowest = min(piece.score for piece in model.pieces)
    for number in range(len(model.pieces), pieces):
        model.pieces.add(piece=f"\u2581qqq{number}", score=lowest - 1)
    path.write_bytes(model.SerializeToString())


def _weights() -> dict[str, torch.Tensor]:
    hidden, intermediate = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {
        "roberta.embeddings.word_embeddings.weight": (VOCABULARY, hidden),
        "roberta.embeddings.position_embeddings.weight": (CONFIG["max_position_embeddings"], hidden),
        "roberta.embeddings.token_type_embeddings.weight": (1, hidden),
        **_norm("roberta.embeddings.LayerNorm", hidden),
        **_linear("roberta.pooler.dense", hidden, hidden),
        "lm_head.bias": (VOCABULARY,),
        **_linear("lm_head.dense", hidden, hidden),
        "lm_head.layer_norm.weight": (hidden,),
        "lm_head.layer_norm.bias": (hidden,),
        "lm_head.decoder.weight": (VOCABULARY, hidden),
    }
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"roberta.encoder.layer.{number}"
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{layer}.attention.self.{name}", hidden, hidden)
        shapes |= _linear(f"{layer}.attention.output.dense", hidden, hidden)
        shapes |= _norm(f"{layer}.attention.output.LayerNorm", hidden)
        shapes |= _linear(f"{layer}.intermediate.dense", hidden, intermediate)
        shapes |= _linear(f"{layer}.output.dense", intermediate, hidden)
        shapes |= _norm(f"{layer}.output.LayerNorm", hidden)
    generator = torch.Generator().manual_seed(0)
    weights = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    weights["lm_head.decoder.weight"] = weights["roberta.embeddings.word_embeddings.weight"].clone()
    weights["roberta.embeddings.position_ids"] = torch.arange(CONFIG["max_position_embeddings"])[None]
    return weights


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """As a model begins: matrices with a standard deviation of 0.02, layer norms and biases at 1 and 0."""
    if len(shape) > 1:
        return torch.empty(shape).normal_(std=CONFIG["initializer_range"], generator=generator)
    return torch.ones(shape) if name.endswith(("gamma", "norm.weight")) else torch.zeros(shape)


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.gamma": (size,), f"{name}.beta": (size,)}
