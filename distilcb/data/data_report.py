"""What a prepared corpus is made of, as report.json and report.md beside the blocks."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distilcb.data.blocks import Description
from distilcb.data.packing import PartFacts
from distilcb.data.tokenizer import Vocabulary

REPORT_JSON, REPORT_MD = "report.json", "report.md"

_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_FREQUENT_TOKENS = 30


class _Speller(Protocol):
    @property
    def vocabulary(self) -> Vocabulary: ...

    def pieces(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True)
class DataReport:
    """Figures of a prepared corpus.

    Attributes:
        documents: with a token each; shorter ones than asked for are not among them.
        tokens: of the documents, without separators.
        unknown_share: of `tokens`, what the tokenizer has no word for.
        lengths: tokens of a document: shortest, mean, longest, and the least that a share of documents does not exceed.
        frequent_tokens: token and how often it is in the blocks, special ones left out.
        seconds: of this start; parts that an earlier start had finished cost it nothing.
    """

    documents: int
    words: int
    tokens: int
    tokens_per_word: float
    unknown_share: float
    blocks: int
    seq_len: int
    parts: int
    dropped: dict[str, int]
    lengths: dict[str, float]
    frequent_tokens: list[tuple[str, int]]
    text_megabytes: float
    seconds: float
    megabytes_per_second: float

    @classmethod
    def of(
        cls,
        made: Description,
        facts: Sequence[PartFacts],
        token_counts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        tokenizer: _Speller,
        *,
        seconds: float,
    ) -> "DataReport":
        """The report of these parts.

        Args:
            token_counts: (vocab,) in the blocks.
            lengths: how many documents have 0, 1, 2, … tokens.
        """
        words, tokens, unknown, text_bytes = (
            sum(getattr(each, name) for each in facts) for name in ("words", "tokens", "unknown", "text_bytes")
        )
        megabytes = text_bytes / 1e6
        return cls(
            documents=made.documents,
            words=words,
            tokens=tokens,
            tokens_per_word=round(tokens / max(1, words), 4),
            unknown_share=round(unknown / max(1, tokens), 8),
            blocks=made.blocks,
            seq_len=made.seq_len,
            parts=len(facts),
            dropped=made.dropped,
            lengths=length_quantiles(lengths),
            frequent_tokens=_frequent(token_counts, tokenizer),
            text_megabytes=round(megabytes, 3),
            seconds=round(seconds, 3),
            megabytes_per_second=round(megabytes / max(seconds, 1e-9), 3),
        )


def length_quantiles(lengths: NDArray[np.int64]) -> dict[str, float]:
    """Shortest, longest, mean, and for each share the least length that so many documents do not exceed.

    Args:
        lengths: how many documents have 0, 1, 2, … tokens; those with 0 are no documents.
    """
    counts = lengths.copy()
    counts[0] = 0
    there = np.flatnonzero(counts)
    if not there.size:
        return {}
    up_to = np.cumsum(counts)
    quantiles = {f"{share:.0%}": int(np.searchsorted(up_to, share * up_to[-1] - 1e-9)) for share in _QUANTILES}
    mean = float((counts * np.arange(counts.size)).sum() / up_to[-1])
    return {"shortest": int(there[0]), "mean": round(mean, 2), **quantiles, "longest": int(there[-1])}


def write_report(report: DataReport, folder: Path) -> None:
    """report.json for programs, report.md for people."""
    text = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    (folder / REPORT_JSON).write_text(text + "\n", encoding="utf-8")
    (folder / REPORT_MD).write_text(_as_markdown(report), encoding="utf-8")


def _frequent(token_counts: NDArray[np.int64], tokenizer: _Speller) -> list[tuple[str, int]]:
    counts = token_counts.copy()
    counts[tokenizer.vocabulary.special_ids] = 0
    ids = np.argsort(-counts, kind="stable")[:_FREQUENT_TOKENS]
    ids = ids[counts[ids] > 0]
    return list(zip(tokenizer.pieces(ids.tolist()), counts[ids].tolist(), strict=True))


def _as_markdown(report: DataReport) -> str:
    rows = [
        ("documents", f"{report.documents:,}"),
        ("words", f"{report.words:,}"),
        ("tokens", f"{report.tokens:,}"),
        ("tokens a word", f"{report.tokens_per_word:.3f}"),
        ("unknown tokens", f"{report.unknown_share:.4%}"),
        ("blocks", f"{report.blocks:,} of {report.seq_len} tokens"),
        ("parts", f"{report.parts:,}"),
        *((f"dropped: {name.replace('_', ' ')}", f"{count:,}") for name, count in report.dropped.items()),
        ("text", f"{report.text_megabytes:,.1f} MB"),
        ("time", f"{report.seconds:,.1f} s, {report.megabytes_per_second:,.1f} MB/s"),
    ]
    lengths = [(name, f"{length:,}") for name, length in report.lengths.items()]
    tokens = [(f"`{token.replace('|', chr(0x2758))}`", f"{count:,}") for token, count in report.frequent_tokens]
    tables = (
        ("", "corpus", rows),
        ("tokens of a document", "share", lengths),
        ("most frequent tokens", "token", tokens),
    )
    return "\n".join(_table(*table) for table in tables)


def _table(title: str, head: str, rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"## {title}\n"] if title else ["# Prepared text\n"]
    lines += [f"| {head} | |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines) + "\n"
