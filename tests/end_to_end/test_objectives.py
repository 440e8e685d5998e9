"""Runs with terms that the published recipes do not have, as users start them."""

import json

import pytest
from refusal import assert_refused

pytestmark = pytest.mark.launch

# Six steps: kl in the first three, relations of the teacher's tenth layer in all.
TERMS = (
    "--loss.kl_until",
    "0.5",
    "--loss.relation",
    "0.5",
    "--loss.relation_layer",
    "10",
    "--loss.relation_heads",
    "16",
)


def lines_of(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line for line in lines if "loss" in line}


@pytest.fixture(scope="module")
def run(commands, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("objectives") / "run"
    ended = commands.python("train", "--run_dir", run_dir, *commands.small, *TERMS)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return run_dir


def test_kl_ends_where_it_is_to_and_the_other_terms_go_on(run):
    lines = lines_of(run)
    assert [lines[step]["loss/kl"] > 0 for step in range(1, 7)] == [True] * 3 + [False] * 3
    assert all(lines[step][f"loss/{term}"] > 0 for step in lines for term in ("mlm", "cos", "relation"))
    for line in lines.values():
        parts = (0.5 * line["loss/kl"], 0.2 * line["loss/mlm"], 0.3 * line["loss/cos"], 0.5 * line["loss/relation"])
        assert line["loss"] == pytest.approx(sum(parts), rel=1e-6)


def test_a_step_after_kl_has_ended_is_replayed_to_the_last_bit_and_by_sample(commands, run):
    ended = commands.python("replay", run, "--step", 5)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "all equal to the last bit" in ended.stdout


def test_stopped_in_the_second_part_it_goes_on_there(commands, run, tmp_path):
    words = ["--run_dir", tmp_path / "run", *commands.small, *TERMS]
    with commands.training(*words, until_step=4):
        pass
    ended = commands.python("train", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert lines_of(tmp_path / "run")[6]["loss"] == lines_of(run)[6]["loss"]


def test_relations_that_cannot_be_are_refused(commands, tmp_path):
    words = ["--run_dir", tmp_path / "run", *commands.small, "--loss.relation", "1", "--loss.relation_heads", "7"]
    ended = commands.python("train", *words, "--loss.relation_layer", "13")
    assert_refused(
        ended, "relation_layer=13: the teacher has 12 layers", "student 128 and teacher 128, must be multiples"
    )
