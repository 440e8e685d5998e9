"""SentencePiece models through SentencePiece's own library: the Hugging Face tokenizer's ids in a fraction of its time.

The Hugging Face tokenizer looks for the best pieces of a word, the library for those of the whole text, in fp32: over
49,000 characters its sums are so coarse that a tenth of French documents came out otherwise. So it gets its text in
short pieces, cut at spaces, which no token crosses. Then the ids are the same but for these cases, which go to the
Hugging Face tokenizer:

- Words of more characters than a short piece.
- Ties. "...." is "." and "...", or "..." and "."; both score the same, and the two libraries choose differently. Such
  pieces are powers of one unit, so a tie shows as two different ones side by side. Of 38,536 French documents 541 have
  such a pair, and 4 are really cut in another way.
- Special tokens that the normaliser spells: the Hugging Face tokenizer finds "<mask>" in full-width signs.
- Signs with a combining one behind them ("ⁿ" with an accent): the Hugging Face tokenizer loses the accent, and leaves
  Hangul in the parts of its syllables.

A tokenizer that takes added words from the text as they stand ("<PERSONNE>") is left to Hugging Face altogether.

A sample of each corpus is compared before the library is relied on; that nothing else differs is not proven.
"""

import functools
import itertools
import logging
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distilcb.data.damage import Damage, clean
from distilcb.data.tokenizer import Encoder, TextTokenizer, cut_batches
from distilcb.hub import model_folder

log = logging.getLogger(__name__)

# Of 104 MB of French, ids differed in pieces of 8,000 characters and in none of 2,000.
_SHORT_CHARACTERS = 1000

_MODELS = ("sentencepiece.bpe.model", "spiece.model", "spm.model", "tokenizer.model")

# None of the characters before it joins the one before, and most of French text are.
_FIRST_JOINING = 0x300

# Of those that SentencePiece joins; Python's tables may be older.
_MARKS_OF_UNICODE_16 = (0x113B8, 0x113BB, 0x113C2, 0x113C9, 0x1611E, 0x1611F, 0x16120, 0x16129, 0x16D67)

_ODD = (
    "",
    "deux  espaces ,  trois   encore",
    "une\u00a0insécable, une fine\u202f: et un tiret\u2011là",
    "un smiley 😀, une famille 👩‍👩‍👧 et un drapeau 🇫🇷",
    "des\x01signes\x00de\x1fcontrôle\x7f et \x85 la suite",
    "<mask> </s><s> un<pad>deux <unk> <s>NOTUSED ＜mask＞ <ma\u200bsk>",
    "fin de ligne\r\net retour\rsuite\ttabulation\u2028séparateur\u2029",
    "largeur\u200bnulle, \u200d\u200c, \ufeffmarque et tiret\u00adconditionnel",
    "anticonstitutionnellement" * 200,
    "Les ouvriers mangeaient, l'été, à 12 h 30 : « Où va-t-il ? »; " * 100,
    "aaaaaaaaaaaa lllll 0000000 1000000 ........ ------- ______ hahahaha www…. !!!!",
    "e\u0301te\u0301, ﬁn, ½, x², Ⅻ, №, ㎏, ＡＢＣ, ｶﾅ",
    "漢字 и кириллица, עברית, العربية, हिन्दी, 한국어",
    unicodedata.normalize("NFD", "한국어 받침 값") + " ㄱㅏ ﾡￂ",
    "▁ souligné▁dedans \ufffd https://exemple.fr/a?b=c&d=é#f l'été, aujourd'hui; 1 234,50 €",
)


