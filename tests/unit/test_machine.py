"""A rank's machine: cores, memory, GPUs, and the operators compiled for it."""

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from launcher_environments import SRUN, TORCHRUN

from distilcb import machine
from distilcb.errors import LaunchError
from distilcb.launcher import World, discover


def test_ranks_of_one_machine_share_its_cores(environ_of_nobody):
    chosen: list[int] = []
    environ_of_nobody.setattr(torch, "set_num_threads", chosen.append)
    environ_of_nobody.setattr(os, "sched_getaffinity", lambda _process: set(range(8)))
    for local_size, size in ((1, 1), (2, 4), (3, 3), (16, 16), (0, 4)):
        machine.size_cpu_threads(World("env", 0, size, 0, local_size, "node1", 12345))
    assert chosen == [8, 4, 2, 1, 2]


def test_threads_that_the_user_chose_are_left_alone(environ_of_nobody):
    environ_of_nobody.setenv("OMP_NUM_THREADS", "3")
    chosen: list[int] = []
    environ_of_nobody.setattr(torch, "set_num_threads", chosen.append)
    machine.size_cpu_threads(World("env", 0, 2, 0, 2, "node1", 12345))
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
    environ_of_nobodys_tools.setattr(machine, "uses_cuda", lambda: gpu)
    machine.use_own_tools()
    folder = tmp_path / "torch_extensions" / kind
    assert machine.compiled_operators_folder() == folder
    assert not machine.is_compiled("fused_adam")
    (folder / "fused_adam").mkdir(parents=True)
    (folder / "fused_adam" / "fused_adam.so").touch()
    assert machine.is_compiled("fused_adam")


def test_a_folder_for_operators_that_the_user_named_is_kept(environ_of_nobodys_tools):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", "/elsewhere")
    machine.use_own_tools()
    assert machine.compiled_operators_folder() == Path("/elsewhere")


def test_an_environment_that_cannot_be_written_to_leaves_torch_its_own_folder(environ_of_nobodys_tools, tmp_path):
    environ_of_nobodys_tools.setattr(sys, "prefix", str(tmp_path / "missing"))
    environ_of_nobodys_tools.setenv("XDG_CACHE_HOME", str(tmp_path))
    machine.use_own_tools()
    assert machine.compiled_operators_folder() == tmp_path / "torch_extensions"
    built = tmp_path / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu" / "fused_adam"
    built.mkdir(parents=True)
    assert not machine.is_compiled("fused_adam")
    (built / "fused_adam.so").touch()
    assert machine.is_compiled("fused_adam")


@pytest.mark.parametrize(
    ("installed", "kind", "compiled"),
    [(True, "cpu", True), (False, "cpu", False), (True, "cuda", False)],
)
def test_an_operator_that_deepspeed_was_installed_with_for_this_device_is_compiled(
    environ_of_nobodys_tools, tmp_path, installed, kind, compiled
):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "nothing"))
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed/__init__.py").write_text("raise AssertionError('imported')")
    facts = f"installed_ops={{'fused_adam': {installed}, 'async_io': True}}\naccelerator_name='{kind}'\n"
    (tmp_path / "deepspeed/git_version_info_installed.py").write_text(facts)
    environ_of_nobodys_tools.delitem(sys.modules, "deepspeed", raising=False)
    environ_of_nobodys_tools.syspath_prepend(tmp_path)
    environ_of_nobodys_tools.setattr(machine, "uses_cuda", lambda: False)
    assert machine.is_compiled("fused_adam") is compiled
    assert not machine.is_compiled("deepspeed_shm_comm")


def test_nvcc_is_found_where_torch_looks_for_it_and_else_in_path(environ_of_nobodys_tools, tmp_path):
    from torch.utils import cpp_extension

    environ_of_nobodys_tools.setattr(machine, "uses_cuda", lambda: True)
    for name in ("cuda/bin", "path"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "nvcc").touch(mode=0o755)
    environ_of_nobodys_tools.setattr(cpp_extension, "CUDA_HOME", str(tmp_path / "cuda"))
    environ_of_nobodys_tools.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine.find_compiler() == str(tmp_path / "cuda/bin/nvcc")
    environ_of_nobodys_tools.setenv("PATH", str(tmp_path / "path"))
    for home in (str(tmp_path / "runtime_only"), None):
        environ_of_nobodys_tools.setattr(cpp_extension, "CUDA_HOME", home)
        assert machine.find_compiler() == str(tmp_path / "path/nvcc")
    environ_of_nobodys_tools.setenv("PATH", str(tmp_path / "nowhere"))
    assert machine.find_compiler() is None


def test_a_compilation_elsewhere_is_waited_for(environ_of_nobodys_tools, tmp_path):
    environ_of_nobodys_tools.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "fused_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    threading.Timer(1.0, lock.unlink).start()
    started = time.monotonic()
    machine.wait_for_compiler("fused_adam")
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
        machine.wait_for_compiler("fused_adam")


def _page_faults_of_a_repeated_tensor(environ: dict[str, str]) -> int:
    """Pages that the kernel hands out while a tensor of 16 MB is made and dropped twenty times, warmed up."""
    code = (
        "import resource, torch\n"
        "from distilcb import machine\n"
        "machine.keep_freed_memory()\n"
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
        machine.select_cuda_device(discover())


def test_each_rank_selects_the_gpu_of_its_local_rank(environ_of_nobody):
    selected: list[int] = []
    environ_of_nobody.setattr(torch.cuda, "device_count", lambda: 4)
    environ_of_nobody.setattr(torch.cuda, "set_device", selected.append)
    machine.select_cuda_device(discover(SRUN))
    assert selected == [2]
