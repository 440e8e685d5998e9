"""Seeds of several models on several tasks as tables: mean ± standard deviation, share of the teacher retained."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from distilcb.eval.report import as_markdown as table

CONFIDENCE = 0.95

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


def summary_of_task(
    results: Results, columns: Sequence[str], floor: Mapping[str, float], *, teacher: str
) -> dict[str, Any]:
    """{"metric", "columns", "floor", "models": {name: facts}}.

    Facts are "seeds", "diverged", "mean", "deviation", "retained", "others". A seed that diverged is named and counts
    nowhere. "retained" is there beside a teacher, for the task's own metric, as `retained` gives it.

    Args:
        results: {model: {seed: what `fine_tune` gave}}.
        columns: metrics, the task's own first.
        floor: {metric: value} without a pre-trained model.
        teacher: its name in `results`, if it is there.
    """
    own = columns[0]
    models = {name: _over_seeds(seeds, columns) for name, seeds in results.items()}
    values = {
        name: [each["figures"][own] for each in seeds.values() if "figures" in each] for name, seeds in results.items()
    }
    for name, found in models.items():
        if name != teacher and values.get(teacher) and values[name]:
            found["retained"] = retained(values[name], values[teacher], floor.get(own))
    return {"metric": own, "columns": list(columns), "floor": dict(floor), "models": models}


def _over_seeds(seeds: Mapping[int, Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    there = {seed: each for seed, each in seeds.items() if "figures" in each}
    found: dict[str, Any] = {
        "seeds": {seed: each["figures"] for seed, each in there.items()},
        "diverged": [seed for seed in seeds if seed not in there],
        "mean": _each(statistics.fmean, [each["figures"] for each in there.values()], columns),
        "deviation": _each(statistics.stdev, [each["figures"] for each in there.values()], columns, least=2),
    }
    others = sorted({name for each in there.values() for name in each.get("others", {})})
    if others:
        found["others"] = {}
    for name in others:
        figures = [each["others"][name] for each in there.values() if name in each.get("others", {})]
        found["others"][name] = {
            "mean": _each(statistics.fmean, figures, columns),
            "deviation": _each(statistics.stdev, figures, columns, least=2),
        }
    return found


def _each(
    measure: Any, figures: Sequence[Mapping[str, float]], columns: Sequence[str], *, least: int = 1
) -> dict[str, float]:
    """{column: what `measure` makes of its values}, where there are enough of them."""
    return {name: measure([each[name] for each in figures]) for name in columns} if len(figures) >= least else {}


def retained(student: Sequence[float], teacher: Sequence[float], floor: float | None) -> dict[str, float | None]:
    """{"share": mean over mean, "low" and "high" of its confidence interval, "above_floor"}.

    The interval is that of a ratio's logarithm by the delta method, with Student's t at Welch and Satterthwaite's
    degrees of freedom: seeds of either are independent. None where there is none: of one seed, or of means that
    are not above 0.
    above_floor: the same share once the floor is taken from both; None where the teacher is not above it.
    """
    from scipy import stats

    ours, theirs = statistics.fmean(student), statistics.fmean(teacher)
    found: dict[str, float | None] = {"share": ours / theirs if theirs > 0 else None, "low": None, "high": None}
    found["above_floor"] = (ours - floor) / (theirs - floor) if floor is not None and theirs > floor else None
    if ours <= 0 or theirs <= 0 or min(len(student), len(teacher)) < 2:
        return found
    parts = [
        statistics.variance(values) / len(values) / mean**2 for values, mean in ((student, ours), (teacher, theirs))
    ]
    if not sum(parts):
        return found | {"low": ours / theirs, "high": ours / theirs}
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (student, teacher), strict=True)
    )
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(sum(parts))
    return found | {"low": ours / theirs * math.exp(-width), "high": ours / theirs * math.exp(width)}


def as_markdown(made: Mapping[str, Any]) -> str:
    """The tables of a results.json: each task's own metric, shares retained, then every metric."""
    tasks = made["tasks"]
    rows = [["", *(f"{name}: {_words(found['metric'])}" for name, found in tasks.items())]]
    rows.append(["without pre-training", *(_number(found["floor"].get(found["metric"])) for found in tasks.values())])
    rows += [
        [name, *(mean_of(found["models"][name], found["metric"]) for found in tasks.values())]
        for name in made["models"]
    ]
    parts = [
        table(rows),
        "Mean ± standard deviation over seeds, as hundredths. " + _floors(tasks),
        *_retained(made),
        *_zero_shot(tasks),
        *(_details(name, found) for name, found in tasks.items()),
    ]
    return "\n\n".join(part for part in parts if part)


