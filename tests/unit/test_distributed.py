"""Rank zero, logs, devices and threads in one process; and two real ranks."""

import json
import logging
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from launcher_environments import BATCH_SHELL, OPENMPI, SRUN, TORCHRUN

from distilcb import distributed
from distilcb.distributed import configure_logging, is_main_process
from distilcb.errors import LaunchError
from distilcb.launcher import World, discover

REPOSITORY = Path(distributed.__file__).resolve().parents[1]


@pytest.fixture
def environ_of_nobody(monkeypatch):
    """os.environ without a trace of a launcher; what a test sets goes away after it."""
    for name in clean_environ().keys() ^ os.environ.keys():
        monkeypatch.delenv(name)
    return monkeypatch


def clean_environ() -> dict[str, str]:
    launchers = r"SLURM_.*|OMPI_.*|MV2_.*|PMI_.*|MPI_LOCAL.*|MASTER_.*|(LOCAL_|GROUP_)?RANK|.*WORLD_SIZE|LOCAL_SIZE"
    settings = r"TORCHELASTIC_.*|DS_ACCELERATOR|OMP_NUM_THREADS"
    return {name: text for name, text in os.environ.items() if not re.fullmatch(f"{launchers}|{settings}", name)}


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


def test_ranks_of_one_machine_share_its_cores(environ_of_nobody):
    chosen: list[int] = []
    environ_of_nobody.setattr(torch, "set_num_threads", chosen.append)
    environ_of_nobody.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    for local_size, size in ((1, 1), (2, 4), (3, 3), (16, 16), (0, 4)):
        distributed._size_cpu_threads(World("env", 0, size, 0, local_size, "node1", 12345))
    assert chosen == [8, 4, 2, 1, 2]


def test_threads_that_the_user_chose_are_left_alone(environ_of_nobody):
    environ_of_nobody.setenv("OMP_NUM_THREADS", "3")
    chosen: list[int] = []
    environ_of_nobody.setattr(torch, "set_num_threads", chosen.append)
    distributed._size_cpu_threads(World("env", 0, 2, 0, 2, "node1", 12345))
    assert chosen == []


@pytest.fixture
def environ_of_nobodys_tools(environ_of_nobody):
    """Nor of compiled operators; PATH is put back."""
    environ_of_nobody.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    environ_of_nobody.setenv("PATH", "/usr/bin:/bin")
    return environ_of_nobody


@pytest.mark.parametrize(("gpu", "kind"), [(False, "cpu"), (True, "cuda")])
def test_operators_are_kept_in_the_environment_those_of_cpu_and_gpu_apart(
    environ_of_nobodys_tools, tmp_path, gpu, kind
):
    environ_of_nobodys_tools.setattr(sys, "prefix", str(tmp_path))
    environ_of_nobodys_tools.setattr(distributed, "uses_cuda", lambda: gpu)
    distributed.use_own_tools()
    folder = tmp_path / "torch_extensions" / kind
    assert distributed.compiled_operators_folder() == folder
    assert not distributed.is_compiled("fused_adam")
    (folder / "fused_adam").mkdir(parents=True)
    (folder / "fused_adam" / "fused_adam.so").touch()
    assert distributed.is_compiled("fused_adam")


def test_a_folder_for_operators_that_the_user_named_is_kept(environ_of_nobodys_tools):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    distributed.use_own_tools()
    assert distributed.compiled_operators_folder() == Path("/elsewhere")


def test_an_environment_that_cannot_be_written_to_leaves_torch_its_own_folder(environ_of_nobodys_tools, tmp_path):
    environ_of_nobodys_tools.setattr(sys, "prefix", str(tmp_path / "missing"))
    environ_of_nobodys_tools.setenv("XDG_CACHE_HOME", str(tmp_path))
    distributed.use_own_tools()
    assert distributed.compiled_operators_folder() == tmp_path / "torch_extensions"
    built = tmp_path / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu" / "fused_adam"
    built.mkdir(parents=True)
    assert not distributed.is_compiled("fused_adam")
    (built / "fused_adam.so").touch()
    assert distributed.is_compiled("fused_adam")


def test_a_compilation_elsewhere_is_waited_for(environ_of_nobodys_tools, tmp_path):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    threading.Timer(1.0, lock.unlink).start()
    started = time.monotonic()
    distributed.wait_for_compiler("fused_adam")
    assert 0.9 < time.monotonic() - started < 20


@pytest.mark.parametrize("place", ["fused_adam", "py311_cpu/fused_adam"])
def test_a_lock_that_a_killed_compilation_left_is_named(environ_of_nobodys_tools, tmp_path, place):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / place / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    hours_ago = time.time() - 7200
    os.utime(lock, (hours_ago, hours_ago))
    with pytest.raises(LaunchError, match=rf"{lock} .* 120 minutes old.*Remove the file"):
        distributed.wait_for_compiler("fused_adam")


def _page_faults_of_a_repeated_tensor(environ: dict[str, str]) -> int:
    """Pages that the kernel hands out while a tensor of 16 MB is made and dropped twenty times, warmed up."""
    code = (
        "import resource, torch\n"
        "from distilcb import distributed\n"
        "distributed._keep_freed_memory()\n"
        "for _ in range(20): torch.ones(4_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(4_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run([sys.executable, "-c", code], env=clean | environ, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose malloc this is about")
def test_memory_that_a_tensor_frees_is_used_again_unless_the_user_set_malloc():
    assert _page_faults_of_a_repeated_tensor({}) < 1_000
    assert _page_faults_of_a_repeated_tensor({"MALLOC_MMAP_THRESHOLD_": "131072"}) > 10_000


def test_a_rank_without_a_gpu_of_its_own_is_refused_and_told_what_to_ask_for(environ_of_nobody):
    environ_of_nobody.setattr(torch.cuda, "is_available", lambda: True)
    environ_of_nobody.setattr(torch.cuda, "device_count", lambda: 1)
    for name, text in TORCHRUN.items():
        environ_of_nobody.setenv(name, text)
    with pytest.raises(LaunchError, match=r"local rank 1 but sees 1 CUDA device.*one task per GPU"):
        distributed.start()


def test_each_rank_selects_the_gpu_of_its_local_rank(environ_of_nobody):
    selected: list[int] = []
    environ_of_nobody.setattr(torch.cuda, "device_count", lambda: 4)
    environ_of_nobody.setattr(torch.cuda, "set_device", selected.append)
    distributed._select_cuda_device(discover(SRUN))
    assert selected == [2]


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
