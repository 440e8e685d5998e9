"""Steps that the arms of benchmarks/ablation.py get in equal time."""

import importlib.util
import json

import pytest

from distilcb.config import REPOSITORY


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
