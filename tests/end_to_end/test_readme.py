"""README's commands run, word for word but for fewer steps."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from distilcb.command_line import parse_command_line
from distilcb.config import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
SHORT = ["--train.steps", "2", "--train.eval_maskings", "2", "--train.eval_every", "0"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder that looks like a clone, with some text of one's own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("launch", "recipes", "ds_configs", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(REPOSITORY / name)
    text = REPOSITORY / "recipes" / "mini" / "text"
    (folder / "my_text.txt").write_bytes((text / "train" / "lettres.txt").read_bytes())
    (folder / "my_heldout.txt").write_bytes((text / "heldout" / "lettres.txt").read_bytes())
    return folder


def run(words, folder):
    own = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": own + os.pathsep + os.environ["PATH"],
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def with_own_run_dir(words, folder):
    number = len(list((folder / "runs").glob("*"))) if (folder / "runs").exists() else 0
    return words if "--run_dir" in words else [*words, "--run_dir", f"runs/readme_{number}"]


@pytest.mark.launch
def test_every_command_of_the_readme_runs(folder):
    seen = set()
    for line in commands():
        words = shlex.split(line)
        program = next((word for word in words if word.startswith("launch/")), words[0])
        seen.add(program)
        if program == "launch/train.py":
            run(with_own_run_dir(words, folder) + SHORT, folder)
        elif program == "launch/prepare.py":
            run(words, folder)
            assert json.loads((folder / "blocks" / "description.json").read_text())["blocks"] > 0
        elif program in ("sbatch", "hf"):
            assert_understood(words)
        elif program == "launch/replay.py":
            assert "equal to the last bit" in run([*words, "--step", "2"], folder)
        elif program == "make":
            assert {"demo": "deepspeed launch/train.py", "test": "pytest"}[words[1]] in run([*words, "-n"], folder)
        elif program == "source":
            assert words[1] == ".venv/bin/activate"
        elif program == "tensorboard":
            assert_tensorboard_serves(words, folder)
        else:
            raise AssertionError(f"README has a command that nothing tests: {line}")
    launched = {"launch/train.py", "launch/prepare.py", "launch/replay.py"}
    assert seen == launched | {"make", "source", "sbatch", "tensorboard", "hf"}


def assert_understood(words):
    """That a command which needs a cluster or a network has the options it is given; tests/slurm runs the jobs."""
    program = next((word for word in words if word.endswith((".sbatch", ".py"))), words[0])
    place = words.index(program) + 1
    if program.endswith(".sbatch"):
        assert (REPOSITORY / program).is_file()
        program = f"launch/{STARTED_BY[program]}.py"
    if program == "launch/train.py":
        parse_command_line(words[place:])
        return
    own = Path(sys.executable).parent
    helped = [own / "hf", words[1], "--help"] if program == "hf" else [sys.executable, REPOSITORY / program, "--help"]
    told = subprocess.run(helped, capture_output=True, text=True, check=True).stdout
    assert [word for word in words[place:] if word.startswith("--") and word not in told] == []


STARTED_BY = {
    "slurm/distill.sbatch": "train",
    "slurm/prepare.sbatch": "prepare",
    "slurm/evaluate.sbatch": "evaluate",
    "slurm/doctor.sbatch": "doctor",
}


def assert_tensorboard_serves(words, folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tensorboard = [sys.executable, "-m", "tensorboard.main", *words[1:], "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(tensorboard, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        runs = wait_for_runs(f"http://127.0.0.1:{port}/data/plugin/scalars/tags")
    finally:
        server.terminate()
        server.wait(timeout=30)
    assert any("train/loss" in tags for tags in runs.values())


def wait_for_runs(address):
    for _ in range(120):
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                runs = json.load(answer)
            if runs:
                return runs
        except OSError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"{address} showed no run within a minute")


@pytest.mark.launch
def test_the_python_example_runs(folder):
    (example,) = blocks("python")
    (folder / "example.py").write_text(example.replace('"20"', '"2"'), encoding="utf-8")
    assert run([sys.executable, "example.py"], folder).strip()
    assert (folder / "runs" / "from_python" / "DONE").exists()


SLURM_PAGE = (REPOSITORY / "docs" / "slurm.md").read_text(encoding="utf-8")
GUIDE = (REPOSITORY / "docs" / "distilcamembert.md").read_text(encoding="utf-8")


def test_the_clusters_guide_uses_options_that_are_there(tmp_path, monkeypatch):
    """Its commands need a cluster; that they are understood needs none."""
    monkeypatch.chdir(REPOSITORY)
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", GUIDE, flags=re.DOTALL)).replace("$WORK", str(tmp_path))
    seen = []
    for words in (shlex.split(line, comments=True) for line in lines.splitlines()):
        program = next((word for word in words if word.startswith("launch/")), None)
        batch_file = next((word for word in words if word.endswith(".sbatch")), None)
        if batch_file:
            assert (REPOSITORY / batch_file).is_file()
        if batch_file == "slurm/distill.sbatch":
            assert parse_command_line(words[words.index(batch_file) + 1 :]).config.data.seq_len == 512
        elif program == "launch/train.py":
            assert parse_command_line(words[words.index(program) + 1 :]).config.data.seq_len == 512
        elif program == "launch/plan.py":
            make_plan_of(words[words.index(program) + 1 :])
        elif program is not None:
            understood = subprocess.run([sys.executable, program, "--help"], capture_output=True, text=True, check=True)
            options = [word for word in words if word.startswith("--")]
            assert [option for option in options if option not in understood.stdout] == []
        seen.append(program)
    assert {"launch/prepare.py", "launch/train.py", "launch/export.py"} <= set(seen)


def make_plan_of(words):
    from distilcb.plan.command import plan_from

    plan_from(words, description=None)


def test_every_batch_file_is_a_script_that_the_page_on_slurm_names():
    files = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
    assert len(files) == 4
    for path in files:
        assert subprocess.run(["bash", "-n", path], check=False).returncode == 0
        assert f"slurm/{path.name}" in SLURM_PAGE
        assert "job.sh" in path.read_text(encoding="utf-8")


def test_the_example_of_a_pipeline_has_options_that_are_there(tmp_path):
    """tests/slurm submits one; here its words are looked at as pipeline.sh does before it submits."""
    for name in ("pipeline.sh", "pipeline.example", "environment.sh", "job.sh"):
        assert subprocess.run(["bash", "-n", REPOSITORY / "slurm" / name], check=False).returncode == 0
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/$(ls {tmp_path} | wc -l)\necho 7\n')
    sbatch.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    environ["DISTILCB_SITE"] = str(tmp_path / "site.sh")
    (tmp_path / "site.sh").touch()
    words = ["bash", REPOSITORY / "slurm/pipeline.sh"]
    told = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    submitted = [(tmp_path / str(number)).read_text().splitlines() for number in (2, 3, 4)]
    assert [next(word for word in words if word.endswith(".sbatch")) for words in submitted] == [
        f"slurm/{name}.sbatch" for name in ("prepare", "distill", "evaluate")
    ]
    assert "--dependency=afterok:7" not in submitted[0]
    assert all("--dependency=afterok:7" in words for words in submitted[1:])
    assert "--ntasks-per-node=1" in submitted[2]


def test_the_page_on_slurm_and_the_readme_use_options_that_are_there(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    fenced = re.findall(r"```bash\n(.*?)```", README + SLURM_PAGE, flags=re.DOTALL)
    lines = [shlex.split(line) for block in fenced for line in block.splitlines()]
    lines = [words for words in lines if words and words[0] in ("sbatch", "hf")]
    for words in lines:
        assert_understood(words)
    submitted = {word for words in lines for word in words if word.endswith(".sbatch")}
    assert submitted >= {"slurm/distill.sbatch", "slurm/prepare.sbatch", "slurm/doctor.sbatch"}


def test_what_the_real_job_is_given_is_made_by_the_lines_before_it():
    for page in (README, SLURM_PAGE):
        (block,) = (each for each in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) if "hf download" in each)
        fetched, prepared, *_, trained = map(shlex.split, block.splitlines())
        after = {words[i]: words[i + 1] for words in (fetched, prepared, trained) for i in range(len(words) - 1)}
        assert after["--teacher.model"] == after["--tokenizer"] == after["--local-dir"]
        assert after["--data.train"] == after["--output"]


LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    links = LINK.findall(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_links_are_found():
    assert len(LINK.findall(README)) > 3


def test_every_file_that_the_readme_shows_in_a_run_folder_is_written_by_a_run(folder):
    shown = re.findall(r"^  (\S+)", re.search(r"^runs/mini/\n(.*?)```", README, re.DOTALL | re.MULTILINE)[1], re.M)
    a_run = folder / "runs" / "from_python"
    if not a_run.exists():
        pytest.skip("needs the run of test_the_python_example_runs")
    assert shown
    assert [name for name in shown if not (a_run / name).exists()] == []
