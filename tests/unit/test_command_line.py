"""A mistake on any command's line is a ConfigError that names the option, before anything is begun."""

import math
import runpy

import pytest

from distilcb.command_line import Parser, number
from distilcb.config import REPOSITORY
from distilcb.errors import ConfigError

# What a line cannot do without.
NEEDED = {
    "doctor": [],
    "evaluate": ["model", "--output", "out"],
    "export": ["run", "--output", "out"],
    "finetune": ["--task", "squad", "--data", "rows", "--student", "model", "--output", "out"],
    "perplexity": ["model", "--text", "a.txt"],
    "plan": ["--gpus", "8", "--gpu", "h100"],
    "prepare": ["--input", "a.txt", "--tokenizer", "model", "--output", "out"],
    "replay": ["run", "--step", "1"],
}


def refusal(command, *words):
    main = runpy.run_path(str(REPOSITORY / "launch" / f"{command}.py"))["main"]
    with pytest.raises(ConfigError) as caught:
        main([*NEEDED[command], *words])
    return str(caught.value)


def test_every_command_is_here_but_training_which_has_a_parser_of_its_own():
    assert {path.stem for path in (REPOSITORY / "launch").glob("*.py")} == NEEDED.keys() | {"train"}


@pytest.mark.parametrize("command", NEEDED)
def test_a_misspelt_option_is_named(command, capsys):
    told = refusal(command, "--ouput", "x")
    assert "--ouput" in told
    if command not in ("plan", "perplexity"):  # which have none
        assert "Did you mean --output?" in told
    assert capsys.readouterr() == ("", "")  # each rank would print it


@pytest.mark.parametrize(
    ("word", "meant"),
    [("--tokeniser=x", "--tokenizer"), ("--min_chars", "--min_characters"), ("--inputs", "--input")],
)
def test_what_may_have_been_meant_is_said(word, meant):
    assert refusal("prepare", word).endswith(f"Did you mean {meant}?")


@pytest.mark.parametrize(
    "word", ["--model", "--teacher", "--workers", "--verbose", "--skip", "--rank", "--local_ranks"]
)
def test_what_is_like_no_option_is_named_alone(word):
    """Dashes and what --help does not show make nothing alike."""
    assert refusal("prepare", word).endswith(word)


@pytest.mark.parametrize("option", ["input", "tokenizer", "output"])
def test_a_name_that_is_empty_is_refused_as_it_would_be_the_folder_one_is_in(option):
    assert f"argument --{option}: came nothing, needed a name" in refusal("prepare", f"--{option}", "")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "0", "-1", "1e-9", "viel"])
@pytest.mark.parametrize(("command", "option"), [("prepare", "--part_megabytes"), ("doctor", "--wait_minutes")])
def test_a_quantity_that_is_none_is_refused_by_its_options_name(command, option, value):
    assert f"argument {option}: came {value}, needed a number, " in refusal(command, f"{option}={value}")


@pytest.mark.parametrize(
    ("command", "option", "value", "needed"),
    [
        ("prepare", "--seq_len", "7", "from 8 to 65536"),
        ("prepare", "--seq_len", "9999999999", "from 8 to 65536"),
        ("prepare", "--processes", "0", "1 or more"),
        ("prepare", "--min_characters", "-1", "0 or more"),
        ("prepare", "--min_characters", "1.5", "0 or more"),
        ("evaluate", "--seq_len", "0", "from 8 to 65536"),
        ("evaluate", "--maskings", "1", "2 or more"),
        ("evaluate", "--maskings", "nan", "2 or more"),
    ],
)
def test_a_count_out_of_range_is_refused_by_its_options_name(command, option, value, needed):
    assert f"argument {option}: came {value}, needed a whole number, {needed}" in refusal(command, f"{option}={value}")


def test_a_patience_beyond_what_a_clock_counts_is_refused():
    assert "--wait_minutes" in refusal("doctor", "--wait_minutes", "1e300")


@pytest.mark.parametrize(
    ("kind", "text", "value"), [(int, "8", 8), (int, "65536", 65_536), (float, "8", 8.0), (float, "8.25", 8.25)]
)
def test_a_number_within_its_limits_is_taken(kind, text, value):
    parser = Parser()
    parser.add_argument("--n", type=number(8, 65_536, kind=kind))
    found = parser.parse_args(["--n", text]).n
    assert (found, type(found)) == (value, kind)


def test_a_number_without_an_upper_limit_is_finite():
    parser = Parser()
    parser.add_argument("--n", type=number(0, kind=float))
    assert math.isfinite(parser.parse_args(["--n", "1e300"]).n)
    with pytest.raises(ConfigError, match="argument --n: came inf, needed a number, 0 or more"):
        parser.parse_args(["--n", "inf"])