def _floors(tasks: Mapping[str, Any]) -> str:
    kinds: dict[str, list[str]] = {}
    for name, found in tasks.items():
        kinds.setdefault(found["floor_is"], []).append(name)
    said = "; ".join(f"{', '.join(names)}: {what}" for what, names in kinds.items())
    return f"Without pre-training is what the same rows teach by themselves ({said})."


def _retained(made: Mapping[str, Any]) -> list[str]:
    names = [
        name for name in made["models"] if any("retained" in found["models"][name] for found in made["tasks"].values())
    ]
    if not names:
        return []
    rows = [["of the teacher", *made["tasks"]]]
    for name in names:
        shares = [found["models"][name].get("retained") for found in made["tasks"].values()]
        rows.append([name, *(share_of(each) for each in shares)])
        rows.append([f"{name}, above the floor", *(_percent(each and each["above_floor"]) for each in shares)])
    note = (
        f"The model's mean over the teacher's, with its {CONFIDENCE:.0%} interval over seeds; then the same "
        "with what is had without pre-training taken from both (–: the teacher has no more than that)."
    )
    return [table(rows), note]


def _zero_shot(tasks: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, f"{task} → {other}", mean_of(found["models"][name]["others"][other], found["metric"])]
        for task, found in tasks.items()
        for name in found["models"]
        for other in found["models"][name].get("others", {})
    ]
    return [table([["zero-shot", "trained on → measured on", "own metric"], *rows])] if rows else []


def _details(task: str, found: Mapping[str, Any]) -> str:
    rows = [[task, *map(_words, found["columns"]), "seeds"]]
    rows.append(["without pre-training", *(_number(found["floor"].get(column)) for column in found["columns"]), ""])
    for name, each in found["models"].items():
        rows.append([name, *(mean_of(each, column) for column in found["columns"]), str(len(each["seeds"]))])
    diverged = [
        f"{name}: seed {', '.join(map(str, each['diverged']))} ended with a loss that was no number and counts nowhere."
        for name, each in found["models"].items()
        if each["diverged"]
    ]
    read = read_by_all(found)
    cut = ", ".join(f"{value:,} {_words(key)}" for key, value in read["heldout"].items())
    measured = f"measured on {read['split']}: {cut}; {read['max_length']} tokens at most."
    return "\n\n".join([table(rows), f"Trained on {rows_learnt(found)}, {measured}", *diverged])


def read_by_all(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """What was read of a task's rows, the same for each of its models."""
    read: Mapping[str, Any] = next(iter(found["read"].values()))
    return read


def rows_learnt(found: Mapping[str, Any]) -> str:
    """How many rows a task's models were trained on, and whether there were more."""
    read = read_by_all(found)
    return f"{read['train']['rows']:,} rows" + (" (the first ones only)" if read.get("first_rows_only") else "")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def share_of(found: Mapping[str, float | None] | None) -> str:
    """What `retained` gave, for a table."""
    if found is None or found["share"] is None:
        return "–"
    if found["low"] is None:
        return _percent(found["share"])
    return f"{_percent(found['share'])} ({_percent(found['low'])} to {_percent(found['high'])})"


def mean_of(found: Mapping[str, Any], column: str) -> str:
    """A model's mean ± standard deviation, for a table."""
    if column not in found["mean"]:
        return "–"
    deviation = found["deviation"].get(column)
    return _number(found["mean"][column]) + ("" if deviation is None else f" ± {deviation:.2f}")
