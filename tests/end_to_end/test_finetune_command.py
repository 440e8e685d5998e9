"""launch/finetune.py as users start it, on tasks of a few rows and models of two layers."""

import json
import shutil

import pytest
import torch
from refusal import assert_refused
from small_tasks import question, review, save_tiny, sentence, write
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
)

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("student") / "student", 1)


@pytest.fixture(scope="module")
def compared(commands, student, tmp_path_factory):
    """Questions with both arms, two seeds, and a teacher that is fine-tuned on the way: words, folder, how it ended."""
    folder = tmp_path_factory.mktemp("compared")
    words = ["--task", "piaf_qa", "--data", write(folder / "qa", question), "--student", student]
    words += ["--teacher_base", save_tiny(folder / "base", 2), "--epochs", 2, "--lr", 1e-3, "--teacher_epochs", 3]
    words += ["--max_length", 32, "--stride", 8, "--seeds", 0, 1, "--output", folder / "output"]
    return words, folder / "output", commands.python("finetune", *words)


def results(output):
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def test_both_arms_are_trained_on_the_same_seeds_and_compared(compared):
    _, output, ended = compared
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = results(output)
    assert {arm: sorted(seeds) for arm, seeds in found["results"].items()} == {
        "teacher": ["0"],
        "without": ["0", "1"],
        "with": ["0", "1"],
    }
    steps = {each["steps"] for arm in ("without", "with") for each in found["results"][arm].values()}
    assert len(steps) == 1
    difference = found["summary"]["difference"]["mean"]["f1"]
    means = [found["summary"][arm]["mean"]["f1"] for arm in ("with", "without")]
    assert difference == pytest.approx(means[0] - means[1])
    for row in ("teacher", "student, labels alone", "student, soft targets too", "difference, seed by seed"):
        assert row in ended.stdout
        assert f"| {row} |" in (output / "results.md").read_text(encoding="utf-8")


def test_the_two_arms_are_not_the_same_training(compared):
    _, output, _ = compared
    curves = [(output / arm / "seed_0" / "curve.jsonl").read_text() for arm in ("without", "with")]
    assert curves[0] != curves[1]


def test_long_contexts_are_windowed_and_counted(compared):
    _, output, _ = compared
    read = results(output)["read"]
    assert read["train"]["rows"] == 24
    assert read["train"]["sequences"] > 24
    assert read["train"]["answers_in_no_window"] == 0


def test_models_and_predictions_are_there_for_each_seed(compared):
    _, output, _ = compared
    for arm, seed in (("without", 0), ("with", 1)):
        folder = output / arm / f"seed_{seed}"
        AutoModelForQuestionAnswering.from_pretrained(folder / "model")
        AutoTokenizer.from_pretrained(folder / "model")
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert [line["right"] for line in lines] == [question(number)["answers"]["text"] for number in range(8)]


