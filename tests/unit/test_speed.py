"""Sizes and speeds side by side."""

import json
import time

import pytest

from distilcb.errors import ModelError
from distilcb.eval.speed import check_lengths, in_turn, sizes, speed_rows, speeds, time_models, write_speeds
from distilcb.export.onnx import INT8, ONNX, export_onnx


@pytest.fixture
def models(tiny_model, tmp_path):
    """The folders of a teacher of eight layers, and a student of one."""
    found = {}
    for name, layers in (("teacher", 8), ("student", 1)):
        tiny_model(layers=layers).save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


def test_contenders_have_their_turns_and_the_first_round_does_not_count():
    calls = []
    slow = [0.05, 0.0, 0.0]
    found = in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b") or time.sleep(slow.pop(0))}, rounds=2
    )
    assert calls == ["a", "b"] * 3
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    assert max(found["b"]) < 0.05


def test_sizes_are_those_of_weights_and_files(models, tiny_model, tmp_path):
    found, model = sizes(models["student"]), tiny_model(layers=1)
    assert found["parameters"] == sum(each.numel() for each in model.parameters())
    assert found["in_layers"] == sum(each.numel() for each in model.roberta.encoder.layer.parameters())
    assert found["bytes"] == {"model.safetensors": (tmp_path / "student" / "model.safetensors").stat().st_size}


def test_every_model_is_timed_at_every_length_that_all_have_positions_for(models):
    found = speeds(models, lengths=(4, 16, 512), batches={1: 15, 2: 1})
    assert list(found) == ["teacher", "student"]
    assert all(list(times) == ["1 x 4", "2 x 4", "1 x 16", "2 x 16"] for times in found.values())
    assert found["student"]["1 x 16"] < found["teacher"]["1 x 16"]


def test_onnx_and_int8_are_timed_where_they_are_there(models, tmp_path):
    export_onnx(tmp_path / "student", int8=True)
    found = speeds(models, lengths=(8,), batches={1: 2})
    assert list(found) == ["teacher", "student", "student, onnx", "student, int8"]
    rows = speed_rows({name: sizes(model) for name, model in models.items()}, found, beside="teacher")
    for row, file in zip(rows[2:], ("model.safetensors", ONNX, INT8), strict=True):
        assert row[2] == f"{(tmp_path / 'student' / file).stat().st_size / 1e6:,.1f}"


def test_rows_have_times_and_ratios():
    facts = {"parameters": 2_500_000, "in_layers": 1, "bytes": {"model.safetensors": 10_000_000}}
    seconds = {"teacher": {"1 x 16": 0.02, "32 x 16": 0.4}, "student": {"1 x 16": 0.01, "32 x 16": 0.1}}
    rows = speed_rows({"teacher": facts, "student": facts}, seconds, beside="teacher")
    assert rows[0] == ["", "parameters", "MB", "16 tokens: ms, ratio", "32 of 16: texts/s, ratio"]
    assert rows[2] == ["student", "2.5 M", "10.0", "10.0, 2.00", "320.0, 4.00"]
    strange = {"a, b": facts, "c, onnx": facts}
    rows = speed_rows(strange, {name: {"1 x 4": 0.01} for name in [*strange, "a, b, int8"]}, beside="a, b")
    assert [row[:2] for row in rows[1:]] == [["a, b", "2.5 M"], ["c, onnx", "2.5 M"], ["a, b, int8", ""]]
    with pytest.raises(ModelError, match="nobody is none of teacher, student"):
        speed_rows({}, seconds, beside="nobody")


def test_what_was_measured_is_written(models, tmp_path):
    timed = time_models(models, lengths=(4, 512))
    page = write_speeds(tmp_path / "output", timed)
    assert "Ratio: the time of teacher over that of the row. Not timed: 512 tokens, for which a model" in page
    assert (tmp_path / "output" / "speed.md").read_text() == page + "\n"
    kept = json.loads((tmp_path / "output" / "speed.json").read_text())
    assert kept["seconds"] == timed.seconds
    assert kept["sizes"] == timed.sizes == {name: sizes(model) for name, model in models.items()}
    assert kept["where"]["device"] == "cpu"


def test_lengths_that_no_model_has_positions_for_are_told_before_anything_is_timed(models):
    with pytest.raises(ModelError, match=r"--lengths 512: teacher has positions for 40 tokens\."):
        check_lengths(models, (1024, 512))
    check_lengths(models, (1024, 40))
