"""Tasks of a few rows that a model of one layer learns, and such models."""

import json
import shutil

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from distilcb.config import DEFAULT_RECIPE

TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"
CITIES = ["Lyon", "Paris", "Brest", "Nantes", "Dijon", "Metz"]
PEOPLE = ["Marie", "Jean", "Louise", "Paul"]


def question(number):
    city, person = CITIES[number % len(CITIES)], PEOPLE[number % len(PEOPLE)]
    context = (
        f"Depuis plus de dix ans {person} travaille beaucoup, et {person} habite à {city} dans une vieille maison."
    )
    answers = {"text": [city], "answer_start": [context.index(city)]}
    return {"question": f"Où habite {person} ?", "context": context, "answers": answers}


def sentence(number):
    tokens = [PEOPLE[number % len(PEOPLE)], "habite", "à", CITIES[number % len(CITIES)], "."]
    return {"tokens": tokens, "tags": ["B-PER", "O", "O", "B-LOC", "O"]}


def review(number):
    return {"text": "Un très beau film." if number % 2 else "Quel ennui, ce film.", "label": number % 2}


def write(folder, row, *, train=24, test=8):
    folder.mkdir()
    for split, count in (("train", train), ("test", test)):
        lines = (json.dumps(row(number), ensure_ascii=False) for number in range(count))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def save_tiny(folder, layers):
    shutil.copytree(TEACHER, folder)
    config = AutoConfig.from_pretrained(TEACHER, num_hidden_layers=layers)
    torch.manual_seed(layers)
    AutoModelForMaskedLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder
