"""A page with plots of an evaluation: bars with their deviations, and quality beside time."""

import html
import io
import logging
from collections.abc import Mapping
from typing import Any

from distilcb.finetune.evaluation_report import measured_on

log = logging.getLogger(__name__)

_NEXT_LINE = "\n→ "
_TIMED = "1 x 128"
_WIDTH, _HEIGHT = 8.0, 3.6


def as_page(made: Mapping[str, Any], markdown: str, seconds: Mapping[str, Mapping[str, float]] | None) -> str | None:
    """One HTML file with everything in it; None, and a line in the log, where matplotlib is not installed.

    Args:
        made: what is in tasks/results.json.
        markdown: its tables, shown as they are.
        seconds: what speed.json has, where models were timed.
    """
    try:
        import matplotlib
    except ImportError:
        log.info("no page with plots: it needs matplotlib (pip install 'distilcb[plots]')")
        return None
    matplotlib.use("Agg")
    parts = [_bars(made)]
    if seconds:
        parts.append(_quality_beside_time(made, seconds))
    plots = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Evaluation</title></head><body>\n'
        f"<h1>Evaluation of {html.escape(made['made'])}</h1>\n{plots}\n<pre>{html.escape(markdown)}</pre>\n"
        "</body></html>\n"
    )


def _bars(made: Mapping[str, Any]) -> str:
    """A group a task, learnt or only measured on, a bar a model; black lines: without a pre-trained model."""
    from matplotlib.figure import Figure

    tasks, models = measured_on(made["tasks"]), list(made["models"])
    figure = Figure((max(_WIDTH, 1.6 * len(tasks)), _HEIGHT), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        found = [task["models"][model] for task in tasks.values()]
        means = [each["mean"].get(task["metric"], 0.0) for each, task in zip(found, tasks.values(), strict=True)]
        errors = [each["deviation"].get(task["metric"], 0.0) for each, task in zip(found, tasks.values(), strict=True)]
        places = [place + (number - (len(models) - 1) / 2) * width for place in range(len(tasks))]
        axes.bar(places, means, width, yerr=errors, capsize=2, label=model)
    for place, task in enumerate(tasks.values()):
        floor = task["floor"].get(task["metric"])
        if floor is not None:
            axes.plot([place - 0.4, place + 0.4], [floor, floor], color="black")
    axes.set_xticks(
        range(len(tasks)),
        [f"{name.replace(' → ', _NEXT_LINE)}\n{task['metric'].replace('_', ' ')}" for name, task in tasks.items()],
    )
    axes.set_ylabel("hundredths, ± standard deviation")
    axes.legend(fontsize="small")
    return f"<figure>{_svg(figure)}<figcaption>Black lines: without a pre-trained model.</figcaption></figure>"


def _quality_beside_time(made: Mapping[str, Any], seconds: Mapping[str, Mapping[str, float]]) -> str:
    """A point a model that was timed and has a figure in every task; empty where there is none."""
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH / 2, _HEIGHT), layout="constrained")
    axes, any_there = figure.subplots(), False
    for model in made["models"]:
        means = [task["models"][model]["mean"].get(task["metric"]) for task in made["tasks"].values()]
        time = seconds.get(model, {}).get(_TIMED)
        if time is None or None in means:
            continue
        any_there = True
        quality = sum(means) / len(means)
        axes.plot([time * 1e3], [quality], "o")
        axes.annotate(model, (time * 1e3, quality), textcoords="offset points", xytext=(4, 4), fontsize="small")
    if not any_there:
        return ""
    axes.set_xlabel("ms for a text of 128 tokens")
    axes.set_ylabel("mean over tasks")
    axes.margins(0.3)
    return f"<figure>{_svg(figure)}<figcaption>Each task by its own metric.</figcaption></figure>"


def _svg(figure: Any) -> str:
    written = io.StringIO()
    figure.savefig(written, format="svg")
    return written.getvalue().partition("<svg")[2].join(["<svg", ""])
