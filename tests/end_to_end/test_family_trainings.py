"""Families of the literature end to end: a teacher that has learned something, distilled by the family's own recipe."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distilcb.config import REPOSITORY

DATA = REPOSITORY.parent / "shared" / "data" / "corpus"
FAMILIES = {
    "distilbert-uncased": ("DistilBertForMaskedLM", "fill-mask", "the old [MASK]"),
    "distilmbert": ("DistilBertForMaskedLM", "fill-mask", "the old [MASK]"),
    "distilgpt2": ("GPT2LMHeadModel", "text-generation", "the old"),
}

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which holds the text"),
]


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Of every family, from benchmarks/families.py."""
    folder = tmp_path_factory.mktemp("families")

    def train(family):
        path = folder / f"{family}.json"
        words = ["--text", str(DATA), "--families", family, "--runs", str(folder / "runs"), "--json", str(path)]
        ended = subprocess.run(
            [sys.executable, "benchmarks/families.py", *words],
            cwd=REPOSITORY,
            env=os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=2400,
            check=False,
        )
        assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
        return json.loads(path.read_text())[family]

    # Threads that share so small a model wait for each other: a process a core is done sooner.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(FAMILIES, pool.map(train, FAMILIES), strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_knows_more_than_how_often_words_occur(figures, family):
    found = figures[family]
    assert found["teacher_loss"] < found["frequency_loss"] - 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_the_students_kl_halves_at_least(figures, family):
    found = figures[family]
    assert found["kl_recipe"] < found["kl_start"] / 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_on_words_alone_is_further_from_the_teacher(figures, family):
    found = figures[family]
    assert found["kl_recipe"] < found["kl_words"] / 1.2


@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_of_its_own_class_and_works_in_its_pipeline(figures, family):
    import transformers

    name, task, text = FAMILIES[family]
    folder = Path(figures[family]["student"])
    assert figures[family]["class"] == name
    model = getattr(transformers, name).from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    pipe = transformers.pipeline(task, model=str(folder), device="cpu")
    if task == "fill-mask":
        answers = pipe(text)
        assert len(answers) == 5
        assert all(answer["token_str"] for answer in answers)
    else:
        (answer,) = pipe(text, max_new_tokens=3, do_sample=False)
        assert answer["generated_text"].startswith(text)
        assert len(answer["generated_text"]) > len(text)
