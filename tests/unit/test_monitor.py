"""The work of a token, what gathers between two logging steps, and where figures end up."""

import json
import os
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode

from distilcb.monitor.metrics import ModelShape, Window, flops_per_token, peak_flops, peak_memory_bytes
from distilcb.monitor.writers import RunWriter, StepBar

CPU = torch.device("cpu")
CAMEMBERT = ModelShape(layers=12, hidden=768, intermediate=3072, vocab=32005)
DISTILLED = ModelShape(layers=6, hidden=768, intermediate=3072, vocab=32005)


def test_a_token_of_camembert_into_six_layers_takes_673_mflop_with_kl_on_every_token():
    found = flops_per_token(DISTILLED, CAMEMBERT, seq_len=512, soft_share=1.0, head_share=1.0)
    assert found == pytest.approx(673e6, rel=0.01)


def test_a_token_of_camembert_into_six_layers_takes_502_mflop_with_kl_on_masked_tokens():
    found = flops_per_token(DISTILLED, CAMEMBERT, seq_len=512, soft_share=0.15, head_share=0.15)
    assert found == pytest.approx(502e6, rel=0.01)


def test_flops_of_a_hand_computed_case():
    student = ModelShape(layers=1, hidden=2, intermediate=3, vocab=5)
    assert student.layer_parameters == 4 * 2 * 2 + 2 * 2 * 3  # four square matrices, two to and from the middle
    head, attention = 2 * (5 + 2), 4 * 2  # decoder and dense; scores and values over 4 tokens
    wanted = 6 * (28 + 0.5 * head) + 3 * 2 * 2 * attention
    assert flops_per_token(student, None, seq_len=4, soft_share=0.0, head_share=0.5) == wanted
    assert wanted == 306


def test_a_teacher_costs_what_its_forward_pass_does(tiny_model, tiny_batch):
    model = tiny_model(layers=3, attn_implementation="eager")
    shape = ModelShape(3, 32, 48, 101)
    batch = tiny_batch(blocks=2, length=16)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.input_ids)
    with_teacher, alone = (
        flops_per_token(DISTILLED, teacher, seq_len=16, soft_share=1.0, head_share=1.0) for teacher in (shape, None)
    )
    assert with_teacher - alone == counter.get_total_flops() / batch.input_ids.numel()


def test_a_student_costs_three_times_its_forward_pass(tiny_model, tiny_batch):
    model = tiny_model(layers=3, attn_implementation="eager")
    shape = ModelShape(3, 32, 48, 101)
    batch = tiny_batch(blocks=2, length=16)
    with FlopCounterMode(display=False) as counter:
        model(batch.input_ids).logits.sum().backward()
    found = flops_per_token(shape, None, seq_len=16, soft_share=0.0, head_share=1.0)
    assert found == counter.get_total_flops() / batch.input_ids.numel()


def test_a_cpu_has_no_known_peak_and_some_memory_in_use():
    assert peak_flops(CPU) is None
    assert peak_memory_bytes(CPU) > 10 * 2**20  # an interpreter with torch in it


