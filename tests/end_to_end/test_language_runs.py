"""A run on several languages as users start it: killed and resumed, on two ranks, replayed, refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusal import assert_refused

pytestmark = pytest.mark.launch

TERMS = ("loss", "loss/kl", "loss/mlm", "loss/cos", "lr", "grad_norm")


@pytest.fixture(scope="module")
def words(commands) -> list[str]:
    """Options of a small run on three texts, as if each were a language."""
    names = ",".join(f"{commands.text}/train/{name}.txt" for name in ("lettres", "debats", "recettes"))
    return [*commands.small, "--data.train", names, "--data.language_exponent", "0.5"]


@pytest.fixture(scope="module")
def runs(commands, words, tmp_path_factory) -> dict[str, Any]:
    """The run undisturbed, as it was when it was killed, and resumed; and what the first one said."""
    folder = tmp_path_factory.mktemp("languages")
    whole, resumed, killed = folder / "whole", folder / "resumed", folder / "killed"
    commands.train_until_killed(resumed, *words, after_step=3)
    shutil.copytree(resumed, killed)
    said = ""
    for run_dir in (resumed, whole):
        ended = commands.python("train", "--run_dir", run_dir, *words)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        said = ended.stderr
    return {"whole": whole, "resumed": resumed, "killed": killed, "said": said}


def curve(lines: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    return {line["step"]: tuple(line[name] for name in TERMS) for line in lines if "loss" in line}


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


def test_a_killed_and_resumed_run_equals_an_undisturbed_one(runs, metrics):
    assert curve(metrics(runs["resumed"])) == curve(metrics(runs["whole"]))
    assert weights(runs["resumed"]) == weights(runs["whole"])


def test_each_language_is_told_with_its_share(runs):
    shares = [line for line in runs["said"].splitlines() if "% of the samples" in line]
    assert len(shares) == 3
    assert sum(float(line.split("blocks, ")[1].split("%")[0]) for line in shares) == pytest.approx(100, abs=0.02)


def test_a_run_killed_on_one_rank_goes_on_on_two_with_the_same_samples(commands, words, runs, metrics, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(runs["killed"], run_dir)
    ended = commands.deepspeed(2, "train", "--run_dir", run_dir, *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    resumed, whole = curve(metrics(run_dir)), curve(metrics(runs["whole"]))
    assert list(resumed) == list(whole)
    for step, figures in whole.items():
        assert resumed[step] == pytest.approx(figures, rel=1e-4), step


def test_a_replayed_step_is_equal_to_its_line(commands, runs):
    ended = commands.python("replay", runs["whole"], "--step", "5")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all equal to the last bit" in ended.stdout


def test_the_languages_are_facts_of_the_run(runs):
    facts = yaml.safe_load((runs["whole"] / "config.yaml").read_text())["provenance"]["facts"]
    assert len(set(facts["text"]["train"])) == 3


@pytest.mark.parametrize("other", ["order", "exponent", "one text"])
def test_a_run_with_other_languages_does_not_go_on(commands, words, runs, other):
    names = words[words.index("--data.language_exponent") - 1].split(",")
    change, told = {
        "order": (["--data.train", ",".join(reversed(names))], "the languages are in another order"),
        "exponent": (["--data.language_exponent", "0.7"], "data.language_exponent: 0.5 -> 0.7"),
        "one text": (["--data.language_exponent", "null"], "data.language_exponent: 0.5 -> None"),
    }[other]
    ended = commands.python("train", "--run_dir", runs["killed"], *words, *change)
    assert_refused(ended, told)


def test_a_dry_run_needs_no_text_of_any_language(commands, words, tmp_path):
    run_dir = tmp_path / "run"
    ended = commands.python("train", "--run_dir", run_dir, *words, "--data.train", "[]", "--dry_run")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "projected_hours" in ended.stdout


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ("{text}/train", "names one text"),
        ("{text}/train,no_language", "no_language does not exist"),
        ("{text}/train,{text}/train/debats.txt", "both hold"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(commands, words, tmp_path, names, told):
    options = ["--data.train", names.format(text=commands.text), "--teacher.model", "no_teacher"]
    ended = commands.python("train", "--run_dir", tmp_path / "run", *words, *options)
    assert_refused(ended, told)
    assert not (tmp_path / "run").exists()
