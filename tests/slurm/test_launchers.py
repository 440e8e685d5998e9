"""Every launcher that a cluster has, for real: each process finds its rank and the others."""

import json
import shutil
import sys

import pytest
from slurm_jobs import say_of_job

SAY = f"{sys.executable} tests/slurm/say_rank.py"
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
AS_ROOT = "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
needs_mpi = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI (make test-slurm installs it)")
COMMANDS = [
    pytest.param(f"srun {SAY}", "srun", id="srun"),
    pytest.param(f"srun --mpi=pmix {SAY}", "srun", id="srun with PMIx"),
    pytest.param(f"srun --mpi=pmix {SAY} --use_mpi", "mpi", id="srun with PMIx and mpi4py", marks=needs_mpi),
    pytest.param(f"{AS_ROOT}; mpirun -n 4 {SAY}", "openmpi", id="mpirun", marks=needs_mpi),
    pytest.param(f"{AS_ROOT}; mpirun -n 4 {SAY} --use_mpi", "mpi", id="mpirun and mpi4py", marks=needs_mpi),
    pytest.param(
        f"srun --ntasks-per-node=1 --ntasks=2 {TORCHRUN} --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d "
        f"--rdzv-endpoint=node1:29411 tests/slurm/say_rank.py",
        "env",
        id="torchrun",
    ),
]


@pytest.mark.parametrize(("command", "source"), COMMANDS)
def test_four_processes_on_two_nodes_find_their_ranks_and_each_other(lab, command, source):
    said = say_of_job(lab, command, "--nodes=2", "--ntasks-per-node=2")
    ranks = sorted(
        (json.loads(line.partition("RANK ")[2]) for line in said.splitlines() if line.startswith("RANK ")),
        key=lambda facts: facts["rank"],
    )
    assert [facts["rank"] for facts in ranks] == [0, 1, 2, 3], said
    assert [facts["local_rank"] for facts in ranks] == [0, 1, 0, 1]
    assert {facts["source"] for facts in ranks} == {source}
    assert {facts["sum"] for facts in ranks} == {15.0}
    hosts = [facts["host"] for facts in ranks]
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]


@needs_mpi
def test_an_mpi_that_srun_does_not_reach_is_told_with_the_option_that_helps(lab):
    said = say_of_job(lab, f"srun --mpi=none {SAY} --use_mpi", "--nodes=2", "--ntasks-per-node=1", exit_code="2:0")
    assert "LaunchError: srun tells MPI nothing of the ranks, but Slurm started 2" in said
    assert "--mpi=pmix" in said
    assert "Traceback" not in said


def test_a_job_of_several_tasks_started_without_srun_is_told_to_use_it(lab):
    said = say_of_job(lab, SAY, "--nodes=2", "--ntasks-per-node=2", exit_code="2:0")
    assert "was not started by srun and would train alone" in said


def test_two_nodes_with_one_empty_folder_for_operators_compile_them_once(lab):
    folder = lab.shared / "operators"
    folder.mkdir()
    said = say_of_job(lab, f"TORCH_EXTENSIONS_DIR={folder} srun {SAY}", "--nodes=2", "--ntasks-per-node=1")
    assert said.count('"sum": 3.0') == 2, said
    log = (folder / "deepspeed_shm_comm" / ".ninja_log").read_text()
    assert log.count("deepspeed_shm_comm.so") == 1, log
    assert not (folder / "deepspeed_shm_comm" / "lock").exists()
