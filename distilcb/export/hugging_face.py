"""A run's checkpoint -> a Hugging Face folder, loaded back to prove that it works."""

import copy
import os
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from distilcb.errors import CheckpointError, writing
from distilcb.export.model_card import CardFacts, model_card
from distilcb.models.families import family_of

# StepModule's attribute, and so the prefix of the student's weights in a checkpoint.
_PREFIX = "student."


def save_recipe_of_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Keep the configuration and tokenizer that turn a checkpoint of this model into a folder; once, whole or not."""
    if (folder / "config.json").exists():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with_tokenizer_ids(model.config, tokenizer).save_pretrained(temporary)
    with_longest_text(tokenizer, model.config).save_pretrained(temporary)
    temporary.rename(folder)


def with_longest_text(tokenizer: Any, config: Any) -> Any:
    """A copy that cuts text where the model's positions end; the shipped one's length is "no limit"."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = family_of(config, where="model").max_seq_len(config)
    return tokenizer


def with_tokenizer_ids(config: Any, tokenizer: Any) -> Any:
    """A copy of the configuration with the tokenizer's bos and eos (the published DistilCamemBERT's are wrong).

    The pad id stays: RoBERTa counts positions from it, so it belongs to the weights.
    """
    config = copy.deepcopy(config)
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(config, name, getattr(tokenizer, name))
    return config


def export_checkpoint(checkpoint: Path, model_folder: Path, output: Path, facts: CardFacts) -> Path:
    """Write config, fp32 safetensors, tokenizer and model card to `output`, whole or not at all.

    Args:
        checkpoint: a step_* folder.
        model_folder: what `save_recipe_of_model` kept.
        output: the folder to write; one that is there is replaced.
        facts: for the model card.

    Raises:
        CheckpointError: weights that are missing, or an export that does not give the same logits back.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = family_of(config, where=str(model_folder)).model_class().from_config(config, dtype=torch.float32).eval()
    _load_weights(model, _fp32_weights(checkpoint), checkpoint)
    return write_model(output, model, tokenizer, facts)


def write_model(output: Path, model: Any, tokenizer: Any, facts: CardFacts) -> Path:
    """Write a model in fp32, its tokenizer and a card to `output`, whole or not at all; see `export_checkpoint`."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # a run has one of its own
    card = model_card(model.config, facts, tokenizer.mask_token)
    with writing(output, CheckpointError, "Name a folder that can be written to."):
        _write_folder(output, model, tokenizer, card)
    return output


def _write_folder(output: Path, model: Any, tokenizer: Any, card: str) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        temporary.chmod(0o755)
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        prove(temporary, model)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors makes files that only their owner can read
        old = temporary.with_suffix(".old")
        if output.exists():
            output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@torch.no_grad()
def prove(folder: Path, model: Any) -> None:
    """Raise CheckpointError unless the folder, loaded back, gives the model's logits."""
    from transformers import AutoTokenizer

    config = model.config
    family = family_of(config, where=str(folder))
    again = family.model_class().from_pretrained(folder, dtype=torch.float32).eval()
    AutoTokenizer.from_pretrained(folder)
    longest = family.max_seq_len(config)  # every position takes part
    ids = torch.randint(config.vocab_size, (1, longest), generator=torch.Generator().manual_seed(0))
    if config.pad_token_id is not None:
        ids[ids == config.pad_token_id] = (config.pad_token_id + 1) % config.vocab_size
    difference = (again(ids).logits - model(ids).logits).abs().max().item()
    if not difference <= 1e-5:
        raise CheckpointError(f"{folder}: loaded back, its logits differ by {difference:.3g} from the model's.")


def _fp32_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    try:
        with (
            open(os.devnull, "w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):  # it prints
            weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    except (OSError, ValueError, KeyError, FileNotFoundError) as error:
        raise CheckpointError(f"{checkpoint} cannot be read as a DeepSpeed checkpoint: {error}") from error
    return {n.removeprefix(_PREFIX): w.float() for n, w in weights.items() if n.startswith(_PREFIX)}


def _load_weights(model: Any, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    tied = set(model._tied_weights_keys or ())
    lacking = [name for name in missing if name not in tied and not name.endswith("position_ids")]
    if lacking or unexpected:
        raise CheckpointError(f"{checkpoint}: weights missing {lacking[:3]}, not known {unexpected[:3]}.")
