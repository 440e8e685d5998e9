"""The README.md of an exported student."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from distilcb.errors import first_line
from distilcb.models.families import family_of


@dataclass(frozen=True)
class CardFacts:
    """What the card says beyond the model's own configuration.

    table: held-out figures as a Markdown table, or empty.
    settings: dotted name -> value of the run.
    example: a sentence with one "<mask>", for how the model is used.
    widget: such sentences to try the model with on the hub.
    base_model: the teacher's name on the hub, where it has one.
    language, license, datasets: as the hub names them.
    text: names of what it was trained on.
    """

    name: str
    teacher: str | None
    steps: int
    tokens: int
    table: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    example: str = "Le camembert est <mask>."
    tags: tuple[str, ...] = ()
    widget: tuple[str, ...] = ()
    base_model: str | None = None
    language: tuple[str, ...] = ()
    license: str | None = None
    datasets: tuple[str, ...] = ()
    text: tuple[str, ...] = ()


def model_card(config: Any, facts: CardFacts, mask_token: str | None = "<mask>") -> str:
    """The card's Markdown, front matter included. mask_token: the tokenizer's; None where the model is causal."""
    causal = mask_token is None
    task = "text-generation" if causal else "fill-mask"
    example = _as_asked(facts.example, mask_token)
    front = ModelCardData(
        language=list(facts.language) or None,
        license=facts.license,
        library_name="transformers",
        pipeline_tag=task,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        tags=["distillation" if facts.teacher else "causal-lm" if causal else "masked-lm", *facts.tags],
        widget=[{"text": _as_asked(sentence, mask_token)} for sentence in facts.widget] or None,
    )
    words = "next words" if causal else "masked words"
    source = f"Distilled from `{facts.teacher}`" if facts.teacher else f"Trained on {words} alone"
    if facts.teacher and not facts.steps:
        source = f"A student of `{facts.teacher}` before its training, built"
    text = f" of {', '.join(f'`{name}`' for name in facts.text)}" if facts.text and facts.steps else ""
    parts = [
        f"---\n{front.to_yaml()}\n---\n",
        f"# {facts.name}\n",
        f"{source} by distilcb: {config.num_hidden_layers} layers, hidden size "
        f"{config.hidden_size}, vocabulary {config.vocab_size:,}; {facts.steps:,} optimizer steps, "
        f"{facts.tokens:,} tokens{text}.\n",
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
    longest = family_of(config, where="model").max_seq_len(config)
    parts.append(
        f"## Limits\n\nIt reads {longest} tokens at most. It knows the text that it"
        f"{' and its teacher' if facts.teacher else ''} saw, and repeats what was one-sided there. It is made to be "
        f"fine-tuned: what it {'writes' if causal else 'fills in'} by itself is no fact.\n"
    )
    if facts.settings:
        rows = "\n".join(f"| {name} | `{json.dumps(value)}` |" for name, value in facts.settings.items())
        parts.append(f"## Settings\n\n| name | value |\n| --- | --- |\n{rows}\n")
    return "\n".join(parts)


def _as_asked(sentence: str, mask_token: str | None) -> str:
    """With the tokenizer's own mask; for a causal model what stands before it."""
    return sentence.partition("<mask>")[0].rstrip() if mask_token is None else sentence.replace("<mask>", mask_token)


def with_sections(card: str, sections: Mapping[str, str]) -> str:
    """The card with sections, {title: text}, in place of those of their titles, else before limits and settings."""
    for title, text in sections.items():
        made = f"## {title}\n\n{text.strip()}\n\n"
        there = re.search(rf"(?ms)^## {re.escape(title)}\n.*?(?=^## |\Z)", card)
        if there:
            card = f"{card[: there.start()]}{made}{card[there.end() :]}"
            continue
        after = re.search(r"(?m)^## (Limits|Settings)$", card)
        place = after.start() if after else len(card)
        card = f"{card[:place].rstrip()}\n\n{made}{card[place:]}"
    return card.rstrip() + "\n"


def with_results(card: str, results: Sequence[EvalResult], *, name: str) -> str:
    """The card with these figures in its front matter, where the hub reads them, in place of earlier ones.

    name: of the model, beside them.

    Raises:
        ValueError: front matter that is none.
    """
    try:
        parsed = ModelCard(card)
    except yaml.YAMLError as error:
        raise ValueError(first_line(error)) from error
    data: Any = parsed.data
    data.model_name, data.eval_results = (name, list(results)) if results else (None, None)
    return str(parsed)
