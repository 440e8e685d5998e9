"""The benchmarks run, and say what they measured."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from distilcb.config import REPOSITORY

pytestmark = pytest.mark.launch


def run(*words):
    return subprocess.run(list(map(str, words)), cwd=REPOSITORY, capture_output=True, text=True, timeout=400)


def figures_of(name, folder, *words):
    """What a quick run of a benchmark leaves as data."""
    ended = run(sys.executable, f"benchmarks/{name}.py", "--quick", "--json", folder / "f.json", *words)
    assert ended.returncode == 0, ended.stderr
    return json.loads((folder / "f.json").read_text()), ended.stdout


def test_the_heads_benchmark_tells_time_memory_and_error(tmp_path):
    figures, said = figures_of("head", tmp_path, "--report", tmp_path / "r.md")
    assert figures["error, streamed"]["loss"] < 1e-3
    assert figures["error, streamed"]["decoder"] < 1.2 * figures["error, plain"]["decoder"]
    streamed = figures["streamed, 1024 tokens"]
    assert 0 < streamed["memory_share_of_plain"] < 0.5
    assert streamed["seconds"] > 0
    assert (tmp_path / "r.md").read_text() in said + "\n"


def test_the_steps_benchmark_has_every_contender(tmp_path):
    found, _ = figures_of("step", tmp_path, "--cases", "mini", "--deepspeed", "zero2_cpu")
    figures = {name: value for name, value in found.items() if "mini" in name}
    assert {name.partition(": ")[2] for name in figures} == {
        "original loop, fp32",
        "original loop, fp32, padded sentences",
        "original loop, fp32, padded documents",
        "original loop, fp32, KL on masked",
        "ours",
        "ours, KL on masked",
    }
    assert all(each["tokens_per_second"] > 0 for each in figures.values())
    assert 0 < figures["mini, length 128: original loop, fp32, padded sentences"]["padding_share"] < 0.3
    # Documents are longer than 128 tokens: most of their pieces need no padding.
    assert 0 < figures["mini, length 128: original loop, fp32, padded documents"]["padding_share"] < 0.1


def test_a_student_of_half_the_layers_answers_sooner(tmp_path):
    figures, said = figures_of("latency", tmp_path, "--recipes", "distilbert-uncased")
    assert 1.2 < figures["distilbert-uncased, 16 tokens"]["teacher_over_student"] < 4
    assert "60 % faster" in said


def test_the_teachers_benchmark_has_each_way(tmp_path):
    found, _ = figures_of("teacher_inference", tmp_path)
    figures = {name: value["time_over_bare"] for name, value in found.items() if "tokens" in name}
    assert figures["512 tokens: bare module"] == 1
    assert {"128 tokens: init_inference", "512 tokens: init_inference"} < set(figures)
    assert all(ratio > 0 for ratio in figures.values())


def test_the_benchmark_of_variants_has_each(tmp_path):
    figures, _ = figures_of("variants", tmp_path, "--cases", "mini", "--deepspeed", "zero2_cpu")
    speeds = {name.partition(": ")[2]: value["speed"] for name, value in figures.items() if "mini" in name}
    assert speeds.pop("as it is") == 1
    assert set(speeds) == {"train.compile", "overlap_comm: true", "coalesced gradients"}
    assert all(0.1 < speed < 10 for speed in speeds.values())


def test_the_benchmark_of_students_compares_a_step_together_with_steps_alone(tmp_path):
    found, _ = figures_of("students", tmp_path, "--cases", "mini", "--deepspeed", "zero2_cpu")
    figures = {name: value for name, value in found.items() if "mini" in name}
    assert len(figures) == 2
    for each in figures.values():
        assert set(each["seconds"]) == {"6 layers", "4 layers", "2 layers", "together", "the teacher's pass"}
        assert 0.2 < each["ratio"] < 1.2
        assert 0 < each["teachers_share_of_three_steps"] < 1


def test_the_benchmark_of_preparing_has_ours_and_the_others(tmp_path):
    figures, _ = figures_of("prepare", tmp_path, "--megabytes", "2", "--large", "3", "--folder", tmp_path)
    assert figures["ours, 1 process(es)"]["over_line_by_line"] > 1
    assert figures["the original's way"]["over_the_original"] == 1
    assert 50e6 < figures["peak_bytes_of_a_process"] < 2e9
    assert 3e6 < figures["large"]["bytes"] < 4e6
    assert 50e6 < figures["large"]["peak_bytes_of_a_process"] < 2e9


def test_a_process_that_fails_ends_the_benchmark_of_preparing(tmp_path):
    program = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'benchmarks'); import prepare; "
        "prepare.peak_of_a_process(Path(sys.argv[1], 'none.txt'), Path(sys.argv[1], 'out'))"
    )
    ended = run(sys.executable, "-c", program, tmp_path)
    assert ended.returncode
    assert "EOFError" in ended.stderr


def test_the_loaders_benchmark_tells_rows_and_waiting(tmp_path):
    figures, said = figures_of("loader", tmp_path, "--megabytes", "2", "--folder", tmp_path)
    assert ("(not cold: " in said) == (figures["share_of_cold_pages_in_memory"] > 0.01)
    assert figures["shuffled and masked, in this process"]["rows_per_second"] > 100
    assert 0 <= figures["share_of_a_step_waited"] < 0.5


def test_the_ablation_keeps_each_arm_and_tells_how_far_it_is_from_the_triplet(tmp_path):
    arms = ["triplet", "without cos"]
    words = ["--arms", *arms, "--seeds", 1, "--steps", 2, "--runs", tmp_path / "runs"]
    words += ["--results", tmp_path / "results.json", "--report", tmp_path / "r.md"]
    ended = run(sys.executable, "benchmarks/ablation.py", *words)
    assert ended.returncode == 0, ended.stderr
    found = json.loads((tmp_path / "results.json").read_text())["arms"]
    assert list(found) == arms
    share = {name: 100 * each["0"]["mlm_accuracy"] for name, each in found.items()}
    row = next(line for line in (tmp_path / "r.md").read_text().splitlines() if line.startswith("| without cos"))
    assert f"{share['without cos'] - share['triplet']:+.2f}" in row
    assert "-1.46" in row

    assert "heldout_every 3" in (tmp_path / "r.md").read_text()
    shutil.rmtree(tmp_path / "runs")
    again = run(sys.executable, "benchmarks/ablation.py", *words)
    assert again.returncode == 0, again.stderr
    assert not list((tmp_path / "runs").glob("*/seed_*")), "what the results have is not trained again"
    other = run(sys.executable, "benchmarks/ablation.py", *words, "--steps", 3)
    assert other.returncode == 2
    assert "Name another --results" in other.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_what_wants_a_gpu_says_so_where_there_is_none(tmp_path):
    ended = run("env", f"PYTHON={sys.executable}", "bash", "benchmarks/gpu_all.sh", tmp_path / "out")
    assert ended.returncode == 2
    assert "torch sees no CUDA device" in ended.stderr
