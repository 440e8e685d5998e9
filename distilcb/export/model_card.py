"""The README.md of an exported student."""

import json
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the model's own configuration.

    table: held-out figures as a Markdown table, or empty.
    settings: dotted name -> value of the run.
    """

    name: str
    teacher: str | None
    steps: int
    tokens: int
    table: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()


def model_card(config: Any, facts: CardFacts) -> str:
    """The card's Markdown, front matter included."""
    front = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": ["distillation", *facts.tags] if facts.teacher else ["masked-lm", *facts.tags],
    }
    source = f"Distilled from `{facts.teacher}`" if facts.teacher else "Trained on masked words alone"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {facts.name}\n",
        f"{source} by distilcb: {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}; {facts.steps:,} optimizer steps, "
        f"{facts.tokens:,} tokens.\n",
        "```python\nfrom transformers import pipeline\n\n"
        'fill = pipeline("fill-mask", model="PATH_OF_THIS_FOLDER")\n'
        'fill("Le camembert est <mask>.")\n```\n',
    ]
    if facts.table:
        parts.append(
            "## Held-out text\n\n"
            f"{facts.table}\n\n"
            "Means over masked words ± standard error over fixed maskings of the same text. kl is "
            "KL(teacher || student) at temperature 1, agreement the share of masked words where both choose the same.\n"
        )
    if facts.settings:
        rows = "\n".join(f"| {name} | `{json.dumps(value)}` |" for name, value in facts.settings.items())
        parts.append(f"## Settings\n\n| name | value |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)
