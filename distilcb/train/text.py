"""A run's text: what its names stand for, prepared where it is not yet, and known to fit the tokenizer."""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilcb.config import DataConfig, cache_folder
from distilcb.data.blocks import Blocks, check_fits
from distilcb.data.corpus import find_sources
from distilcb.data.languages import LanguageBlocks, check_languages
from distilcb.data.prepare import prepare_cached, prepared_folder
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import DataError
from distilcb.launcher import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Text:
    """The blocks to train on, and those held out where there are any."""

    train: Blocks | LanguageBlocks
    heldout: Blocks | None

    @property
    def contents(self) -> dict[str, Any]:
        """What tells them from other text."""
        return {"train": self.train.content, "heldout": self.heldout.content if self.heldout else None}


def check_names(data: DataConfig, *, heldout: bool = True) -> None:
    """See that every name stands for something, which is told before a model is loaded.

    Args:
        heldout: those of data.heldout too.

    Raises:
        DataError: one that does not, or languages that share a file.
    """
    if data.language_exponent is not None:
        check_languages(data.train)
    elif not prepared_folder(data.train):
        find_sources(data.train)
    if heldout and not prepared_folder(data.heldout):
        find_sources(data.heldout)


def open_text(data: DataConfig, tokenizer: TextTokenizer, world: World) -> Text:
    """All the text of a run; as `open_training_text`."""
    train = open_training_text(data, tokenizer, world)
    heldout = _open_blocks(data, data.heldout, tokenizer, world) if data.heldout else None
    held_out = f"{len(heldout):,}" if heldout else "none"
    log.info("text: %s blocks of %d tokens to train on, %s held out", f"{len(train):,}", data.seq_len, held_out)
    return Text(train, heldout)


def open_training_text(data: DataConfig, tokenizer: TextTokenizer, world: World) -> Blocks | LanguageBlocks:
    """The blocks of data.train, prepared if they are not: one text, or a language a name.

    Raises:
        DataError: text that cannot be used, or two languages with the same one.
    """
    if data.language_exponent is None:
        return _open_blocks(data, data.train, tokenizer, world)
    parts = [_open_blocks(data, (name,), tokenizer, world) for name in data.train]
    (content, times), *_ = Counter(part.content for part in parts).most_common(1)
    if times > 1:
        alike = [name for name, part in zip(data.train, parts, strict=True) if part.content == content]
        raise DataError(
            f"data.train: {' and '.join(alike)} hold the same text. With data.language_exponent each name is a "
            "language of its own: name each text once."
        )
    languages = LanguageBlocks(parts, exponent=data.language_exponent)
    for name, part, share in zip(data.train, parts, languages.shares, strict=True):
        passes = share * len(languages) / len(part)
        log.info(
            "%s: %s blocks, %.2f%% of the samples, %.2f passes an epoch", name, f"{len(part):,}", 100 * share, passes
        )
    return languages


def _open_blocks(data: DataConfig, names: tuple[str, ...], tokenizer: TextTokenizer, world: World) -> Blocks:
    """The blocks that `names` stand for as one text."""
    folder = prepare_cached(
        names,
        tokenizer=tokenizer,
        cache=cache_folder(data),
        seq_len=data.seq_len,
        text_field=data.text_field,
        processes=len(os.sched_getaffinity(0)),  # the other ranks wait meanwhile
        show_progress=world.is_main,
    )
    blocks = Blocks(Path(folder))
    fingerprint = tokenizer.vocabulary.fingerprint
    check_fits(blocks, seq_len=data.seq_len, fingerprint=fingerprint, tokenizer=tokenizer.folder)
    return blocks