class SentencePieceEncoder:
    """Text to ids through the sentencepiece library. It pickles."""

    def __init__(self, model: Path, tokenizer: TextTokenizer, *, threads: int = 1) -> None:
        """Raises ValueError where the model has pieces that the tokenizer has not, or the tokenizer added words."""
        self.model, self.threads = str(model), threads
        self.by_hugging_face = tokenizer.encoder
        if added := _added_words(tokenizer):
            raise ValueError(f"it does not know words that were added to the tokenizer, such as {added[0]!r}")
        self._ids = _ids_of_pieces(self._library, tokenizer)
        self._units = _units(self._library)
        self._leads = _leads(self._library, tokenizer.encoder)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_library"}

    @functools.cached_property
    def _library(self) -> Any:
        from sentencepiece import SentencePieceProcessor

        return SentencePieceProcessor(model_file=self.model)

    def encode_flat(self, documents: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """All token ids in one row, and how many of them each document has."""
        lengths = np.zeros(len(documents), dtype=np.int64)
        rows: list[NDArray[np.int64]] = []
        for owners, pieces in cut_batches(map(self.by_hugging_face.as_text, documents)):
            short = [list(cut_only_at_spaces(piece, longest=_SHORT_CHARACTERS)) for piece in pieces]
            ids, counts = self._encode_pieces(list(itertools.chain.from_iterable(short)))
            rows.append(ids)
            np.add.at(lengths, np.repeat(owners, list(map(len, short))), counts)
        return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64), lengths

    def _encode_pieces(self, pieces: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids, counts = flatten(self._library.encode(pieces, num_threads=self.threads))
        other = self._with_ties(ids, counts)
        other |= self._not_for_library(pieces)
        ids = self._ids[ids]
        if other:
            rows = np.split(ids, np.cumsum(counts)[:-1])
            numbers = sorted(other)
            encoded = self.by_hugging_face.encode([pieces[number] for number in numbers])
            for number, row in zip(numbers, encoded, strict=True):
                rows[number], counts[number] = np.array(row, dtype=np.int64), len(row)
            ids = np.concatenate(rows)
        return ids, counts

    def _not_for_library(self, pieces: list[str]) -> set[int]:
        """The numbers of pieces that Hugging Face reads otherwise, or too long for it to be known."""
        together = "\n".join(pieces)  # a third of the time of looking at each; most have nothing of the kind
        checks = [_joins] if _joins(together) else []
        if any(lead in together for lead in self._leads):
            checks.append(self._spells_special)
        return {
            number
            for number, piece in enumerate(pieces)
            if len(piece) > _SHORT_CHARACTERS or any(check(piece) for check in checks)
        }

    def _with_ties(self, ids: NDArray[np.int64], counts: NDArray[np.int64]) -> set[int]:
        """The numbers of pieces with two different powers of one unit side by side."""
        units = self._units[ids]
        pairs = np.flatnonzero((units[1:] == units[:-1]) & (units[1:] != 0) & (ids[1:] != ids[:-1]))
        return set(np.searchsorted(np.cumsum(counts), pairs, side="right").tolist())

    def _spells_special(self, text: str) -> bool:
        """Whether a special token is there once the library has normalised it."""
        if not any(lead in text for lead in self._leads):
            return False
        normal = self._library.normalize(text)
        return any(token in normal for token in self.by_hugging_face.spelled_tokens)


def faster_encoder(tokenizer: TextTokenizer, sample: Iterable[str], *, threads: int = 1) -> SentencePieceEncoder | None:
    """SentencePiece's own library for this tokenizer, where there is a model and all ids of the sample are equal."""
    folder = model_folder(tokenizer.folder, what="tokenizer", weights=False)
    model = next((folder / name for name in _MODELS if (folder / name).is_file()), None)
    if model is None:
        return None
    try:
        encoder = SentencePieceEncoder(model, tokenizer, threads=threads)
        odd = [clean(text, Damage()) for text in _ODD]
        differing = first_difference(encoder, [*odd, *sample])
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        log.info("tokenizing with the Hugging Face tokenizer: %s is of no use (%s)", model, error)
        return None
    if differing is not None:
        log.info(
            "tokenizing with the Hugging Face tokenizer: sentencepiece gives other ids for %r",
            differing if len(differing) < 80 else f"{differing[:80]}…",
        )
        return None
    log.info("tokenizing with sentencepiece's library: on a sample its ids are those of the Hugging Face tokenizer")
    return encoder


def cut_only_at_spaces(text: str, *, longest: int) -> Iterator[str]:
    """`text` in parts of at most `longest` characters, or of one longer word, cut before a space."""
    start = 0
    while len(text) - start > longest:
        end = text.rfind(" ", start + 1, start + longest + 1)
        if end < 0:
            end = text.find(" ", start + longest + 1)
        if end < 0:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def first_difference(encoder: SentencePieceEncoder, documents: list[str]) -> str | None:
    """The first document to which the Hugging Face tokenizer gives other ids."""
    ids, counts = encoder.encode_flat(documents)
    rows = np.split(ids, np.cumsum(counts)[:-1])
    for document, row, expected in zip(documents, rows, encoder.by_hugging_face.encode(documents), strict=True):
        if row.tolist() != expected:
            return document
    return None


def flatten(rows: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All numbers in one row, and how many each row had."""
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    return np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(counts.sum())), counts


def _joins(text: str) -> bool:
    """Whether a character of the text joins the one before, as accents of their own do."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return bool(_is_joining()[codes[codes >= _FIRST_JOINING]].any())


@functools.cache
def _is_joining() -> NDArray[np.bool_]:
    """(code points,) which characters join the one before."""
    table = np.zeros(sys.maxunicode + 1, dtype=bool)
    table[[ord(character) for character in _joining_characters()]] = True
    return table


@functools.cache
def _joining_characters() -> frozenset[str]:
    """What Unicode's rules for what one sees as a character (UAX 29) join to the one before."""
    marks = {chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) in ("Mn", "Me", "Mc")}
    modifiers = {chr(code) for code in (*range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))}
    hangul = {chr(code) for code in (*range(0x1160, 0x1200), *range(0xD7B0, 0xD7FC))}
    # By UAX 29 these stand alone; but SentencePiece makes syllables of them.
    hangul |= {chr(code) for code in (*range(0x314F, 0x3164), *range(0xFFC2, 0xFFDD))}
    newer = {chr(code) for code in _MARKS_OF_UNICODE_16}
    return frozenset(marks | modifiers | hangul | newer | set("\u200c\u200d\uff9e\uff9f\u0e33\u0eb3"))


