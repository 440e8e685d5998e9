"""Language models from folders and hub names: safetensors only, no remote code, no silent gaps."""

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import xxhash

from distilcb.errors import ModelError, first_line
from distilcb.hub import model_folder
from distilcb.models.families import family_of


def load_config(name: str) -> Any:
    """The transformers configuration of a model folder, a config.json or a hub name.

    Raises:
        ModelError: nothing there that transformers can read.
    """
    from transformers import AutoConfig

    path = model_folder(name, weights=False)
    try:
        if path.is_file():  # a bare config.json under any name
            facts = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**facts)
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"model {name} cannot be read: {first_line(error)}. Needed: a folder with config.json and "
            "model.safetensors."
        ) from error


def load_language_model(name: str, *, dtype: torch.dtype, allow_pickle: bool = False) -> Any:
    """A model with its vocabulary head, in `dtype` whatever it was saved in.

    Raises:
        ModelError: unreadable, pickled without leave, or weights that leave part of the model unset.
    """
    folder = model_folder(name, pickle=allow_pickle)
    if folder.is_file():
        raise ModelError(f"model {name} is a file. Needed: a folder with config.json and model.safetensors.")
    family = family_of(load_config(str(folder)), where=name)  # before gigabytes of weights are read
    model, missing = _read(family.model_class(), folder, name, dtype, allow_pickle=allow_pickle)
    if missing:
        raise ModelError(
            f"model {name} lacks {len(missing)} weights, first {missing[0]}: it has no vocabulary head, or another "
            f"layout. Give a model saved with its head ({'…LMHeadModel' if family.causal else '…ForMaskedLM'})."
        )
    return model


def load_any_model(name: str) -> Any:
    """A model in fp32 with whatever head its folder has: a language model's, or that of a task it was fine-tuned on.

    Raises:
        ModelError: unreadable, a head that transformers does not know, or weights that leave part of the model unset.
    """
    import transformers

    config = load_config(name)
    family_of(config, where=name)
    named = (config.architectures or ["none"])[0]
    model_class = getattr(transformers, named, None)
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        raise ModelError(
            f"model {name}: its config.json names the class {named}, which transformers does not have. Needed: "
            "'architectures' with one such as CamembertForMaskedLM."
        )
    model, missing = _read(model_class, model_folder(name), name, torch.float32)
    if missing:
        raise ModelError(f"model {name} lacks {len(missing)} weights of a {named}, first {missing[0]}.")
    return model


def _read(
    model_class: Any, folder: Path, name: str, dtype: torch.dtype, *, allow_pickle: bool = False
) -> tuple[Any, list[str]]:
    """The model of a folder, and the names of weights that were not there."""
    from safetensors import SafetensorError

    try:
        model, info = model_class.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=None if allow_pickle else True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise ModelError(
            f"model {name} cannot be read: {first_line(error)}. Needed: model.safetensors, undamaged. A pickled "
            "pytorch_model.bin is read for a teacher only, with --teacher.allow_pickle true: trust its author."
        ) from error
    return model, sorted(info["missing_keys"])


def hash_weights(model: torch.nn.Module) -> str:
    """A hash of all weights of a model on the CPU: what it is, wherever it lies."""
    digest = xxhash.xxh3_128()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
