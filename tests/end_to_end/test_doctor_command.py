"""The doctor without Slurm: alone, under the deepspeed launcher, and where a rank does not come."""

import json
import socket

import pytest
from refusal import assert_refused

pytestmark = pytest.mark.launch


def test_a_single_process_is_examined_and_reported(commands, tmp_path):
    ended = commands.python("doctor", "--run_dir", tmp_path / "not_there_yet", "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    # Nobody to compare it with, so that no load of this machine can make it look ill.
    assert (ended.returncode, report["findings"]) == (0, []), ended.stdout + ended.stderr
    assert report["folder"] == str(tmp_path)
    assert report["products"][0]["fp32"] > 0
    assert "verdict: OK" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_two_ranks_under_the_deepspeed_launcher_measure_their_sums(commands, tmp_path):
    ended = commands.deepspeed(2, "doctor", "--run_dir", tmp_path, "--output", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    # Ranks share this machine with other tests: whether they look alike is not judged here.
    assert ended.returncode == (1 if report["findings"] else 0), ended.stdout + ended.stderr
    assert len(report["products"]) == 2
    assert min(report["sums"]["all ranks"].values()) > 0
    assert report["links"] == []


def test_a_rank_that_does_not_come_ends_the_doctor_with_a_message(commands):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ended = commands.python("doctor", "--wait_minutes", 0.05, environ=alone)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "MachineError: not all of the 2 ranks came" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_misspelt_option_and_a_missing_folder_are_refused(commands):
    assert_refused(commands.python("doctor", "--ouput", "x"), "--ouput")
    assert_refused(commands.python("doctor", "--output", "/nowhere/x.json"), "there is no folder /nowhere")
