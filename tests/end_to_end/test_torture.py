"""A run that is killed at random moments is the run that nothing happened to; benchmarks/torture.py does it longer."""

import re
import subprocess
import sys

import pytest

from distilcb.config import REPOSITORY

pytestmark = pytest.mark.launch

# | moment | the whole job | one rank |
ROW = re.compile(r"^\| (\w+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def test_a_run_of_two_ranks_killed_five_times_is_the_undisturbed_one_to_the_last_bit(tmp_path):
    words = ["--kills", "5", "--ranks", "2", "--runs", tmp_path / "runs", "--report", tmp_path / "report.md"]
    done = subprocess.run(
        [sys.executable, "benchmarks/torture.py", *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("kill ") >= 5
    assert "every byte of the student" in (tmp_path / "report.md").read_text()
    killed = {moment: int(whole) + int(one) for moment, whole, one in ROW.findall(done.stdout)}
    assert killed == {"start": 2, "step": 1, "save": 1, "evaluation": 1}
