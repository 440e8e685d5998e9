"""How much faster a student answers than its teacher, at the published sizes: one text at a time, as in the papers.

python benchmarks/latency.py [--recipes distilbert-uncased,distilgpt2] [--lengths 16,128,512] [--quick] [--json FILE]

Teacher and student hold random weights, which take as long as trained ones, and have their turns in fp32 without the
vocabulary head, as behind a classifier.
"""

import sys
from typing import Any

import torch
from side_by_side import medians, parser_of, table, tell
from transformers import AutoConfig, AutoModel

from distilcb import distributed
from distilcb.config import REPOSITORY
from distilcb.errors import ConfigError
from distilcb.models.families import FAMILIES, family_of
from distilcb.recipe import load_recipe

_ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
# What the teachers' config.json say.
TEACHERS: dict[str, dict[str, Any]] = {
    "distilcamembert": _ROBERTA | {"model_type": "camembert", "vocab_size": 32_005},
    "distilbert-uncased": {"model_type": "bert", "vocab_size": 30_522},
    "distilbert-cased": {"model_type": "bert", "vocab_size": 28_996},
    "distilbert-german": {"model_type": "bert", "vocab_size": 31_102},
    "distilmbert": {"model_type": "bert", "vocab_size": 119_547},
    "distilroberta": _ROBERTA | {"model_type": "roberta", "vocab_size": 50_265},
    "distilxlmr": _ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250_002},
    "distilgpt2": {"model_type": "gpt2", "vocab_size": 50_257},
}
PUBLISHED = {
    "distilcamembert": "half the time (model card)",
    "distilbert-uncased": "60 % faster (DistilBERT, section 4: 668 s and 410 s)",
    "distilroberta": "twice as fast (model card)",
    "distilgpt2": "two times faster (model card)",
}
_FIRST_WORD = 1000


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    there = [name for name in TEACHERS if (REPOSITORY / "recipes" / f"{name}.yaml").exists()]
    parser.add_argument("--recipes", help=f"(default: {','.join(there)})")
    parser.add_argument("--lengths", help="tokens of a text (default: 16,128,512; with --quick 16)")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 9, with --quick 3)")
    options = parser.parse_args(words)
    names = options.recipes.split(",") if options.recipes else there[1:2] if options.quick else there
    if unknown := [name for name in names if name not in there]:
        raise ConfigError(f"--recipes {','.join(unknown)}: there are {', '.join(there)}.")
    lengths = [int(length) for length in (options.lengths or ("16" if options.quick else "16,128,512")).split(",")]
    rounds = options.rounds or (3 if options.quick else 9)
    distributed.start()
    figures: dict[str, Any] = {}
    rows = [row_of(name, lengths, rounds, figures) for name in names]
    head = ["", *(f"{length} tokens: ms, ratio" for length in lengths), "published"]
    text = f"Batch 1, fp32, {distributed.device()}, medians of {rounds} in turn.\n\n{table(head, rows)}"
    tell(
        "Teacher and student, one text at a time",
        text,
        figures,
        options,
        "python benchmarks/latency.py " + " ".join(words),
    )
    distributed.stop()


def row_of(name: str, lengths: list[int], rounds: int, figures: dict[str, Any]) -> tuple[str, ...]:
    """Milliseconds of teacher and student, and their ratio, for each length."""
    facts = AutoConfig.for_model(**TEACHERS[name])
    student = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").student
    config = family_of(facts, where=name).with_layers(facts, student.num_layers or facts.num_hidden_layers // 2)
    if student.architecture:
        config = FAMILIES[student.architecture].config_like(config)
    device = distributed.device()
    models = {
        who: AutoModel.from_config(each).eval().to(device) for who, each in (("teacher", facts), ("student", config))
    }
    cells = []
    for length in lengths:
        ids = torch.randint(_FIRST_WORD, facts.vocab_size, (1, length), device=device)

        def answer(model: Any, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                model(ids)

        seconds = medians({who: lambda model=model: answer(model) for who, model in models.items()}, rounds=rounds)
        ratio = seconds["teacher"] / seconds["student"]
        figures[f"{name}, {length} tokens"] = {"teacher_over_student": ratio} | {
            f"{w}_seconds": s for w, s in seconds.items()
        }
        cells.append(f"{seconds['teacher'] * 1e3:.1f} / {seconds['student'] * 1e3:.1f} = {ratio:.2f}")
    return name, *cells, PUBLISHED.get(name, "–")


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
