"""Who a process is under each launcher, from environments such as that launcher makes."""

import re
import socket
import sys
from types import SimpleNamespace

import pytest
from launcher_environments import BATCH_SHELL, OPENMPI, SRUN, TORCHRUN

from distilcb import launcher
from distilcb.errors import LaunchError
from distilcb.launcher import World, discover, export


def test_torchruns_variables_are_taken_as_they_are():
    assert discover(TORCHRUN) == World("env", 5, 8, 1, 4, "node1", 12345)


def test_the_deepspeed_launchers_local_size_counts_as_the_local_size():
    environ = {name: text for name, text in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert discover(environ | {"LOCAL_SIZE": "4"}).local_size == 4


def test_a_local_size_that_nobody_names_is_zero():
    environ = {name: text for name, text in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert discover(environ).local_size == 0


def test_several_ranks_without_a_meeting_place_are_refused():
    environ = {name: text for name, text in TORCHRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(LaunchError, match="MASTER_ADDR is not"):
        discover(environ)


def test_one_rank_of_one_needs_no_meeting_place():
    world = discover({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"})
    assert (world.source, world.size, world.master_addr) == ("env", 1, "127.0.0.1")
    assert world.master_port > 0


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("text", ["four", "-1", "1.5"])
def test_what_is_not_a_whole_number_is_refused_by_name(name, text):
    with pytest.raises(LaunchError, match=re.escape(f"{name}={text!r}")):
        discover(TORCHRUN | {name: text})


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"RANK": "8"}, "rank 8 is not below the world size 8"),
        ({"LOCAL_RANK": "4"}, "local rank 4 is not below the local size 4"),
        ({"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "7"}, "local size 7 is above the world size 6"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "rank 0 is not below the world size 0"),
        ({"MASTER_PORT": "65536"}, "port 65536 is not between 1 and 65535"),
    ],
)
def test_numbers_that_contradict_each_other_are_refused(wrong, complaint):
    with pytest.raises(LaunchError, match=complaint):
        discover(TORCHRUN | wrong)


def test_all_contradictions_are_told_at_once():
    with pytest.raises(LaunchError, match=r"rank 9 .*; local rank 4 .*; port 70000 "):
        discover(TORCHRUN | {"RANK": "9", "LOCAL_RANK": "4", "MASTER_PORT": "70000"})


@pytest.mark.parametrize(
    "environ",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "4"},
        {"RANK": "0", "WORLD_SIZE": "4"},
        {"LOCAL_RANK": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
        {"PMI_RANK": "0", "PMI_SIZE": "4"},
    ],
)
def test_half_of_a_launchers_variables_never_make_a_silent_world_of_one(environ):
    with pytest.raises(LaunchError, match="there may be other ranks"):
        discover(environ)


def test_open_mpis_ranks_are_found_on_one_host():
    assert discover(OPENMPI) == World("openmpi", 2, 4, 2, 4, "127.0.0.1", launcher.DEFAULT_PORT)


def test_mvapichs_ranks_are_found():
    environ = {name.replace("OMPI_", "MV2_"): text for name, text in OPENMPI.items()}
    assert discover(environ) == World("mvapich", 2, 4, 2, 4, "127.0.0.1", launcher.DEFAULT_PORT)


def test_hydras_ranks_are_found():
    environ = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    world = discover(environ | {"MASTER_ADDR": "node1", "MASTER_PORT": "12345"})
    assert world == World("hydra", 3, 4, 1, 2, "node1", 12345)


def test_mpirun_inside_a_slurm_job_is_not_taken_for_srun():
    helper = SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "3"}
    across_hosts = OPENMPI | {"OMPI_COMM_WORLD_SIZE": "8"}
    world = discover(helper | across_hosts)
    assert (world.source, world.rank, world.size) == ("openmpi", 2, 8)
    assert world.master_addr == "jz012"


def test_mpiruns_port_is_the_same_on_nodes_with_and_without_its_helpers_step():
    across_hosts = OPENMPI | {"OMPI_COMM_WORLD_SIZE": "8"}
    assert discover(SRUN | across_hosts).master_port == discover(BATCH_SHELL | across_hosts).master_port


def test_torchrun_under_mpirun_under_srun_is_taken_for_torchrun():
    assert discover(SRUN | OPENMPI | TORCHRUN).source == "env"


class FakeCommunicator:
    """Rank zero of a communicator of `size` whose other ranks only listen."""

    def __init__(self, size: int, local_size: int) -> None:
        self.rank, self.size, self._local_size = 0, size, local_size

    def Split_type(self, _kind: int) -> SimpleNamespace:  # noqa: N802 -- mpi4py's name
        return SimpleNamespace(rank=0, size=self._local_size)

    def bcast(self, value: object, root: int) -> object:
        assert root == 0
        return value


@pytest.fixture
def fake_mpi(monkeypatch):
    def install(size: int, local_size: int) -> None:
        mpi = SimpleNamespace(
            COMM_WORLD=FakeCommunicator(size, local_size),
            COMM_TYPE_SHARED=1,
            Get_library_version=lambda: "Fake MPI v1, long text",
        )
        monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))

    return install