def _added_words(tokenizer: TextTokenizer) -> list[str]:
    """The added tokens that are taken from the text: those that hold no special one, which is broken up there."""
    return [word for word in tokenizer.hugging_face.get_added_vocab() if tokenizer.encoder.as_text(word) == word]


def _ids_of_pieces(library: Any, tokenizer: TextTokenizer) -> NDArray[np.int64]:
    """(pieces,) the tokenizer's id of each of the model's pieces."""
    vocabulary = tokenizer.hugging_face.get_vocab()
    ids = np.zeros(library.get_piece_size(), dtype=np.int64)
    for number in range(ids.size):
        piece = library.id_to_piece(number)
        if library.is_control(number) or library.is_unused(number):
            continue  # no text gives these
        own = tokenizer.hugging_face.unk_token_id if library.is_unknown(number) else vocabulary.get(piece)
        if own is None:
            raise ValueError(f"the tokenizer has no piece {piece!r}")
        ids[number] = own
    return ids


def _units(library: Any) -> NDArray[np.int64]:
    """(pieces,) a number for pieces that repeat the same unit as another piece ("l" and "ll"), 0 for all others."""
    alike: dict[str, list[int]] = defaultdict(list)
    for number in range(library.get_piece_size()):
        if not (library.is_control(number) or library.is_unknown(number)):
            piece = library.id_to_piece(number)
            alike[piece[: (piece + piece).find(piece, 1)]].append(number)
    units = np.zeros(library.get_piece_size(), dtype=np.int64)
    for unit, numbers in enumerate((each for each in alike.values() if len(each) > 1), 1):
        units[numbers] = unit
    return units


def _leads(library: Any, encoder: Encoder) -> list[str]:
    """The characters that the normaliser can make a special token's first one from, itself among them."""
    firsts = {token[0] for token in encoder.spelled_tokens}
    characters = [chr(code) for code in range(0x20, min(sys.maxunicode, 0xFFFF)) if not 0xD800 <= code < 0xE000]
    return [each for each in characters if each in firsts or not firsts.isdisjoint(library.normalize(each))]
