"""Tokenizers, read from folders, and what the data needs to know of them."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from distilcb.errors import ModelError, first_line
from distilcb.hub import model_folder

# Tokenized into the fingerprint, so that two tokenizers with one vocabulary but other rules are told apart.
_PROBE = "Où l'été naît-il ? À Noël, 1 234,50 € — «ÇA», co-\u00a0œuvre\u200b ﬁn x²!"

_TOKENIZER_FILES = (
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)

# A tokenizer needs a hundred times the memory of its text, so a line of 50 MB goes in parts, and not all at once.
_PIECE_CHARACTERS = 50_000
_BATCH_PIECES = 512

# Places that no text fills, in the vocabularies of CamemBERT ("<s>NOTUSED"), RoBERTa and BERT.
_UNUSED = re.compile(r".*NOTUSED|madeupword\d+|\[unused\w*\]")


@dataclass(frozen=True)
class Vocabulary:
    """The facts of a tokenizer that masking and packing use.

    special_ids: (n,) int64 of every special token, <unk> among them: never chosen, never drawn as a random word.
    word_start: (size,) bool, true for tokens that begin a word.
    fingerprint: equal for tokenizers that give equal ids.
    mask_id: what stands for a hidden word; None in a causal model's tokenizer.
    unk_id: what stands for text that no token spells, where there is such.
    """

    size: int
    bos_id: int
    eos_id: int
    mask_id: int | None
    special_ids: NDArray[np.int64]
    word_start: NDArray[np.bool_]
    fingerprint: str
    unk_id: int | None = None

    @property
    def is_causal(self) -> bool:
        """Whether it is a causal model's: blocks are then cut from the text as it goes on, and nothing is masked."""
        return self.mask_id is None


