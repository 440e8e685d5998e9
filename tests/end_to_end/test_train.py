"""launch/train.py as users start it: run folder, resuming, refusals, two ranks."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from refusal import assert_refused

from distilcb.command_line import parse_command_line
from distilcb.config import REPOSITORY, flatten, to_plain

pytestmark = pytest.mark.launch

STEPS, BATCH_TOKENS = 6, 8 * 32
TERMS = ("loss", "loss/kl", "loss/mlm", "loss/cos", "lr", "grad_norm")


@pytest.fixture(scope="module")
def text_hash(finished) -> dict[str, str]:
    return yaml.safe_load((finished / "config.yaml").read_text())["provenance"]["facts"]["text"]


@pytest.fixture(scope="module")
def interrupted(commands, tmp_path_factory) -> dict[str, Path]:
    """A run that is killed before its first checkpoint, and after one; the folder then, and once it has finished.

    The second and third start change what may be changed.
    """
    folder = tmp_path_factory.mktemp("interrupted")
    run_dir = folder / "run"
    commands.train_until_killed(run_dir, *commands.small, after_step=1)
    commands.train_until_killed(run_dir, *commands.small, "--data.workers", "1", after_step=3)
    shutil.copytree(run_dir, folder / "killed")
    watched = ["--train.eval_every", "5", "--data.sample_sentences", "[Un <mask>.]"]
    kept = ["--train.keep_checkpoints", "1", "--train.save_every", "3"]
    ended = commands.python("train", "--run_dir", run_dir, *commands.small, *watched, *kept)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "resuming from" in ended.stderr
    return {"killed": folder / "killed", "finished": run_dir}


@pytest.fixture(scope="module")
def on_two_ranks(commands, tmp_path_factory) -> dict[str, Path]:
    """The same run under the deepspeed launcher: undisturbed, killed, and that one resumed."""
    folder = tmp_path_factory.mktemp("two_ranks")
    whole, resumed, killed = folder / "whole", folder / "resumed", folder / "killed"
    commands.train_until_killed(resumed, *commands.small, after_step=3, ranks=2)
    shutil.copytree(resumed, killed)
    for run_dir in (whole, resumed):
        ended = commands.deepspeed(2, "train", "--run_dir", run_dir, *commands.small)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return {"whole": whole, "resumed": resumed, "killed": killed}


def curve(lines: list[dict[str, Any]]) -> dict[int, tuple[float, ...]]:
    """What was computed at each step; a step that was logged twice fails."""
    trained = [line for line in lines if "loss" in line]
    assert len({line["step"] for line in trained}) == len(trained)
    return {line["step"]: tuple(line[name] for name in TERMS) for line in trained}


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def weights(run_dir: Path) -> bytes:
    return (run_dir / "student" / "model.safetensors").read_bytes()


def test_a_twice_killed_and_resumed_run_equals_an_undisturbed_one(finished, interrupted, metrics):
    assert curve(metrics(interrupted["finished"])) == curve(metrics(finished))
    assert list(curve(metrics(finished))) == list(range(1, STEPS + 1))
    assert weights(interrupted["finished"]) == weights(finished)


def test_a_resumed_run_ends_with_the_held_out_figures_of_an_undisturbed_one(finished, interrupted):
    figures = [json.loads((run / "summary.json").read_text())["heldout"] for run in (finished, interrupted["finished"])]
    assert figures[0] == figures[1]


def test_a_run_on_two_ranks_equals_one_on_one_rank_but_for_rounding(finished, on_two_ranks, metrics):
    one, two = curve(metrics(finished)), curve(metrics(on_two_ranks["whole"]))
    assert one.keys() == two.keys()
    for step in one:
        assert two[step] == pytest.approx(one[step], rel=1e-4), step


def test_a_killed_and_resumed_run_on_two_ranks_equals_an_undisturbed_one(on_two_ranks, metrics):
    whole, resumed = on_two_ranks["whole"], on_two_ranks["resumed"]
    assert curve(metrics(resumed)) == curve(metrics(whole))
    assert weights(resumed) == weights(whole)


def test_a_run_folder_holds_what_it_promises(finished):
    there = {str(path.relative_to(finished)) for path in finished.rglob("*")}
    assert {"config.yaml", "metrics.jsonl", "summary.json", "DONE", "checkpoints/latest"} <= there
    assert {"student/config.json", "student/model.safetensors", "student/README.md"} <= there
    assert any(name.startswith("tensorboard/events.out.tfevents") for name in there)
    steps = [name for name in there if name.startswith("checkpoints/step_") and name.count("/") == 1]
    assert sorted(steps) == ["checkpoints/step_00000004", "checkpoints/step_00000006"]
    assert (finished / "checkpoints" / "latest").read_text().strip() == "step_00000006"


def test_config_yaml_says_what_was_run_and_with_what(finished, commands):
    document = yaml.safe_load((finished / "config.yaml").read_text())
    provenance = document.pop("provenance")
    words = ["--run_dir", str(finished), *commands.small]
    assert flatten(document) == flatten(to_plain(parse_command_line(words).config))
    assert provenance["recipe"] == str(REPOSITORY / "recipes" / "mini.yaml")
    assert provenance["command_line"] == " ".join(["launch/train.py", *words])
    assert {"python", "torch", "deepspeed", "transformers", "distilcb"} <= provenance["versions"].keys()
    if (REPOSITORY / ".git").exists():
        assert len(provenance["git_commit"].split("+")[0]) == 40


def test_each_line_of_the_metrics_holds_the_figures_of_a_step(finished, metrics):
    trained = [line for line in metrics(finished) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    for line in trained:
        assert line["tokens"] == line["step"] * BATCH_TOKENS
        assert line["loss"] == pytest.approx(0.5 * line["loss/kl"] + 0.2 * line["loss/mlm"] + 0.3 * line["loss/cos"])
        assert line["loss_scale"] == 1.0
        for name in ("lr", "grad_norm", "tokens_per_second", "memory_bytes"):
            assert line[name] > 0
    assert trained[-1]["loss"] < trained[0]["loss"]


def test_evaluations_have_lines_of_their_own(finished, interrupted, metrics):
    for run_dir, steps in ((finished, [0, 6]), (interrupted["finished"], [0, 5, 6])):
        evaluations = [line for line in metrics(run_dir) if "loss" not in line]
        assert [line["step"] for line in evaluations] == steps
        for line in evaluations:
            assert {"eval/teacher/mlm_loss", "eval/student/mlm_loss", "eval/student/kl"} <= line.keys()


def test_summary_json_holds_held_out_and_training_figures(finished, metrics):
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary["heldout"]) == {"teacher", "student_start", "student"}
    for figures in summary["heldout"].values():
        assert figures["perplexity"] == pytest.approx(math.exp(figures["mlm_loss"]))
        assert 0 < figures["mlm_accuracy"] < 1
        assert figures["standard_error"]["mlm_loss"] > 0
    train = summary["train"]
    assert (train["steps"], train["tokens"]) == (STEPS, STEPS * BATCH_TOKENS)
    assert (train["world_size"], train["precision"]) == (1, "fp32")
    assert train["tokens_per_second"] == pytest.approx(train["tokens"] / train["seconds"])
    assert train["peak_memory_bytes"] >= metrics(finished)[-2]["memory_bytes"]


@pytest.fixture(scope="module")
def board(finished) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(finished / "tensorboard")).Reload()


def test_tensorboard_has_the_curves(board, finished, metrics):
    tags = set(board.Tags()["scalars"])
    names = ("loss", "loss/kl", "loss/mlm", "loss/cos", "lr", "grad_norm", "loss_scale", "tokens_per_second")
    assert {f"train/{name}" for name in (*names, "memory_bytes", "data_wait_fraction")} <= tags
    assert {f"eval/student/{name}" for name in ("kl", "mlm_loss", "perplexity", "mlm_accuracy", "agreement")} <= tags
    logged = {line["step"]: line["loss"] for line in metrics(finished) if "loss" in line}
    curve = {event.step: event.value for event in board.Scalars("train/loss")}
    assert curve == pytest.approx(logged)
    assert [event.step for event in board.Scalars("eval/student/kl")] == [0, STEPS]


def test_tensorboard_shows_sentences_filled_by_the_student(board):
    (tag,) = [tag for tag in board.Tags()["tensors"] if tag.startswith("fill_mask")]
    texts = [event.tensor_proto.string_val[0].decode() for event in board.Tensors(tag)]
    assert [event.step for event in board.Tensors(tag)] == [0, STEPS]
    assert all(text.count("<mask>") == 3 for text in texts)


def test_tensorboard_has_hyperparameters_and_their_results(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {}
    for path in (finished / "tensorboard").iterdir():
        board = EventAccumulator(str(path)).Reload()
        if "_hparams_/session_start_info" in board.summary_metadata:
            content = board.summary_metadata["_hparams_/session_start_info"].plugin_data.content
            settings = dict(HParamsPluginData.FromString(content).session_start_info.hparams)
            assert "heldout/mlm_loss" in board.Tags()["scalars"]
    assert settings["optim.global_batch"].number_value == 8
    assert settings["deepspeed"].string_value == "zero2_cpu"


def test_curves_of_a_resumed_run_have_every_step_once(interrupted):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(interrupted["finished"] / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_a_run_that_is_done_is_left_alone(commands, finished):
    before = snapshot(finished)
    ended = commands.python("train", "--run_dir", finished, *commands.small, "--train.log_every", "3")
    assert ended.returncode == 0
    assert "is DONE" in ended.stderr
    assert snapshot(finished) == before


def test_other_settings_are_refused_with_a_list_of_them(commands, interrupted):
    before = snapshot(interrupted["killed"])
    other = ["--optim.lr", "0.002", "--loss.kl", "0.4", "--optim.micro_batch", "2"]
    ended = commands.python("train", "--run_dir", interrupted["killed"], *commands.small, *other)
    assert_refused(ended, "optim.lr: 0.001 -> 0.002", "loss.kl: 0.5 -> 0.4", "--fresh", str(interrupted["killed"]))
    assert "micro_batch" not in ended.stderr  # it may be changed
    assert snapshot(interrupted["killed"]) == before


def test_changed_text_is_refused(commands, interrupted):
    letters = commands.text / "train" / "lettres.txt"
    original, before = letters.read_bytes(), snapshot(interrupted["killed"])
    try:
        letters.write_bytes(original + b"Une ligne de plus.\n")
        ended = commands.python("train", "--run_dir", interrupted["killed"], *commands.small)
    finally:
        letters.write_bytes(original)
    assert_refused(ended, "text", "--fresh")
    assert snapshot(interrupted["killed"]) == before


def test_a_run_killed_on_two_ranks_goes_on_on_one(commands, on_two_ranks, metrics, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(on_two_ranks["killed"], run_dir)
    ended = commands.python("train", "--run_dir", run_dir, *commands.small)
    assert ended.returncode == 0, ended.stderr
    assert "from 2 ranks to 1" in ended.stderr
    resumed, whole = curve(metrics(run_dir)), curve(metrics(on_two_ranks["whole"]))
    assert list(resumed) == list(whole)
    for step, figures in whole.items():
        assert resumed[step] == pytest.approx(figures, rel=1e-4)
    assert not list((run_dir / "checkpoints").glob("*universal*"))


@pytest.fixture(scope="module")
def prepared(commands, tmp_path_factory) -> Path:
    """The text as launch/prepare.py leaves it."""
    output = tmp_path_factory.mktemp("prepared") / "blocks"
    teacher = REPOSITORY / "recipes" / "mini" / "teacher"
    words = ["--input", commands.text / "train", "--tokenizer", teacher, "--output", output, "--seq_len", "32"]
    ended = commands.python("prepare", *words)
    assert ended.returncode == 0, ended.stderr
    assert str(output) in ended.stdout
    return output


@pytest.fixture(scope="module")
def afresh(commands, prepared, finished, interrupted) -> tuple[Path, Any]:
    """A run without teacher, on prepared blocks, started with --fresh in a folder that holds another run."""
    run_dir = interrupted["killed"].with_name("afresh")
    shutil.copytree(interrupted["killed"], run_dir)
    alone = ["--teacher.model", "null", "--student.init", finished / "student", "--loss.kl", "0", "--loss.cos", "0"]
    words = [*commands.small[: commands.small.index("--data.heldout")], *commands.data, *alone]
    ended = commands.python("train", "--run_dir", run_dir, "--fresh", "--data.train", prepared, *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return run_dir, ended


def test_fresh_moves_the_run_that_was_there_aside(afresh, interrupted):
    run_dir, ended = afresh
    (aside,) = run_dir.parent.glob("afresh.*")
    assert str(aside) in ended.stderr
    moved, original = snapshot(aside), snapshot(interrupted["killed"])
    assert [size for size, _ in moved.values()] == [size for size, _ in original.values()]
    assert (run_dir / "DONE").exists()


def test_prepared_blocks_are_those_that_raw_text_becomes(afresh, text_hash):
    facts = yaml.safe_load((afresh[0] / "config.yaml").read_text())["provenance"]["facts"]
    assert facts["text"] == text_hash


def test_a_student_trains_on_masked_words_alone(afresh, finished, metrics):
    run_dir, _ = afresh
    trained = [line for line in metrics(run_dir) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, STEPS + 1))
    for line in trained:
        assert line["loss"] == pytest.approx(0.2 * line["loss/mlm"])
        assert not {"loss/kl", "loss/cos"} & line.keys()
    heldout = json.loads((run_dir / "summary.json").read_text())["heldout"]
    assert set(heldout) == {"student_start", "student"}
    before = json.loads((finished / "summary.json").read_text())["heldout"]["student"]
    assert heldout["student_start"]["mlm_loss"] == pytest.approx(before["mlm_loss"], rel=1e-5)
    config = json.loads((run_dir / "student" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6  # of the folder that it continued from, not half of them


def test_an_automatic_micro_batch_is_a_number_in_the_run_folder_and_stays_when_the_run_goes_on(commands, tmp_path):
    run_dir = tmp_path / "run"
    small = [*commands.small, "--optim.micro_batch", "auto"]
    commands.train_until_killed(run_dir, *small, after_step=3)
    settings = flatten(yaml.safe_load((run_dir / "config.yaml").read_text()))
    assert settings["optim.micro_batch"] == settings["optim.global_batch"]  # 8 sequences of 32 tokens
    ended = commands.python("train", "--run_dir", run_dir, *small)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "optim.micro_batch: 8 (auto: as the run began)" in ended.stderr


def test_activation_checkpointing_changes_nothing_but_memory(finished, commands, metrics, tmp_path):
    run_dir = tmp_path / "run"
    ended = commands.python("train", "--run_dir", run_dir, *commands.small, "--train.activation_checkpointing", "true")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert curve(metrics(run_dir)) == curve(metrics(finished))
    assert weights(run_dir) == weights(finished)
