"""Seeds of several arms as one table: mean ± standard deviation, and the difference seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distilcb.eval.report import as_console, as_markdown

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]

_ROWS = {
    "teacher": "teacher",
    "without": "student, labels alone",
    "with": "student, soft targets too",
    "difference": "difference, seed by seed",
}


def summary(results: Results, columns: Sequence[str]) -> dict[str, Any]:
    """{arm: {"seeds": finished ones, "diverged": others, "mean": {}, "deviation": {}}}, and "difference" of two arms.

    Deviations are those of a sample (n - 1), None of a single seed. A seed that diverged is named and counts nowhere.
    """
    figures = {
        arm: {seed: each["figures"] for seed, each in seeds.items() if "figures" in each}
        for arm, seeds in results.items()
    }
    found = {
        arm: _over_seeds(figures[arm], columns) | {"diverged": [seed for seed in seeds if seed not in figures[arm]]}
        for arm, seeds in results.items()
    }
    if "with" in figures and "without" in figures:
        both = [seed for seed in figures["with"] if seed in figures["without"]]
        differences = {
            seed: {name: figures["with"][seed][name] - figures["without"][seed][name] for name in columns}
            for seed in both
        }
        found["difference"] = _over_seeds(differences, columns) | {"diverged": []}
    return found


def _over_seeds(figures: Mapping[int, Mapping[str, float]], columns: Sequence[str]) -> dict[str, Any]:
    values = {name: [each[name] for each in figures.values()] for name in columns}
    return {
        "seeds": list(figures),
        "mean": {name: statistics.fmean(some) for name, some in values.items() if some},
        "deviation": {name: statistics.stdev(some) if len(some) > 1 else None for name, some in values.items()},
    }


def as_table(found: Mapping[str, Mapping[str, Any]], columns: Sequence[str], *, console: bool = False) -> str:
    """The summary as Markdown, or aligned for a terminal; what diverged below it."""
    rows = [["", *(name.replace("_", " ") for name in columns), "seeds"]]
    for arm, title in _ROWS.items():
        if arm in found:
            rows.append([title, *(_cell(found[arm], name, arm) for name in columns), str(len(found[arm]["seeds"]))])
    notes = [
        f"{_ROWS[arm]}: seed {', '.join(map(str, each['diverged']))} ended with a loss that was no number."
        for arm, each in found.items()
        if each["diverged"]
    ]
    return "\n\n".join([(as_console if console else as_markdown)(rows), *notes])


def _cell(found: Mapping[str, Any], name: str, arm: str) -> str:
    if name not in found["mean"]:
        return "–"
    sign = "+" if arm == "difference" else ""
    text = f"{found['mean'][name]:{sign}.2f}"
    deviation = found["deviation"][name]
    return text if deviation is None else f"{text} ± {deviation:.2f}"