@pytest.mark.parametrize(("name", "tflops"), [("NVIDIA H200", 989), ("Tesla V100-SXM2-32GB", 125), ("Unknown", None)])
def test_the_peak_is_found_by_the_name_of_the_device(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    assert peak_flops(torch.device("cuda", 0)) == (tflops and tflops * 1e12)


def test_a_window_sums_what_its_steps_bring():
    window = Window(2, CPU)
    window.add(torch.tensor([1.0, 10.0]), skipped=False, data_wait_seconds=0.25)
    window.add(torch.tensor([2.0, 20.0]), skipped=True, data_wait_seconds=0.5)
    assert window.sums.tolist() == [3.0, 30.0]
    assert (window.steps, window.skipped, window.data_wait_seconds) == (2, 1, 0.75)


def test_a_window_keeps_small_terms_beside_large_sums():
    window = Window(1, CPU)
    for value in (2.0**30, 1.0, 1.0):  # in fp32, 2^30 + 1 is 2^30
        window.add(torch.tensor([value]), skipped=False, data_wait_seconds=0.0)
    assert window.sums.item() == 2**30 + 2


def test_a_window_leaves_pauses_out_of_its_time(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    window = Window(1, CPU)
    now[0] = 107.0
    window.pause(3.0)
    assert window.seconds() == 4.0


def test_a_window_never_lasts_no_time_at_all(monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    assert Window(1, CPU).seconds() > 0


def training_record(step, **figures):
    return {"step": step, "tokens": step * 100, "epoch": 0.5, "seconds": 1.0, "loss": 2.0 + step,
            "tokens_per_second": 10.0} | figures  # fmt: skip


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def board_of(folder):
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    return board


def curve(folder, tag):
    return [(event.step, event.value) for event in board_of(folder).Scalars(tag)]


def write_run(folder, steps, *, first_step=0, **figures):
    """A start that logs a step and an evaluation at each of `steps`."""
    with RunWriter(folder, steps=100, first_step=first_step) as writer:
        if first_step == 0:
            writer.evaluation(0, {"student": {"mlm_loss": 9.0}})
        for step in steps:
            writer.bar.advance()
            writer.training(training_record(step, **figures))
            writer.evaluation(step, {"student": {"mlm_loss": 5.0}})


def test_a_logged_step_is_a_line_and_curves_under_train(tmp_path):
    record = training_record(5, **{"loss/kl": 1.5, "lr": 0.25, "skipped_steps": 0})
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.training(record)
    assert lines_of(tmp_path) == [record]
    wanted = {"train/loss": 7.0, "train/loss/kl": 1.5, "train/lr": 0.25, "train/skipped_steps": 0.0,
              "train/tokens_per_second": 10.0}  # fmt: skip
    assert set(board_of(tmp_path).Tags()["scalars"]) == wanted.keys()
    for tag, value in wanted.items():
        assert curve(tmp_path, tag) == [(5, value)]


def test_a_figure_that_is_not_known_is_null_in_the_line_and_no_curve(tmp_path):
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.training(training_record(5, grad_norm=None))
    assert lines_of(tmp_path)[0]["grad_norm"] is None
    assert "train/grad_norm" not in board_of(tmp_path).Tags()["scalars"]


def test_held_out_figures_are_a_line_and_curves_under_eval(tmp_path):
    figures = {
        "student": {"mlm_loss": 2.5, "kl": 0.5, "standard_error": {"mlm_loss": 0.1}},
        "teacher": {"mlm_loss": 2.0, "standard_error": {"mlm_loss": 0.1}},
    }
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.evaluation(7, figures)
    wanted = {"eval/student/mlm_loss": 2.5, "eval/student/kl": 0.5, "eval/teacher/mlm_loss": 2.0}
    assert lines_of(tmp_path) == [{"step": 7} | wanted]
    assert {tag: curve(tmp_path, tag) for tag in wanted} == {tag: [(7, value)] for tag, value in wanted.items()}


def test_lines_are_on_disk_before_the_run_ends(tmp_path):
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.training(training_record(1))
        assert len(lines_of(tmp_path)) == 1


def test_a_resumed_run_drops_lines_and_points_after_its_first_step(tmp_path):
    write_run(tmp_path, (10, 20, 30))
    write_run(tmp_path, (30, 40), first_step=20)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 10, 10, 20, 20, 30, 30, 40, 40]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [10, 20, 30, 40]
    assert [step for step, _ in curve(tmp_path, "eval/student/mlm_loss")] == [0, 10, 20, 30, 40]


def test_a_run_killed_before_its_first_checkpoint_begins_its_lines_and_points_anew(tmp_path):
    write_run(tmp_path, (10, 20))
    write_run(tmp_path, (15,))
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 15, 15]
    assert [step for step, _ in curve(tmp_path, "train/loss")] == [15]
    assert [step for step, _ in curve(tmp_path, "eval/student/mlm_loss")] == [0, 15]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_by_a_kill_is_dropped_and_the_next_one_is_whole(tmp_path, cut):
    write_run(tmp_path, (10,))
    path = tmp_path / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(training_record(10, loss=1e9))[:cut])
    write_run(tmp_path, (20,), first_step=10)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 10, 10, 20, 20]


def test_dropping_lines_leaves_no_temporary_file(tmp_path):
    write_run(tmp_path, (10, 20))
    write_run(tmp_path, (20,), first_step=10)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "tensorboard"]


