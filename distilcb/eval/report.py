"""Held-out figures as a table."""

from collections.abc import Mapping
from typing import Any

_COLUMNS = (
    ("mlm_loss", "loss (nats)", "{:.3f}"),
    ("clm_loss", "loss (nats)", "{:.3f}"),
    ("perplexity", "perplexity", "{:.1f}"),
    ("mlm_accuracy", "words right", "{:.1%}"),
    ("clm_accuracy", "next words right", "{:.1%}"),
    ("kl", "kl (nats)", "{:.3f}"),
    ("agreement", "agreement", "{:.1%}"),
)
# What the models of a run are called in its figures, and in a table.
NAMES_IN_A_RUN = {"teacher": "teacher", "student_start": "student, start", "student": "student, end"}


def heldout_tables(heldout: Mapping[str, Mapping[str, Any]]) -> list[list[list[str]]]:
    """`heldout_rows` of all words; then of each band of them, and of each source."""
    tables = [heldout_rows(heldout)]
    for kind in ("by_band", "by_source"):
        names = list(dict.fromkeys(name for figures in heldout.values() for name in figures.get(kind, {})))
        for name in names:
            own = {who: figures[kind][name] for who, figures in heldout.items() if name in figures.get(kind, {})}
            tables.append(heldout_rows(own, title=name))
    return tables


def heldout_rows(heldout: Mapping[str, Mapping[str, Any]], *, title: str = "held-out text") -> list[list[str]]:
    """Header and one row a model: each figure ± its standard error. Models of other names follow those of a run."""
    causal = any("clm_loss" in figures for figures in heldout.values())
    columns = [column for column in _COLUMNS if not column[0].startswith("mlm" if causal else "clm")]
    rows = [[title, *(name for _, name, _ in columns)]]
    for who in [
        *(who for who in NAMES_IN_A_RUN if who in heldout),
        *(who for who in heldout if who not in NAMES_IN_A_RUN),
    ]:
        rows.append([NAMES_IN_A_RUN.get(who, who), *(_cell(heldout[who], column, form) for column, _, form in columns)])
    return rows


def as_console(rows: list[list[str]]) -> str:
    """Rows aligned for a terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]]) -> str:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    rule = "|" + "|".join([" --- ", *(" ---: " for _ in rows[0][1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(figures: Mapping[str, Any], column: str, form: str) -> str:
    if column not in figures:
        return "–"
    error = figures["standard_error"].get(column)
    text = form.format(figures[column])
    if error is None or error != error:
        return text
    return f"{text} ± {form.format(error).rstrip('%')}"
