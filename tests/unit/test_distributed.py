"""Rank zero and logs in one process; and two real ranks."""

import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launcher_environments import BATCH_SHELL, OPENMPI, SRUN, TORCHRUN, clean_environ

from distilcb import distributed
from distilcb.distributed import configure_logging, is_main_process
from distilcb.launcher import discover

REPOSITORY = Path(distributed.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, True),
        (TORCHRUN, False),
        (TORCHRUN | {"RANK": "0"}, True),
        (OPENMPI, False),
        (SRUN, False),
        (SRUN | {"SLURM_PROCID": "0"}, True),
        (SRUN | OPENMPI | {"SLURM_PROCID": "0"}, False),
        (SRUN | {"SLURM_PROCID": "0", "RANK": "4"}, False),
        (BATCH_SHELL, True),
    ],
)
def test_one_rank_is_main_before_ranks_have_met(environ_of_nobody, environ, expected):
    for name, text in environ.items():
        environ_of_nobody.setenv(name, text)
    assert is_main_process() == expected


def test_without_other_ranks_collectives_do_nothing():
    assert torch.equal(distributed.all_reduce_sum(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert distributed.broadcast_object({"a": 1}) == {"a": 1}
    distributed.barrier()
    distributed.stop()


@pytest.fixture
def log(environ_of_nobody) -> Iterator[logging.Logger]:
    """The package's logger, put back afterwards as it was."""
    environ_of_nobody.setenv("DS_ACCELERATOR", "cpu")
    logger = logging.getLogger("distilcb")
    before = logger.handlers[:], logger.level, logger.propagate
    yield logger
    logger.handlers[:], logger.level, logger.propagate = before


def test_rank_zero_logs_plain_lines_once_however_often_it_is_configured(log, capsys):
    for _ in range(2):
        configure_logging(discover({}))
    logging.getLogger("distilcb.train").info("step 1")
    assert capsys.readouterr().err == "step 1\n"


def test_other_ranks_log_only_warnings_with_their_rank(log, capsys):
    configure_logging(discover(SRUN))
    log.info("step 1")
    log.warning("disk is full")
    assert capsys.readouterr().err == "[rank 6] disk is full\n"


def test_the_libraries_chatter_is_quiet_and_their_warnings_are_not(log):
    configure_logging(discover({}))
    for library in ("DeepSpeed", "transformers", "datasets"):
        assert logging.getLogger(library).getEffectiveLevel() == logging.WARNING


def run(*arguments: str | Path, environ: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """`python *arguments` without a launcher's variables; minutes, since DeepSpeed may have to compile."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=clean_environ() | {"PYTHONPATH": str(REPOSITORY)} | (environ or {}),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_looking_around_loads_neither_torch_nor_deepspeed_nor_mpi():
    program = """
import sys
from distilcb import distributed, launcher
launcher.discover(), distributed.is_main_process(), distributed.barrier()
print(sorted({"torch", "deepspeed", "mpi4py"} & set(sys.modules)))
"""
    assert run("-c", program).stdout == "[]\n"


RANK_PROGRAM = """
import json, logging, os, sys
import torch
from distilcb import distributed

early = distributed.is_main_process()
world = distributed.start(timeout_minutes=5)
distributed.configure_logging(world)
logging.getLogger("distilcb").info("rank zero speaks")
summed = torch.tensor([world.rank + 1.0, 10.0])
result = dict(
    rank=world.rank,
    size=world.size,
    summed=distributed.all_reduce_sum(summed).tolist(),
    in_place=summed.tolist(),
    heard=distributed.broadcast_object({"from": world.rank}),
    is_main=[early, distributed.is_main_process()],
    device=str(distributed.device()),
    backend=torch.distributed.get_backend(),
    threads=torch.get_num_threads(),
    cores=len(os.sched_getaffinity(0)),
)
distributed.barrier()
distributed.stop()
result["stopped"] = not torch.distributed.is_initialized()
with open(f"{sys.argv[1]}/{world.rank}.json", "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> tuple[list[dict], str]:
    """What two ranks under torchrun report, and all that they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "program.py").write_text(RANK_PROGRAM)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run(*torchrun, folder / "program.py", folder, environ={"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], done.stdout + done.stderr


@pytest.mark.launch
def test_two_ranks_have_the_same_sum_and_it_is_in_place(two_ranks):
    for rank in two_ranks[0]:
        assert rank["summed"] == rank["in_place"] == [3.0, 20.0]


@pytest.mark.launch
def test_all_ranks_hear_rank_zeros_object(two_ranks):
    assert [rank["heard"] for rank in two_ranks[0]] == [{"from": 0}, {"from": 0}]


@pytest.mark.launch
def test_two_ranks_agree_on_who_is_main_before_and_after_they_meet(two_ranks):
    assert [rank["is_main"] for rank in two_ranks[0]] == [[True, True], [False, False]]


@pytest.mark.launch
def test_ranks_without_gpus_meet_over_gloo_and_part_again(two_ranks):
    for rank in two_ranks[0]:
        assert (rank["size"], rank["backend"], rank["device"]) == (2, "gloo", "cpu")
        assert rank["stopped"]


@pytest.mark.launch
def test_rank_zero_alone_speaks(two_ranks):
    assert two_ranks[1].count("rank zero speaks") == 1


@pytest.mark.launch
def test_a_single_process_starts_without_deepspeeds_warning_about_the_accelerator(tmp_path):
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    # No GPU is to be seen, whatever the machine has.
    done = run(tmp_path / "program.py", tmp_path, environ={"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert "Setting accelerator to CPU" not in done.stdout + done.stderr
    result = json.loads((tmp_path / "0.json").read_text())
    assert (result["size"], result["summed"], result["threads"]) == (1, [1.0, 10.0], result["cores"])


@pytest.mark.launch
def test_a_taken_port_is_a_launch_error_that_says_so(tmp_path):
    with socket.socket() as server:
        server.bind(("", 0))
        server.listen()
        port = str(server.getsockname()[1])
        done = run(
            "-c",
            "from distilcb import distributed; distributed.start()",
            environ={"CUDA_VISIBLE_DEVICES": "", "MASTER_PORT": port},
        )
    assert f"LaunchError: port {port} of 127.0.0.1 is taken" in done.stderr


WAITS = """
import sys, time
from distilcb.distributed import exit_code
def main(words):
    print("here", flush=True)
    time.sleep(60)
sys.exit(exit_code(main))
"""


@pytest.mark.parametrize(("environ", "code"), [(SRUN, 1), (SRUN | {"SLURM_STEP_NUM_TASKS": "1"}, -signal.SIGTERM)])
def test_a_task_that_srun_ends_for_anothers_fault_does_not_hide_that_ones_exit_code(environ, code):
    """srun reports the largest: 2 of a user's mistake, and 143 of SIGTERM."""
    task = subprocess.Popen([sys.executable, "-c", WAITS], env=clean_environ() | environ, stdout=subprocess.PIPE)
    assert task.stdout.readline() == b"here\n"
    task.terminate()
    assert task.wait(timeout=30) == code
    task.stdout.close()


INTERRUPTED_AND_STUCK = """
import signal, sys, threading
from distilcb import distributed

distributed._INTERRUPTED_ENDS_WITHIN_SECONDS = 0.5

def main(words):
    lock = threading.Lock()
    lock.acquire()
    try:
        print("ready", flush=True)
        signal.pause()
    finally:
        if "stuck" in words:
            lock.acquire()

sys.exit(distributed.exit_code(main))
"""


@pytest.mark.parametrize("words", [[], ["stuck"]])
def test_an_interrupted_process_ends_though_it_waits_for_a_lock_that_nobody_gives_back(words):
    command = [sys.executable, "-c", INTERRUPTED_AND_STUCK, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean_environ())
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told == "\ninterrupted: what was saved stays, the same command goes on from there\n"


def test_an_interrupt_that_the_shell_has_silenced_stays_silenced():
    """As for a command that is started in the background by nohup or a script."""
    code = "import signal, sys; from distilcb import distributed\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code += "distributed.exit_code(lambda words: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environ(), timeout=60)
    assert done.stdout == "True\n"
