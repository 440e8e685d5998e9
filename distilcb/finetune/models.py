"""Models with a task's head, which is new in a student and has learnt the task in a teacher; their tokenizers."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
import xxhash
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from distilcb.data.tokenizer import TextTokenizer, load_tokenizer
from distilcb.errors import ConfigError, ModelError, first_line
from distilcb.hub import model_folder
from distilcb.models.families import family_of
from distilcb.models.loading import load_config, load_language_model
from distilcb.tasks.declarations import Task

log = logging.getLogger(__name__)

# Beside weights and tokenizer*.json, *.model: what decides what a model computes.
_DECIDING = ("config.json", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json")

_CLASSES = {
    "question_answering": transformers.AutoModelForQuestionAnswering,
    "classification": transformers.AutoModelForSequenceClassification,
    "regression": transformers.AutoModelForSequenceClassification,
    "tagging": transformers.AutoModelForTokenClassification,
}


def load_for_task(name: str, task: Task | None, *, fine_tuned: bool) -> Any:
    """A model in fp32 with the head of the task; of none, a causal language model.

    Args:
        fine_tuned: whether the head must be there, for the task's labels in their order; else it is new, with random
            weights of torch's generator.

    Raises:
        ModelError: unreadable, a causal model for a task or the other way round, weights or labels that are missing.
    """
    config = load_config(name)
    family = family_of(config, where=name)
    if family.causal != (task is None):
        came = "predicts the next word" if family.causal else "is an encoder"
        raise ModelError(
            f"model {name} ({config.model_type}) {came}: {'--task causal needs' if task is None else 'a task needs'} "
            f"{'a causal model, such as gpt2' if task is None else 'an encoder, such as camembert-base'}."
        )
    if task is None:
        return load_language_model(name, dtype=torch.float32)
    if fine_tuned:
        _check_labels(config, task, name)
    return _load(name, task, fine_tuned=fine_tuned)


def _load(name: str, task: Task, *, fine_tuned: bool) -> Any:
    labels = {} if fine_tuned else _labels_of_head(task)
    folder = str(model_folder(name))
    try:
        with _without_load_report():
            model, info = _CLASSES[task.kind].from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **labels,
            )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError) as error:
        raise ModelError(
            f"model {name} cannot be read for task {task.name}: {first_line(error)}. Needed: a folder with config.json "
            "and model.safetensors."
        ) from error
    missing = sorted(info["missing_keys"])
    body = [key for key in missing if key.startswith(f"{model.base_model_prefix}.") and ".pooler." not in key]
    if fine_tuned and missing:
        raise ModelError(
            f"teacher {name} lacks {len(missing)} weights, first {missing[0]}: it has not been fine-tuned on a task of "
            f"this kind. Give one that has, or name the model as --teacher_base to have it fine-tuned here."
        )
    if body:
        raise ModelError(f"model {name} lacks {len(body)} weights below its head, first {body[0]}.")
    return model


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of every new head, which here is as it should be; what is missing else is told as an error."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _labels_of_head(task: Task) -> dict[str, Any]:
    if task.labels:
        return {
            "num_labels": len(task.labels),
            "id2label": dict(enumerate(task.labels)),
            "label2id": {label: number for number, label in enumerate(task.labels)},
        }
    # Set, as what it was pre-trained for may have left another number.
    return {"num_labels": 2} if task.kind == "question_answering" else {"num_labels": 1, "problem_type": "regression"}


def _check_labels(config: Any, task: Task, name: str) -> None:
    found = [config.id2label[number] for number in sorted(config.id2label)]
    if not task.labels:
        needed = 2 if task.kind == "question_answering" else 1
        if len(found) != needed:
            raise ModelError(
                f"teacher {name} has {len(found)} outputs, task {task.name} needs {needed}. Give one that has been "
                "fine-tuned on it, or name the model as --teacher_base to have it fine-tuned here."
            )
        return
    unnamed = [f"LABEL_{number}" for number in range(len(task.labels))]
    if found == unnamed:
        log.warning("teacher %s does not name its labels: taken for %s", name, ", ".join(task.labels))
    elif found != list(task.labels):
        raise ModelError(
            f"teacher {name} has the labels {', '.join(found)}; task {task.name} has {', '.join(task.labels)}. They "
            "must be the same in the same order: fine-tune the teacher on this task (--teacher_base)."
        )


def tokenizer_for(name: str, task: Task) -> Any:
    """The Hugging Face tokenizer of a model, ready for the task.

    Raises:
        ModelError: none of those that know which characters a token stands for.
    """
    tokenizer = load_tokenizer(name)
    if not tokenizer.is_fast:
        raise ModelError(f"tokenizer {name} does not say which characters a token stands for. Needed: tokenizer.json.")
    if task.kind == "tagging" and getattr(tokenizer, "add_prefix_space", None) is False:
        # A byte-level one takes a word by itself for the end of another.
        folder = str(model_folder(name, weights=False))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, add_prefix_space=True)
    within = _pieces(tokenizer, " a chat")
    if task.kind == "tagging" and within[0].startswith("\u0120") and within != _pieces(tokenizer, ["a", "chat"]):
        raise ModelError(
            f"tokenizer {name} ({type(tokenizer).__name__}) takes a word by itself for another than in a text, so "
            "words cannot be tagged. Set its tokenizer_class in tokenizer_config.json, such as RobertaTokenizer."
        )
    return tokenizer


def _pieces(tokenizer: Any, text: str | list[str]) -> list[str]:
    ids = tokenizer(text, is_split_into_words=isinstance(text, list), add_special_tokens=False)["input_ids"]
    return tokenizer.convert_ids_to_tokens(ids)


def content_of(name: str) -> str:
    """A hash of a model's configuration, weights and tokenizer, as they lie in its folder."""
    digest = xxhash.xxh3_128()
    folder = model_folder(name)
    for path in sorted(
        path
        for path in folder.iterdir()
        if path.name in _DECIDING or path.suffix in (".safetensors", ".model") or path.name.startswith("tokenizer")
    ):
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            while part := stream.read(1 << 24):
                digest.update(part)
    return digest.hexdigest()


def check_same_tokenizer(student: str, teacher: str) -> None:
    """Raise ConfigError where teacher and student would read other tokens."""
    one, other = (TextTokenizer(name).vocabulary.fingerprint for name in (student, teacher))
    if one != other:
        raise ConfigError(
            f"teacher {teacher} has another tokenizer than student {student}: its targets are of other tokens. Take a "
            "teacher and a student of one vocabulary; without a teacher the student is fine-tuned on labels alone."
        )


def longest_sequence(names: list[str], asked: int) -> int:
    """Tokens of a sequence: what was asked for, or as many as every model has positions for."""
    configs = {name: load_config(name) for name in names}
    longest = min([asked, *(family_of(config, where=name).max_seq_len(config) for name, config in configs.items())])
    if longest < asked:
        log.info("sequences are cut to %d tokens in place of %d: the models have no more positions", longest, asked)
    return longest
