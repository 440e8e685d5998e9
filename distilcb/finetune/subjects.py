"""What a model is fine-tuned on: a labelled task, or text whose next words it predicts."""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from transformers import DataCollatorForTokenClassification, DataCollatorWithPadding, default_data_collator

from distilcb.data.blocks import Blocks, BlockSource, check_fits
from distilcb.data.loader import fixed_heldout_batches
from distilcb.data.next_token import NextToken
from distilcb.data.prepare import prepare_cached
from distilcb.data.running_text import RunningText
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import ConfigError
from distilcb.eval.masked_lm import evaluate
from distilcb.finetune.models import load_for_task, tokenizer_for
from distilcb.finetune.training import TaskTrainer
from distilcb.models.families import family_of
from distilcb.tasks.declarations import Task
from distilcb.tasks.encoding import IGNORED, encode, gold, predictions
from distilcb.tasks.rows import TaskRows
from distilcb.tasks.scores import scores, subword_f1

log = logging.getLogger(__name__)

Figures = dict[str, float]
Collate = Callable[[list[Any]], dict[str, Any]]

_TOKENS_A_PASS = 8192
_TEXT_PARTS = 8


class Subject(Protocol):
    """What an arm of a comparison needs to know.

    Attributes:
        kind: a key of objective.OBJECTIVES.
        columns: names of its figures, the subject's own first.
        facts: what was read, for results.json.
        content: what tells these rows or this text from others.
        tokenizer: Hugging Face's, saved beside each model.
    """

    kind: str
    columns: tuple[str, ...]
    facts: dict[str, Any]
    content: str
    data: Any
    collate: Collate
    tokenizer: Any

    def load(self, name: str, *, fine_tuned: bool) -> Any:
        """A model with its head."""

    def measure(self, trainer: TaskTrainer, predicted: Path | None) -> Figures:
        """Held-out figures of the trainer's model; what it says of each row goes into the file `predicted`."""


class LabelledTask:
    """A task of distilcb/tasks."""

    def __init__(
        self,
        task: Task,
        source: str,
        model: str,
        *,
        max_length: int,
        stride: int,
        split: str | None,
        train_rows: int | None,
        heldout_only: bool = False,
    ) -> None:
        """Reads and encodes; raises DataError and ModelError for what cannot be used.

        heldout_only: no rows to train on, for a model that has learnt another task of the same labels.
        """
        rows = TaskRows(source)
        split = split or rows.heldout_split()
        self.task, self.tokenizer = task, tokenizer_for(model, task)
        self.kind: str = task.kind
        names = any(metric.startswith("entity") for metric in task.metrics)
        self.columns = (*task.metrics, "subword_f1") if names else task.metrics
        lengths = {"max_length": max_length, "stride": stride}
        # One row more tells whether there are others.
        read = [] if heldout_only else rows.read(task, "train", limit=train_rows and train_rows + 1)
        training = read[:train_rows]
        self.heldout = encode(rows.read(task, split), task, self.tokenizer, **lengths)
        self.training_rows, figures_of = training, {split: self.heldout.figures}
        self.content = _hash_of(json.dumps([training, self.heldout.rows], ensure_ascii=False).encode())
        self.facts = {"split": split, "max_length": max_length, "heldout": self.heldout.figures}
        self.facts["first_rows_only"] = len(training) < len(read)
        if training:
            encoded = encode(training, task, self.tokenizer, **lengths)
            self.data = encoded.features
            self.facts["train"] = figures_of["train"] = encoded.figures
        for name, figures in figures_of.items():
            log.info("%s: %s", name, ", ".join(f"{value:,} {key.replace('_', ' ')}" for key, value in figures.items()))
        tags = task.kind == "tagging"
        collator: Any = DataCollatorForTokenClassification if tags else DataCollatorWithPadding
        self.collate: Collate = collator(self.tokenizer)

    def load(self, name: str, *, fine_tuned: bool) -> Any:
        """A model with the task's head; raises ModelError as `load_for_task`."""
        return load_for_task(name, self.task, fine_tuned=fine_tuned)

    def measure(self, trainer: TaskTrainer, predicted: Path | None) -> Figures:
        """The task's metrics in hundredths on the held-out rows; a line of JSON a row goes into `predicted`.

        Entities are scored by sub-words too, as the published card does.
        """
        said = trainer.logits_of(self.heldout.features)
        given, right = predictions(self.task, self.heldout, said), gold(self.task, self.heldout.rows)
        if predicted is not None:
            predicted.write_text("".join(self._lines(given, right)), encoding="utf-8")
        figures = scores(self.task, right, given)
        if "subword_f1" in self.columns:
            figures["subword_f1"] = subword_f1(right, given, self.heldout.word_tokens)
        return figures

    def _lines(self, given: Sequence[Any], right: Sequence[Any]) -> Iterator[str]:
        for number, (one, other) in enumerate(zip(given, right, strict=True)):
            line = {"predicted": one, "right": other}
            if "subword_f1" in self.columns:
                line["tokens"] = self.heldout.word_tokens[number].tolist()
            yield json.dumps(line, ensure_ascii=False) + "\n"