class TextTokenizer:
    """A Hugging Face tokenizer, read for packing text: no special tokens added, none taken from the text."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.hugging_face = load_tokenizer(folder)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What packing and masking use of it.

        Raises:
            ModelError: no separators.
        """
        tokenizer = self.hugging_face
        ids = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        if ids["bos"] is None:
            ids["bos"] = tokenizer.cls_token_id
        if ids["eos"] is None:
            ids["eos"] = tokenizer.sep_token_id
        missing = [name for name, value in ids.items() if value is None]
        if missing:
            raise ModelError(f"tokenizer {self.folder} has no {', '.join(missing)} token: blocks of text need one")
        pieces = tokenizer.get_vocab()
        size = max(pieces.values()) + 1
        unused = set(range(size)).difference(pieces.values())
        unused |= {index for piece, index in pieces.items() if _UNUSED.fullmatch(piece)}
        special = np.array(sorted(unused.union(tokenizer.all_special_ids)), dtype=np.int64)
        return Vocabulary(
            size=size,
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            mask_id=tokenizer.mask_token_id,
            special_ids=special,
            word_start=_word_starts(tokenizer, size),
            fingerprint=_fingerprint(tokenizer),
            unk_id=tokenizer.unk_token_id,
        )

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Token ids of each document, without separators; as `Encoder.encode`."""
        return self.encoder.encode(documents)

    @cached_property
    def encoder(self) -> "Encoder":
        """What turns text into ids, for other processes too."""
        tokenizer = self.hugging_face
        never = frozenset(self.vocabulary.special_ids.tolist()) - {tokenizer.unk_token_id}
        spelled = tuple(token for token in tokenizer.all_special_tokens if len(token) > 1)
        return Encoder(_without_transformers(tokenizer), never_text=never, spelled_tokens=spelled)

    def pieces(self, ids: list[int]) -> list[str]:
        """The tokens of these ids as the vocabulary spells them."""
        return list(map(str, self.hugging_face.convert_ids_to_tokens(ids)))


class Encoder:
    """Text to ids. It pickles, and where it does its work no transformers need be imported."""

    def __init__(self, tokenizer: Any, *, never_text: frozenset[int], spelled_tokens: tuple[str, ...]) -> None:
        """never_text: ids that are left out; spelled_tokens: words that are broken up in the text."""
        self.never_text, self.spelled_tokens = never_text, spelled_tokens
        self._first_signs = {token[0] for token in spelled_tokens}
        self._tokenizer = tokenizer

    def encode(self, documents: list[str]) -> list[list[int]]:
        """Token ids of each document, without separators.

        A special token that is spelled out in the text ("<mask>") is broken up, so that it stays text. One that the
        tokenizer's normaliser spells ("＜mask＞" in full-width signs) is left out.
        """
        ids: list[list[int]] = [[] for _ in documents]
        for owners, pieces in cut_batches(map(self.as_text, documents)):
            for number, found in zip(owners, self._ids(pieces), strict=True):
                ids[number] += found if self.never_text.isdisjoint(found) else self._ordinary(found)
        return ids

    def as_text(self, document: str) -> str:
        """The document with the special tokens that it spells broken up."""
        if not any(sign in document for sign in self._first_signs):
            return document
        for token in self.spelled_tokens:
            if token in document:
                document = document.replace(token, f"{token[0]} {token[1:]}")
        return document

    def _ids(self, pieces: list[str]) -> list[list[int]]:
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            return [each.ids for each in self._tokenizer.encode_batch_fast(pieces, add_special_tokens=False)]
        found: list[list[int]] = self._tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _ordinary(self, ids: list[int]) -> list[int]:
        return [each for each in ids if each not in self.never_text]


def _without_transformers(tokenizer: Any) -> Any:
    """The Rust tokenizer below, whatever it has been told to cut and fill; the tokenizer itself where there is none."""
    below = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(below, tokenizers.Tokenizer):
        return tokenizer
    own = tokenizers.Tokenizer.from_str(below.to_str())
    own.no_truncation()
    own.no_padding()
    return own


def cut_batches(documents: Iterable[str]) -> Iterator[tuple[list[int], list[str]]]:
    """The documents in pieces that a tokenizer has the memory for: (number of the document, piece) side by side."""
    owners: list[int] = []
    pieces: list[str] = []
    for number, document in enumerate(documents):
        for piece in cut_at_spaces(document, longest=_PIECE_CHARACTERS):
            owners.append(number)
            pieces.append(piece)
            if len(pieces) == _BATCH_PIECES:
                yield owners, pieces
                owners, pieces = [], []
    if pieces:
        yield owners, pieces


def cut_at_spaces(text: str, *, longest: int) -> Iterator[str]:
    """`text` in parts of at most `longest` characters, cut before a space where there is one."""
    start = 0
    while len(text) - start > longest:
        space = text.rfind(" ", start + 1, start + longest + 1)
        end = space if space > 0 else start + longest
        yield text[start:end]
        start = end
    yield text[start:]


def load_tokenizer(folder: str) -> Any:
    """The tokenizer of a model folder or hub name; code from the folder never runs.

    Raises:
        ModelError: nothing there that transformers can read.
    """
    from transformers import AutoTokenizer

    path = model_folder(folder, what="tokenizer", weights=False)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"tokenizer {folder} cannot be read: needed one of {', '.join(_TOKENIZER_FILES)} there.")
    try:
        return AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain Exceptions at a file that it cannot read
        raise ModelError(
            f"tokenizer {folder} cannot be read: {first_line(error)}. Needed: tokenizer.json or "
            "sentencepiece.bpe.model beside config.json."
        ) from error


def _word_starts(tokenizer: Any, size: int) -> NDArray[np.bool_]:
    """SentencePiece marks a word's first piece with U+2581, byte-level BPE with U+0120; WordPiece marks the others."""
    pieces = tokenizer.get_vocab()
    starts = np.zeros(size, dtype=bool)
    wordpiece = any(piece.startswith("##") for piece in pieces)
    for piece, index in pieces.items():
        starts[index] = not piece.startswith("##") if wordpiece else piece.startswith(("\u2581", "\u0120"))
    return starts


def _fingerprint(tokenizer: Any) -> str:
    # Not the serialised tokenizer: its form changes between versions of the library while its ids do not.
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": sorted(tokenizer.all_special_ids),
        "roles": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.mask_token_id],
        "probe": tokenizer(_PROBE, add_special_tokens=False, verbose=False)["input_ids"],
    }
    return hashlib.sha256(json.dumps(facts, ensure_ascii=False).encode()).hexdigest()