def test_mpi_is_asked_before_the_variables_of_mpirun_and_srun(fake_mpi):
    fake_mpi(size=4, local_size=4)
    world = discover(SRUN | OPENMPI, use_mpi=True)
    assert (world.source, world.rank, world.size, world.local_size) == ("mpi", 0, 4, 4)


def test_ranks_on_several_hosts_are_not_sent_to_loopback(fake_mpi):
    fake_mpi(size=4, local_size=2)
    assert not discover({}, use_mpi=True).master_addr.startswith("127.")


def test_mpirun_on_several_hosts_that_names_none_has_rank_zero_tell(fake_mpi):
    fake_mpi(size=8, local_size=4)
    assert discover(OPENMPI | {"OMPI_COMM_WORLD_SIZE": "8"}).source == "mpi"


def test_an_mpi_that_cannot_see_slurms_other_tasks_is_refused_with_the_option_to_use(fake_mpi):
    fake_mpi(size=1, local_size=1)
    with pytest.raises(LaunchError, match=r"Fake MPI v1\) sees 1 process, but Slurm started 9.*--mpi=pmix"):
        discover(SRUN | {"PMIX_RANK": "6"}, use_mpi=True)


def test_where_srun_tells_mpi_nothing_mpi_is_not_even_started(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # importing it would fail
    with pytest.raises(LaunchError, match=r"srun tells MPI nothing of the ranks, but Slurm started 9.*--mpi=pmix"):
        discover(SRUN, use_mpi=True)


def test_an_mpi_that_is_not_mpiruns_is_refused(fake_mpi):
    fake_mpi(size=1, local_size=1)
    with pytest.raises(LaunchError, match="sees 1 process, but OMPI_COMM_WORLD_SIZE=4"):
        discover(OPENMPI, use_mpi=True)


def test_a_lone_mpi_process_in_a_batch_shell_is_refused(fake_mpi):
    fake_mpi(size=1, local_size=1)
    with pytest.raises(LaunchError, match="Start it with srun"):
        discover(BATCH_SHELL, use_mpi=True)


def test_a_missing_mpi_is_a_launch_error_with_a_way_round(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"mpi4py does not load.*start with srun"):
        discover({}, use_mpi=True)


def test_an_srun_task_knows_its_place():
    world = discover(SRUN)
    assert (world.source, world.rank, world.size, world.local_rank) == ("srun", 6, 9, 2)
    assert world.master_addr == "jz012"


@pytest.mark.parametrize(("node", "tasks"), [(0, 4), (1, 4), (2, 1)])
def test_the_local_size_is_that_of_the_tasks_own_node(node, tasks):
    assert discover(SRUN | {"SLURM_NODEID": str(node), "SLURM_LOCALID": "0"}).local_size == tasks


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("jz012", "jz012"),
        ("jz012,jz020", "jz012"),
        ("jz[012-015,020],x1", "jz012"),
        ("jz[7,9]", "jz7"),
        ("rack[0-1]node[08-11]", "rack0node08"),
        ("gpu-a[1-2]-ib,x1", "gpu-a1-ib"),
    ],
)
def test_the_meeting_place_is_the_first_host_of_the_step(nodes, first):
    assert discover(SRUN | {"SLURM_STEP_NODELIST": nodes}).master_addr == first


def test_a_master_address_that_the_job_exports_wins():
    assert discover(SRUN | {"MASTER_ADDR": "node7"}).master_addr == "node7"


def test_a_step_smaller_than_its_job_counts_its_own_tasks():
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NTASKS": "9"}
    world = discover(SRUN | step | {"SLURM_PROCID": "1", "SLURM_NODEID": "0", "SLURM_LOCALID": "1"})
    assert (world.rank, world.size, world.local_size) == (1, 2, 2)


