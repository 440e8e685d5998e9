"""benchmarks/ablation.py: the steps that arms get in equal time, and what it takes for done."""

import importlib.util
import json

import pytest

from distilcb.config import REPOSITORY
from distilcb.errors import ConfigError


@pytest.fixture
def ablation():
    spec = importlib.util.spec_from_file_location("ablation", REPOSITORY / "benchmarks" / "ablation.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs_at(ablation, monkeypatch):
    """Has short runs end at once, at given tokens a second by arm, turn and step; tells which were started."""
    started = []

    def of(rate):
        def launch(words, run):
            assert words[words.index("--train.steps") + 1] == str(ablation.TIMED_STEPS)
            arm, turn = run.name, int(run.parent.name.removeprefix("turn_"))
            started.append((turn, arm))
            run.mkdir(parents=True)
            steps = range(1, ablation.TIMED_STEPS + 1)
            lines = [{"step": step, "loss": 1.0, "tokens_per_second": rate(arm, turn, step)} for step in steps]
            held_out = {"step": ablation.TIMED_STEPS, "heldout": {}, "tokens_per_second": 1.0}
            (run / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [*lines, held_out]))

        monkeypatch.setattr(ablation, "launch", launch)
        return started

    return of


def asked_for(ablation, folder, *words):
    options = ablation.parser().parse_args(["--equal_time", "--steps", "100", "--runs", str(folder / "runs"), *words])
    options.runs.mkdir(parents=True)
    return options


def test_a_slower_arm_gets_fewer_steps_by_the_median_of_turns(ablation, runs_at, tmp_path):
    # While the machine is slow, in turn 1, both are; in turn 2 only one was held up.
    slow = {("triplet", 1): 0.5, ("relations_too", 1): 0.5, ("relations_too", 2): 0.1}
    base = {"triplet": 1000.0, "relations_too": 800.0}
    started = runs_at(lambda arm, turn, step: (9.0 if step < 4 else 1.0) * base[arm] * slow.get((arm, turn), 1.0))
    steps = ablation.steps_in_equal_time(["triplet", "relations too"], asked_for(ablation, tmp_path))
    assert steps == {"triplet": 100, "relations too": 80}
    assert started == [(turn, arm) for turn in range(3) for arm in ("triplet", "relations_too")]


def test_an_arm_that_ends_kl_is_timed_with_it_and_without(ablation, runs_at, tmp_path):
    # Three quarters at the triplet's rate, a quarter at three times that: 0.75 + 0.25 / 3 of its time.
    runs_at(lambda arm, turn, step: 3000.0 if arm != "triplet" and step > 9 else 1000.0)
    steps = ablation.steps_in_equal_time(["kl off in the last quarter"], asked_for(ablation, tmp_path))
    assert steps == {"kl off in the last quarter": round(100 / (0.75 + 0.25 / 3))}


@pytest.fixture
def trained(ablation, monkeypatch):
    """(arm, seed) of each training that was started, which ends at once."""
    started = []

    def train(arms, seed, _steps, _options):
        started.extend((arm, seed) for arm in arms)
        return {arm: dict.fromkeys(ablation.FIGURES, 0.5) for arm in arms}

    monkeypatch.setattr(ablation, "train", train)
    return started


def compared(ablation, folder, text, *words):
    for part in ("train", "heldout"):
        (folder / text / part).mkdir(parents=True, exist_ok=True)
        (folder / text / part / "a.txt").write_text(f"{text.split('/')[-1]}, {part}\n")
    sources = ["--train", str(folder / text / "train"), "--heldout", str(folder / text / "heldout")]
    places = ["--runs", str(folder / "runs"), "--results", str(folder / "results.json")]
    ablation.main([*sources, *places, *words])


def test_what_is_done_is_left_alone_wherever_its_text_lies_now(ablation, trained, tmp_path, capsys):
    compared(ablation, tmp_path, "here/a", "--arms", "triplet", "--seeds", "1")
    compared(ablation, tmp_path, "there/a", "--arms", "triplet", "without kl", "--seeds", "2")
    assert trained == [("triplet", 0), ("without kl", 0), ("triplet", 1), ("without kl", 1)]
    assert "without kl" in capsys.readouterr().out


def test_results_of_another_text_recipe_or_arm_are_refused(ablation, trained, tmp_path, monkeypatch):
    arms = ["--arms", "triplet", "without kl", "--seeds", "1"]
    compared(ablation, tmp_path, "a", *arms)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ConfigError, match="Name another --results"):
        compared(ablation, tmp_path, "b", *arms)
    with monkeypatch.context() as patch:
        patch.setitem(ablation.ARMS, "without kl", {"loss": {"kl": 0.1}})
        with pytest.raises(ConfigError, match="other settings of without kl"):
            compared(ablation, tmp_path, "a", *arms)
    other = tmp_path / "mini.yaml"
    other.write_text(ablation.RECIPE.read_text().replace("lr: 1.5e-3", "lr: 2.0e-3"))
    monkeypatch.setattr(ablation, "RECIPE", other)
    with pytest.raises(ConfigError, match="Name another --results"):
        compared(ablation, tmp_path, "a", *arms)
    assert (tmp_path / "results.json").read_bytes() == before
    assert len(trained) == 2


def test_signs_are_compared_with_the_published_ones_seed_by_seed(ablation):
    def right(*values):
        return {str(seed): dict.fromkeys(ablation.FIGURES, value) for seed, value in enumerate(values)}

    results = {
        "triplet": right(0.46, 0.47),
        "without kl": right(0.45, 0.45),
        "without mlm": right(0.45, 0.48, 0.1),  # the third seed has no triplet beside it
        "words alone": right(0.44, 0.44),
    }
    rows = {row[0]: row[-4:] for row in ablation.table(results)}
    assert rows["without kl"] == ["-1.50 ± 0.71", "-2.96", "as published", "2"]
    assert rows["without mlm"] == ["+0.00 ± 1.41", "-0.31", "1 of 2 as published", "3"]
    assert rows["words alone"] == ["-2.50 ± 0.71", "–", "–", "2"]
    assert rows["triplet"] == ["–", "–", "–", "2"]
