"""What is refused of launch/finetune.py's options, data and models before anything is trained."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

from distilcb.errors import UserError
from distilcb.finetune.command import comparison_of, parser_of

ROW = {"tokens": ["Marie", "habite", "à", "Lyon"], "tags": ["B-PER", "O", "O", "B-LOC"]}
MISTAKES = {
    "an unknown task": (["--task", "sorting"], ["--task sorting", "piaf_qa"]),
    "no such folder": (["--data", "no/such"], ["--data no/such: no such folder"]),
    "soft targets of nobody": (["--soft_targets", "both"], ["--soft_targets both needs --teacher"]),
    "two seeds alike": (["--seeds", "1", "1"], ["--seeds 1 1: one stands there twice"]),
    "held-out text of a task": (["--heldout", "x"], ["--heldout is of --task causal"]),
    "like lengths of a text": (
        ["--task", "causal", "--heldout", "x", "--by_length"],
        ["--by_length is of labelled tasks"],
    ),
    "no learning rate": (["--lr", "0"], ["--lr", "needed a number"]),
    "several at once": (["--seeds", "1", "1", "--heldout", "x"], ["--seeds 1 1", "--heldout"]),
    "a student that is not there": (["--student", "./none"], ["model folder ./none does not exist"]),
    "a split that is not there": (["--split", "dev"], ["no rows of 'dev'"]),
    "a causal task without held-out text": (["--task", "causal"], ["--task causal needs --heldout"]),
    "a causal student": (["--student", "{causal}"], ["predicts the next word"]),
    "a teacher of another tokenizer": (["--teacher", "{causal}"], ["has another tokenizer than student"]),
    "a teacher without the task": (["--teacher", "{student}"], ["has the labels LABEL_0, LABEL_1", "--teacher_base"]),
    "a teacher of other labels": (["--teacher", "{other}"], ["has the labels", "the same in the same order"]),
    "rows of another task": (["--task", "pos_fr_gsd"], ["train.jsonl, line 1: no upos; came tokens, tags"]),
}

NAMED = ("student", "causal", "other")


@pytest.fixture(scope="module")
def folders(mini_teacher, tmp_path_factory):
    """A student of one layer, a causal model, a tagger of other labels, rows."""
    folder = tmp_path_factory.mktemp("options")
    for name in ("student", "other"):
        shutil.copytree(mini_teacher, folder / name)
    config = AutoConfig.from_pretrained(mini_teacher, num_hidden_layers=1)
    AutoModelForMaskedLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "student")
    config.id2label, config.label2id = {0: "B-PER", 1: "O"}, {"B-PER": 0, "O": 1}
    AutoModelForTokenClassification.from_config(config).save_pretrained(folder / "other")
    words = ["<|endoftext|>", *(chr(value) for value in range(33, 127))]
    numbers = {word: number for number, word in enumerate(words)}
    GPT2Tokenizer(vocab=numbers, merges=[]).save_pretrained(folder / "causal")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=95)).save_pretrained(folder / "causal")
    (folder / "rows").mkdir()
    for split in ("train", "test"):
        (folder / "rows" / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n")
    return folder


def asked(folders, tmp_path, *words):
    common = ["--task", "ner_fr", "--data", folders / "rows", "--student", folders / "student"]
    common += ["--output", tmp_path / "output", *words]
    return comparison_of(parser_of("").parse_args(list(map(str, common))))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_before_anything_is_written(folders, tmp_path, mistake):
    words, parts = MISTAKES[mistake]
    with pytest.raises(UserError) as refused:
        asked(folders, tmp_path, *(word.format(**{name: folders / name for name in NAMED}) for word in words))
    for part in parts:
        assert part in str(refused.value)
    assert not (tmp_path / "output").exists()


def test_the_defaults_are_the_published_ones(folders, tmp_path):
    found = asked(folders, tmp_path)
    assert (found.weights.hard, found.weights.soft, found.weights.temperature) == (0.5, 0.5, 2.0)
    assert (found.recipe.epochs, found.recipe.lr, found.recipe.batch) == (3.0, 5e-5, 8)
    assert (found.arms, found.seeds) == (("without",), (0, 1, 2))


def test_a_teacher_brings_both_arms_and_sequences_are_as_long_as_its_positions(folders, tmp_path):
    found = asked(folders, tmp_path, "--teacher_base", folders / "student", "--max_length", 1000)
    assert found.arms == ("without", "with")
    assert found.settings["max_length"] == 256