def test_pmi2_under_srun_is_still_srun():
    assert discover(SRUN | {"PMI_RANK": "6", "PMI_SIZE": "9"}).source == "srun"


def test_a_world_size_exported_by_the_batch_script_does_not_hide_srun():
    assert discover(SRUN | {"WORLD_SIZE": "9"}).source == "srun"


@pytest.mark.parametrize("step", ["", "batch", "interactive", "4294967290", "4294967291"])
def test_the_batch_shell_of_several_tasks_is_sent_to_srun(step):
    with pytest.raises(LaunchError, match=r"job 1000 has 9 tasks.*Start it with srun"):
        discover(BATCH_SHELL | {"SLURM_STEP_ID": step})


def test_a_batch_shell_whose_tasks_are_given_per_node_is_sent_to_srun():
    environ = {"SLURM_JOB_ID": "1000", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2"}
    with pytest.raises(LaunchError, match="has 8 tasks"):
        discover(environ)


def test_the_batch_shell_of_one_task_is_a_single_process():
    assert discover(BATCH_SHELL | {"SLURM_NTASKS": "1"}).source == "single"


@pytest.mark.parametrize(
    "wrong",
    [
        {"SLURM_STEP_NODELIST": "[]"},
        {"SLURM_STEP_NODELIST": "jz[012"},
        {"SLURM_STEP_NODELIST": ""},
        {"SLURM_STEP_TASKS_PER_NODE": "4(x2"},
        {"SLURM_STEP_TASKS_PER_NODE": ""},
        {"SLURM_NODEID": "3"},
        {"SLURM_LOCALID": "4"},
        {"SLURM_PROCID": "9"},
        {"SLURM_STEP_NUM_TASKS": "many"},
        {"SLURM_JOB_ID": "one"},
    ],
)
def test_damaged_slurm_variables_are_launch_errors(wrong):
    with pytest.raises(LaunchError):
        discover(SRUN | wrong)


def test_slurm_ports_stay_in_their_range_for_any_job():
    for job in (1, 2857, 2858, 123_456, 67_108_863):
        assert 10_000 <= discover(SRUN | {"SLURM_JOB_ID": str(job)}).master_port < 30_000


@pytest.mark.parametrize("other", [{"SLURM_JOB_ID": "1001"}, {"SLURM_STEP_ID": "4"}, {"SLURM_RESTART_COUNT": "1"}])
def test_the_next_job_step_or_restart_gets_another_port(other):
    assert discover(SRUN | other).master_port != discover(SRUN).master_port


def test_all_tasks_of_a_step_arrive_at_one_port():
    elsewhere = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert discover(SRUN | elsewhere).master_port == discover(SRUN).master_port


@pytest.mark.parametrize("environ", [{}, OPENMPI, SRUN])
def test_a_master_port_that_is_given_is_kept(environ):
    assert discover(environ | {"MASTER_PORT": "23456"}).master_port == 23456


def test_a_process_that_nobody_launched_is_a_world_of_one():
    world = discover({})
    assert (world.source, world.rank, world.size, world.local_rank, world.local_size) == (
        "single",
        0,
        1,
        0,
        1,
    )


def test_a_single_process_gets_a_port_on_which_it_can_listen():
    with socket.socket() as server:
        port = discover({}).master_port
        server.bind(("127.0.0.1", port))
        server.listen()
        assert server.getsockname() == ("127.0.0.1", port)


def test_rank_zero_is_main_and_the_first_of_a_machine_is_local_main():
    def of(rank: int, local_rank: int) -> World:
        return World("env", rank, 8, local_rank, 4, "node1", 12345)

    assert of(0, 0).is_main
    assert of(0, 0).is_local_main
    assert not of(4, 0).is_main
    assert of(4, 0).is_local_main
    assert not of(5, 1).is_local_main


@pytest.mark.parametrize("environ", [TORCHRUN, SRUN])
def test_what_is_exported_is_discovered_again(environ):
    world = discover(environ)
    exported: dict[str, str] = {}
    export(world, exported)
    again = discover(exported)
    assert again == World("env", *[getattr(world, name) for name in list(World.__dataclass_fields__)[1:]])


def test_deepspeeds_local_size_is_never_exported():
    for local_size in (0, 4):
        exported: dict[str, str] = {}
        export(World("srun", 0, 4, 0, local_size, "node1", 12345), exported)
        assert "LOCAL_SIZE" not in exported
        assert ("LOCAL_WORLD_SIZE" in exported) == (local_size > 0)