class NextWords:
    """Text for a causal model: packed into blocks as for distillation, or cut into them as it runs."""

    kind: str = "causal"
    columns: tuple[str, ...] = ("perplexity", "loss")

    def __init__(
        self,
        text: Sequence[str],
        heldout: Sequence[str],
        model: str,
        *,
        max_length: int,
        cache: Path,
        as_it_runs: bool = False,
    ) -> None:
        """Prepares the text, once; raises DataError and ModelError for what cannot be used.

        as_it_runs: line ends too and without end-of-text tokens, as WikiText is trained and scored on.
        """
        words = TextTokenizer(model)
        if not words.vocabulary.is_causal:
            raise ConfigError(f"--task causal: the tokenizer of {model} has a mask token, so it is an encoder's.")
        self.tokenizer, self._vocabulary = words.hugging_face, words.vocabulary
        self.training, self.heldout = (
            RunningText(names, words, seq_len=max_length) if as_it_runs else packed(names, words, max_length, cache)
            for names in (text, heldout)
        )
        self.data = NextWordRows(self.training, NextToken(words.vocabulary, max_length))
        self.collate: Collate = default_data_collator
        counts = [blocks.token_counts.tobytes() for blocks in (self.training, self.heldout)]
        ends = [blocks.read(np.array([0, len(blocks) - 1])).tobytes() for blocks in (self.training, self.heldout)]
        self.content = _hash_of(b"".join(counts + ends))
        self.facts = {"max_length": max_length, "train": {"sequences": len(self.training)}} | {
            "heldout": {"sequences": len(self.heldout)}
        }

    def load(self, name: str, *, fine_tuned: bool) -> Any:
        """A causal language model; raises ModelError as `load_for_task`."""
        return load_for_task(name, None, fine_tuned=fine_tuned)

    def measure(self, trainer: TaskTrainer, predicted: Path | None) -> Figures:
        """Nats a held-out word in blocks, each read without what stands before it, and e to the power of that."""
        batches = fixed_heldout_batches(
            self.heldout, self._vocabulary, micro_batch=max(1, _TOKENS_A_PASS // self.heldout.seq_len)
        )
        model = trainer.trained
        family = family_of(model.config, where="model")
        device = trainer.args.device
        found = evaluate(model, None, family, batches, maskings=_TEXT_PARTS, device=device)["student"]
        return {"perplexity": found["perplexity"], "loss": found["clm_loss"]}


def _hash_of(data: bytes) -> str:
    return xxhash.xxh3_128(data).hexdigest()


def packed(names: Sequence[str], words: TextTokenizer, seq_len: int, cache: Path) -> Blocks:
    """The blocks of a text as distillation packs it, kept in the cache."""
    folder = prepare_cached(names, tokenizer=words, cache=cache, seq_len=seq_len, text_field="text")
    blocks = Blocks(folder)
    check_fits(blocks, seq_len=seq_len, fingerprint=words.vocabulary.fingerprint, tokenizer=words.folder)
    return blocks


class NextWordRows(torch.utils.data.Dataset[dict[str, Any]]):
    """Blocks with labels: a token's own id where the one before predicts it, else IGNORED."""

    def __init__(self, blocks: BlockSource, asked: NextToken) -> None:
        self.blocks, self.asked = blocks, asked

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """(tokens,) int64 each."""
        ids = self.blocks.read(np.array([number]))
        predicts = self.asked.has_label(ids)[0]
        labels = np.full_like(ids[0], IGNORED)
        labels[1:][predicts[:-1]] = ids[0, 1:][predicts[:-1]]
        return {"input_ids": ids[0], "labels": labels}
