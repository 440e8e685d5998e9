"""A masked block as people read it: its text, and which words were masked and became what."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distilcb.data.tokenizer import TextTokenizer


@dataclass(frozen=True)
class MaskedWord:
    """Masked tokens of one word that stand side by side.

    columns: where they stand in the block. word: what they spell. read_as: what the models read in their place.
    treatment: "hidden" behind the mask token, "replaced" by others, or "kept" and still to be predicted.
    """

    columns: tuple[int, ...]
    word: str
    read_as: str
    treatment: str

    def __str__(self) -> str:
        """[fille] hidden, [fille→roi] replaced, [fille=] kept."""
        if self.treatment == "replaced":
            return f"[{self.word}→{self.read_as}]"
        return f"[{self.word}=]" if self.treatment == "kept" else f"[{self.word}]"


def mark(
    block: NDArray[np.int64],
    input_ids: NDArray[np.int64],
    positions: NDArray[np.int64],
    *,
    tokenizer: TextTokenizer,
) -> tuple[str, list[MaskedWord]]:
    """The text of a block without the separators around it, each masked word in brackets; and those words.

    Args:
        block: (tokens,) ids as they stand in the text.
        input_ids: (tokens,) ids as the models read them.
        positions: (k,) masked columns.
    """
    vocabulary = tokenizer.vocabulary
    treatments = np.full(block.size, "", dtype="<U8")
    treatments[positions] = np.where(input_ids[positions] == block[positions], "kept", "replaced")
    treatments[positions[input_ids[positions] == vocabulary.mask_id]] = "hidden"
    starts = vocabulary.word_start[block]
    text, words = "", []
    outer = 0 if vocabulary.is_causal else 1
    for columns in _pieces(treatments, starts, outer):
        piece = _decode(tokenizer, block[columns])
        if treatment := str(treatments[columns[0]]):
            words.append(MaskedWord(tuple(columns), piece, _decode(tokenizer, input_ids[columns]), treatment))
            piece = str(words[-1])
        text += f" {piece}" if starts[columns[0]] else piece
    return text.strip(), words


def _pieces(treatments: NDArray[np.str_], starts: NDArray[np.bool_], outer: int) -> list[list[int]]:
    """The columns but for `outer` at each end, cut where the treatment changes, and masked ones also between words."""
    pieces: list[list[int]] = []
    for column in range(outer, treatments.size - outer):
        goes_on = treatments[column] == treatments[max(column, 1) - 1] and not (treatments[column] and starts[column])
        if pieces and goes_on:
            pieces[-1].append(column)
        else:
            pieces.append([column])
    return pieces


def _decode(tokenizer: TextTokenizer, ids: NDArray[np.int64]) -> str:
    """What the tokens spell, without the space that its first may bring: a tokenizer may drop it, or not."""
    text = tokenizer.hugging_face.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return str(text).lstrip(" ")
