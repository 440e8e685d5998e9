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
    example: a sentence with one "<mask>", for how the model is used.
    """

    name: str
    teacher: str | None
    steps: int
    tokens: int
    table: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    example: str = "Le camembert est <mask>."
    tags: tuple[str, ...] = ()


def model_card(config: Any, facts: CardFacts, mask_token: str | None = "<mask>") -> str:
    """The card's Markdown, front matter included. mask_token: the tokenizer's; None where the model is causal."""
    causal = mask_token is None
    task = "text-generation" if causal else "fill-mask"
    before = facts.example.partition("<mask>")[0].rstrip()
    example = before if mask_token is None else facts.example.replace("<mask>", mask_token)
    front = {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["distillation" if facts.teacher else "causal-lm" if causal else "masked-lm", *facts.tags],
    }
    words = "next words" if causal else "masked words"
    source = f"Distilled from `{facts.teacher}`" if facts.teacher else f"Trained on {words} alone"
    if facts.teacher and not facts.steps:
        source = f"A student of `{facts.teacher}` before its training, built"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {facts.name}\n",
        f"{source} by distilcb: {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}; {facts.steps:,} optimizer steps, "
        f"{facts.tokens:,} tokens.\n",
        "```python\nfrom transformers import pipeline\n\n"
        f'{"write" if causal else "fill"} = pipeline("{task}", model="PATH_OF_THIS_FOLDER")\n'
        f"{'write' if causal else 'fill'}({json.dumps(example, ensure_ascii=False)})\n```\n",
    ]
    if facts.table:
        parts.append(
            "## Held-out text\n\n"
            f"{facts.table}\n\n"
            f"Means over {words} ± standard error over {'parts' if causal else 'fixed maskings'} of the same text. kl "
            f"is KL(teacher || student) at temperature 1, agreement the share of {words} where both choose the same.\n"
        )
    if facts.settings:
        rows = "\n".join(f"| {name} | `{json.dumps(value)}` |" for name, value in facts.settings.items())
        parts.append(f"## Settings\n\n| name | value |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)
