"""launch/prepare.py on several ranks, whoever starts them, and killed on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import start
from refusal import assert_refused

from distilcb.config import DEFAULT_RECIPE
from distilcb.data.blocks import read_description

pytestmark = pytest.mark.launch

TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"
TEXT = DEFAULT_RECIPE.parent / "mini" / "text" / "train"
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"]


def words_for(output, *inputs, part_megabytes=0.03, processes=1):
    words = ["launch/prepare.py", "--tokenizer", TEACHER, "--output", output, "--seq_len", "64", "--input", *inputs]
    return [sys.executable, *words, "--part_megabytes", part_megabytes, "--processes", processes]


def ended(words, environ=None):
    process = start(words, environ)
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it does not end\n{out}{err}") from None
    return subprocess.CompletedProcess(words, process.returncode, out, err)


def files_of(folder):
    """Names and bytes, but for the report, which tells times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process makes of the shipped text, in ten parts or so."""
    output = tmp_path_factory.mktemp("alone") / "out"
    done = ended(words_for(output, TEXT))
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_description(output).files) > 8
    return output


def test_several_processes_make_the_same_files(alone, tmp_path):
    done = ended(words_for(tmp_path / "out", TEXT, processes=2))
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(tmp_path / "out") == files_of(alone)
    assert "tokenizing with sentencepiece's library" in done.stderr


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_ranks_leave_out_the_same_duplicates_as_one_process(tmp_path):
    twice = [TEXT, str(tmp_path / "again.txt")]
    first = sorted(TEXT.glob("*.txt"))[0].read_text(encoding="utf-8")
    (tmp_path / "again.txt").write_text(first + "Une ligne de plus, qui ne se trouve nulle part.\n", encoding="utf-8")
    made = {}
    for name, launcher in {"alone": [], "ranks": MPIRUN}.items():
        done = ended([*launcher, *words_for(tmp_path / name, *twice), "--drop_duplicates"])
        assert done.returncode == 0, done.stdout + done.stderr
        made[name] = files_of(tmp_path / name)
    assert made["ranks"] == made["alone"]
    dropped = read_description(tmp_path / "ranks").dropped["duplicate_documents"]
    assert dropped >= len([line for line in first.splitlines() if line.strip()])


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_ranks_under_mpirun_make_the_same_files(alone, tmp_path):
    done = ended([*MPIRUN, *words_for(tmp_path / "out", TEXT)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert files_of(tmp_path / "out") == files_of(alone)
    assert done.stdout.count("blocks: ") == 1


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")
def test_a_mistake_under_mpirun_is_told_once(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"été {n}"}) + "\n" for n in range(9000)) + "{\n")
    done = ended([*MPIRUN, *words_for(tmp_path / "out", tmp_path / "a.jsonl")])
    assert_refused(done, "a.jsonl, line 9001: not JSON")


def with_small_files(words):
    """Where no file may grow over 20 kB: what a full disk does."""
    return ["bash", "-c", 'ulimit -f 20; exec "$@"', "bash", *words]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_disk_ends_it_with_what_to_do_and_finished_parts_are_kept(tmp_path, processes):
    (tmp_path / "a.txt").write_text("Il pleut sur le village.\n" * 200, encoding="utf-8")
    (tmp_path / "b.txt").write_text("Il pleut sur le village.\n" * 24_000, encoding="utf-8")
    words = words_for(
        tmp_path / "out", tmp_path / "a.txt", tmp_path / "b.txt", part_megabytes=0.29, processes=processes
    )
    done = ended(with_small_files(words))
    assert_refused(done, ".tmp cannot be written (", "File too large", "Free some space or name another folder")
    assert not (tmp_path / "out").exists()
    if processes == 1:
        (kept,) = tmp_path.glob(".out.*.tmp/*.json")
        assert kept.name == "000000-000000.json"


def start_ranks(words, port, ranks=2):
    """As srun starts tasks: nobody watches over them."""
    environ = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(words, environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


@pytest.fixture
def port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def communicate(processes):
    try:
        return [process.communicate(timeout=200) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_ranks_that_no_mpi_knows_make_the_same_files_together(alone, tmp_path, port):
    processes = start_ranks(words_for(tmp_path / "out", TEXT), port, ranks=3)
    said = communicate(processes)
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert files_of(tmp_path / "out") == files_of(alone)


@pytest.mark.parametrize(
    ("name", "message"), [("nowhere.txt", "nowhere.txt does not exist"), ("b.txt", "fill no block")]
)
def test_a_mistake_on_ranks_is_told_once_and_ends_all_with_code_2(tmp_path, port, name, message):
    (tmp_path / "b.txt").write_text("Court.\n")
    processes = start_ranks(words_for(tmp_path / "out", tmp_path / name), port)
    (_, zero), (_, one) = communicate(processes)
    assert [process.returncode for process in processes] == [2, 2]
    assert zero.count("Error: ") == 1
    assert message in zero
    assert "Error" not in one
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]


def test_a_mistake_that_another_rank_finds_is_told_by_rank_zero(tmp_path, port):
    lines = [json.dumps({"text": f"Il pleut sur le village depuis {n} jours."}) for n in range(3000)]
    for bad in range(1, 3):  # one is rank one's, whichever way the parts are shared
        lines[-bad * 1000] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    processes = start_ranks(words_for(tmp_path / "out", tmp_path / "a.jsonl"), port)
    (_, zero), (_, one) = communicate(processes)
    assert [process.returncode for process in processes] == [2, 2], zero + one
    assert zero.count("Error: ") == 1
    assert "not JSON" in zero
    assert "Error" not in one


def test_a_full_disk_under_one_of_several_ranks_is_told_once_and_ends_all_with_code_2(tmp_path, port):
    words = words_for(tmp_path / "out", TEXT, part_megabytes=0.06, processes=2)
    environ = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    commands = [words, with_small_files(words)]
    ranks = [start(each, environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank, each in enumerate(commands)]
    (_, zero), (_, one) = communicate(ranks)
    assert [process.returncode for process in ranks] == [2, 2], zero + one
    assert zero.count("Error: ") == 1
    assert "Free some space or name another folder" in zero
    assert "Traceback" not in zero + one


def test_a_killed_preparation_goes_on_and_keeps_its_finished_parts(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("".join(path.read_text() for path in sorted(TEXT.glob("*.txt"))) * 8, encoding="utf-8")
    words = words_for(tmp_path / "out", text, part_megabytes=0.2, processes=2)
    process = start(words)
    finished = wait_for_parts(tmp_path, process, 2)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    done = ended(words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "going on from there" in done.stderr
    kept = {path.stat().st_ino: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.arrow")}
    assert finished.items() <= kept.items()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]
    whole = ended(words_for(tmp_path / "whole", text, part_megabytes=0.2))
    assert whole.returncode == 0, whole.stderr
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def wait_for_parts(folder, process, count):
    """inode -> time of the files of finished parts, once there are so many."""
    deadline = time.monotonic() + 120
    while True:
        finished = list(folder.glob(".out.*.tmp/*.json"))
        if len(finished) >= count:
            files = [path.with_suffix(".arrow").stat() for path in finished]
            return {stat.st_ino: stat.st_mtime_ns for stat in files}
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("program", ["prepare", "evaluate", "doctor"])
def test_a_mistake_on_the_command_line_is_told_once_whatever_the_ranks(commands, program):
    needed = {"prepare": ["--input", TEXT, "--tokenizer", TEACHER, "--output", "out"], "doctor": []}
    ended = commands.deepspeed(2, program, *needed.get(program, [TEACHER, "--output", "out"]), "--ouput=x")
    assert ended.stderr.count("unrecognized arguments: --ouput=x") == 1, ended.stderr
    assert "usage:" not in ended.stdout + ended.stderr
    assert_refused(ended, "ConfigError: unrecognized arguments: --ouput=x. Did you mean --output?")