def test_started_again_it_trains_only_what_is_missing(commands, compared):
    words, output, _ = compared
    before = results(output)
    kept = output / "without" / "seed_0" / "model" / "model.safetensors"
    made = kept.stat().st_mtime_ns
    shutil.rmtree(output / "with" / "seed_1")
    ended = commands.python("finetune", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert kept.stat().st_mtime_ns == made
    after = results(output)
    assert after["summary"] == before["summary"]
    assert "with soft targets, seed 1: step" in ended.stderr
    assert "seed 0: step" not in ended.stderr
    assert "teacher: step" not in ended.stderr


def test_a_folder_of_other_settings_is_left_alone(commands, compared):
    words, _, _ = compared
    assert_refused(
        commands.python("finetune", *words, "--temperature", 3), "temperature 2.0 there, 3.0 now", "another --output"
    )
    assert_refused(commands.python("finetune", *words, "--lr", 1e-4), "recipe.lr 0.001 there, 0.0001 now")


def test_later_seeds_join_the_earlier_ones_and_changed_rows_do_not(commands, student, tmp_path):
    data = write(tmp_path / "rows", review)
    words = ["--task", "allocine_fr", "--data", data, "--student", student, "--epochs", 1, "--output", tmp_path / "out"]
    for seed in (0, 2):
        ended = commands.python("finetune", *words, "--seeds", seed)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    assert results(tmp_path / "out")["summary"]["without"]["seeds"] == [0, 2]
    assert sorted(results(tmp_path / "out")["results"]["without"]) == ["0", "2"]
    rows = data / "train.jsonl"
    rows.write_text(rows.read_text(encoding="utf-8").replace('"label": 1', '"label": 0', 1), encoding="utf-8")
    assert_refused(
        commands.python("finetune", *words, "--seeds", 3),
        "the rows or files of that name differ",
        "Name another --output",
    )


def test_a_teacher_that_was_fine_tuned_here_serves_another_start(commands, compared, student, tmp_path):
    words, output, _ = compared
    data = words[words.index("--data") + 1]
    ended = commands.python(
        *("finetune", "--task", "piaf_qa", "--data", data, "--student", student, "--max_length", 32, "--stride", 8),
        *("--teacher", output / "teacher" / "model", "--soft_targets", "on", "--epochs", 1, "--seeds", 3),
        *("--output", tmp_path / "again"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = results(tmp_path / "again")
    assert sorted(found["results"]) == ["teacher", "with"]
    taught = results(output)["results"]["teacher"]["0"]["figures"]
    assert found["results"]["teacher"]["0"]["figures"] == pytest.approx(taught)


@pytest.mark.parametrize(
    ("task", "row", "metric"), [("ner_fr", sentence, "entity_f1"), ("allocine_fr", review, "accuracy")]
)
def test_tags_and_labels_are_learnt(commands, student, tmp_path, task, row, metric):
    words = ["--task", task, "--data", write(tmp_path / task, row, train=48), "--student", student]
    words += ["--soft_targets", "off", "--epochs", 6, "--lr", 3e-3, "--seeds", 0, "--output", tmp_path / "output"]
    ended = commands.python("finetune", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert results(tmp_path / "output")["summary"]["without"]["mean"][metric] > 90


def test_a_diverged_seed_is_told_and_not_averaged(commands, student, tmp_path):
    words = ["--task", "allocine_fr", "--data", write(tmp_path / "rows", review), "--student", student]
    words += ["--seeds", 0, "--lr", 1e30, "--output", tmp_path / "output"]
    ended = commands.python("finetune", *words)
    assert ended.returncode == 1
    assert "no seed of 'without' kept a finite loss" in ended.stderr
    assert "Traceback" not in ended.stderr
    found = results(tmp_path / "output")
    assert found["summary"]["without"]["diverged"] == [0]
    assert not (tmp_path / "output" / "without" / "seed_0" / "model").exists()


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """A GPT-2 of one layer whose words are characters."""
    folder = tmp_path_factory.mktemp("causal") / "gpt2"
    signs = ["<|endoftext|>", *sorted({chr(value) for value in range(256, 324)} | {chr(v) for v in range(33, 127)})]
    GPT2Tokenizer(vocab={sign: number for number, sign in enumerate(signs)}, merges=[]).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(signs), **sizes)).save_pretrained(folder)
    return folder


def test_a_causal_model_learns_next_words_from_text_and_from_a_teacher(commands, causal, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log\n" * 60)
    words = ["--task", "causal", "--data", text, "--heldout", text, "--student", causal, "--teacher_base", causal]
    words += ["--epochs", 3, "--lr", 1e-2, "--seeds", 0, "--max_length", 32, "--cache", tmp_path / "cache"]
    ended = commands.python("finetune", *words, "--output", tmp_path / "output")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = results(tmp_path / "output")["summary"]
    assert set(found) == {"teacher", "without", "with", "difference"}
    for arm in ("teacher", "without", "with"):
        assert found[arm]["mean"]["perplexity"] < 20  # of some 160 characters
    AutoModelForCausalLM.from_pretrained(tmp_path / "output" / "with" / "seed_0" / "model")


def test_text_as_it_runs_is_learnt_with_its_line_ends(commands, causal, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat \n\n and the dog sat on the log \n" * 60)
    words = ["--task", "causal", "--as_it_runs", "--data", text, "--heldout", text, "--student", causal]
    words += ["--epochs", 3, "--lr", 1e-2, "--seeds", 0, "--max_length", 32]
    ended = commands.python("finetune", *words, "--output", tmp_path / "output")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    tuned = tmp_path / "output" / "without" / "seed_0" / "model"
    whole = commands.python("perplexity", tuned, causal, "--text", text, "--json", tmp_path / "figures.json")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    after, before = json.loads((tmp_path / "figures.json").read_text()).values()
    assert after["tokens"] == len(text.read_text()) - 1  # a token a sign, line ends too
    assert after["perplexity_a_token"] < 20 < before["perplexity_a_token"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "1", "1"], "--seeds 1 1: one stands there twice"),
        (["--split", "dev"], "no rows of 'dev'"),
        (["--as_it_runs"], "--as_it_runs is of --task causal"),
    ],
)
def test_a_mistake_ends_with_one_message_before_anything_is_written(commands, student, tmp_path, words, told):
    data = write(tmp_path / "rows", sentence)
    common = ["--task", "ner_fr", "--data", data, "--student", student, "--output", tmp_path / "output"]
    assert_refused(commands.python("finetune", *common, *words), told)
    assert not (tmp_path / "output").exists()
