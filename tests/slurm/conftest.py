"""A real Slurm of two nodes on this machine."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_jobs import SMALL, Lab

from distilcb.config import REPOSITORY


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if shutil.which("slurmctld") is None:
        pytest.skip("needs slurmctld, slurmd and munge (make test-slurm installs them)")
    if os.geteuid() != 0:
        pytest.skip("needs root, to start Slurm's daemons")
    folder, shared = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("shared")
    environ = {name: text for name, text in os.environ.items() if not name.startswith(("SLURM_", "OMP_", "DS_ACC"))}
    # Two ranks on two cores, each with one thread that waits asleep.
    environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
    environ |= {"LAB_DIR": str(folder / "run"), "LAB_SHARED": f"{folder} {shared} {REPOSITORY}"}
    environ |= {"SLURM_CONF": str(folder / "run/etc/slurm.conf"), "XDG_CACHE_HOME": str(shared / "cache")}
    cluster = Lab(folder / "run", shared, environ)
    started = cluster.script("start")
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        if "mode=netns" not in started.stdout:
            pytest.skip("needs CAP_SYS_ADMIN, to give each node a network of its own")
        yield cluster
    finally:
        cluster.script("stop")


@pytest.fixture
def run_dir(lab: Lab, request: pytest.FixtureRequest) -> Path:
    """Where a test's run goes, on the file system that all nodes share; its own, so the name is not cut."""
    return lab.shared / "runs" / re.sub(r"\W+", "_", request.node.name)


@pytest.fixture(scope="session")
def undisturbed(lab: Lab) -> Path:
    """The run folder of the small run on two nodes that nothing happened to."""
    run_dir = lab.shared / "runs" / "undisturbed"
    job = lab.submit("--run_dir", run_dir, *SMALL)
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    return run_dir