def test_settings_and_results_are_in_the_hparams_tab(tmp_path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    settings = {"optim.lr": 5e-4, "train.steps": 100, "student.init": "teacher", "student.num_layers": None,
                "optim.betas": [0.9, 0.98], "masking.whole_word": False}  # fmt: skip
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.results(settings, {"heldout/mlm_loss": 2.5})
    content = board_of(tmp_path).PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info
    found = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    assert found == {"optim.lr": 5e-4, "train.steps": 100.0, "student.init": "teacher", "student.num_layers": "null",
                     "optim.betas": "[0.9, 0.98]", "masking.whole_word": False}  # fmt: skip
    assert [value for _, value in curve(tmp_path, "heldout/mlm_loss")] == [2.5]


def test_a_text_is_in_the_text_tab(tmp_path):
    with RunWriter(tmp_path, steps=10, first_step=0) as writer:
        writer.text("fill_mask", "- Un <mask>.  ->  chat 42%", 3)
    (event,) = board_of(tmp_path).Tensors("fill_mask/text_summary")
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode() == "- Un <mask>.  ->  chat 42%"


def test_the_bar_counts_from_the_first_step_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with RunWriter(tmp_path, steps=10, first_step=6) as writer:
        writer.bar.advance()
        writer.training(training_record(7))
    shown = capsys.readouterr().err
    assert "7/10" in shown
    assert "loss=9.000" in shown


def test_where_nobody_watches_a_logged_step_is_a_line_with_the_time_left(tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    with RunWriter(tmp_path, steps=10, first_step=6) as writer:
        writer.bar.advance()
        writer.training(training_record(7) | {"tokens": 7 * 512, "tokens_per_second": 51.2})
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["step 7 of 10, loss 9.000, 51 tokens/s, 00:30 left"]


def test_students_share_one_bar_with_the_loss_of_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = StepBar(steps=10, first_step=6)
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    writers = [RunWriter(each, steps=10, first_step=6, bar=bar, student=each.name) for each in folders]
    writers[0].bar.advance()
    for number, writer in enumerate(writers):
        writer.training(training_record(7) | {"loss": float(number)})
    writers[0].bar.end()
    shown = capsys.readouterr().err
    assert "7/10" in shown
    assert "8/10" not in shown
    assert "a=0.000, b=1.000, tokens_per_s" in shown


def test_where_nobody_watches_a_line_names_its_student(tmp_path, caplog):
    caplog.set_level("INFO")
    with RunWriter(tmp_path, steps=10, first_step=6, student="two_layers") as writer:
        writer.training(training_record(7) | {"tokens": 7 * 512, "tokens_per_second": 51.2})
    assert caplog.messages == ["two_layers: step 7 of 10, loss 9.000, 51 tokens/s, 00:30 left"]


def test_an_open_window_of_a_version_that_knew_fewer_terms_goes_on():
    window = Window(3, CPU)
    state = {"sums": [[1.0, 2.0]], "steps": 4, "skipped": 0, "seconds": 1.0, "data_wait_seconds": 0.5}
    window.restore(state, rank=0, world_size=1)
    assert window.sums.tolist() == [1.0, 2.0, 0.0]


def test_an_open_window_goes_on_with_each_ranks_own_sums_or_on_other_ranks_with_their_total():
    window = Window(2, CPU)
    window.add(torch.tensor([1.0, 2.0], dtype=torch.float64), skipped=True, data_wait_seconds=0.5)
    state = window.state([[1.0, 2.0], [10.0, 20.0]])
    restored = {}
    for rank, size in ((0, 2), (1, 2), (0, 3), (2, 3)):
        restored[rank, size] = Window(2, CPU)
        restored[rank, size].restore(state, rank=rank, world_size=size)
    assert {place: each.sums.tolist() for place, each in restored.items()} == {
        (0, 2): [1.0, 2.0], (1, 2): [10.0, 20.0], (0, 3): [11.0, 22.0], (2, 3): [0.0, 0.0]
    }  # fmt: skip
    assert (restored[0, 3].steps, restored[0, 3].skipped, restored[0, 3].data_wait_seconds) == (1, 1, 0.5)
    assert restored[0, 3].seconds() >= window.seconds() - 1
