"""launch/plan.py as users start it, and its calibration against a run."""

import json
import statistics

import pytest

pytestmark = pytest.mark.launch


def test_a_plan_needs_no_gpu_no_text_and_no_weights(commands, tmp_path):
    words = [
        "--recipe",
        "recipes/distilcamembert.yaml",
        "--gpus",
        "8",
        "--gpu",
        "a100",
        "--json",
        tmp_path / "plan.json",
    ]
    ended = commands.python("plan", *words, environ={"HF_HUB_OFFLINE": "1"})
    assert ended.returncode == 0, ended.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["student_parameters"] == 68_128_261
    assert f"{plan['hours']:,.1f} hours" in ended.stdout
    assert ended.stdout.endswith(f"the same as data: {tmp_path / 'plan.json'}\n")


def test_a_calibrated_plan_tells_a_runs_rate_within_15_per_cent(commands, tmp_path):
    """The median of three tries or more, since other work of a machine moves each."""
    settings = [*commands.data, "--data.train", f"{commands.text}/train", "--train.log_every", "4"]
    settings += ["--train.eval_every", "0", "--train.save_every", "0", "--train.eval_maskings", "2"]
    settings += ["--optim.global_batch", "32"]
    ratios = []
    for number in range(9):
        path = tmp_path / f"{number}.json"
        asked = ["--gpus", "1", "--gpu", "h100", "--calibrate", "4", "--json", path]
        planned = commands.python("plan", *asked, *settings)
        assert planned.returncode == 0, planned.stderr
        assert "measured on a CPU: the hours below are those of so many CPUs like this one" in planned.stderr
        run_dir = tmp_path / f"run_{number}"
        ended = commands.python("train", "--run_dir", run_dir, *settings, "--train.steps", "12")
        assert ended.returncode == 0, ended.stderr
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        rates = [line["tokens_per_second"] for line in lines if "loss" in line][1:]
        ratios.append(json.loads(path.read_text())["tokens_per_second"] / statistics.mean(rates))
        if number >= 2 and 0.85 < statistics.median(ratios) < 1.15:
            return
    raise AssertionError(f"planned over measured: {ratios}")
