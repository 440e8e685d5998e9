"""`make demo`'s job at its full length: distillation must visibly work."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distilcb.config import REPOSITORY


@pytest.mark.launch
def test_the_demo_brings_the_student_closer_to_its_teacher(tmp_path):
    run_dir = tmp_path / "mini"
    deepspeed = Path(sys.executable).with_name("deepspeed")
    command = [deepspeed, "launch/train.py", "--run_dir", run_dir, "--train.save_every", "0"]
    done = subprocess.run(
        list(map(str, command)), cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    heldout = json.loads((run_dir / "summary.json").read_text())["heldout"]
    start, end = heldout["student_start"], heldout["student"]
    assert end["kl"] < 0.7 * start["kl"]
    assert end["agreement"] > start["agreement"] + 2 * end["standard_error"]["agreement"]
    assert end["mlm_loss"] < start["mlm_loss"]
    last_screen = done.stdout + done.stderr
    for shown in ("held-out text", "La jeune <mask>", f"{run_dir}/student", "tensorboard --logdir", "summary.json"):
        assert shown in last_screen
