"""What each rank runs on, and how fast its device multiplies matrices while the others of its machine do too."""

import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

from distilcb.distributed import barrier, device
from distilcb.engine.operators import needed_operators
from distilcb.machine import find_compiler, is_compiled, uses_cuda
from distilcb.train.preflight import device_name, versions
from distilcb.watchdog import Place, at

# Rounds of all precisions in turn, so that a passing disturbance meets few of a precision's rounds; one more warms up.
_ROUNDS = 7
_ROUND_SECONDS = 0.4
# Large enough for a device's full rate, small enough for many in a round: of a GPU, of a core.
_MATRIX_SIZE = {"cuda": 8192, "cpu": 512}
_PRECISIONS = {
    "cuda": {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16},
    # CPUs multiply fp16 at a hundredth of the others' rate, and DeepSpeed refuses to train in it there.
    "cpu": {"fp32": torch.float32, "bf16": torch.bfloat16},
}


def describe_rank() -> dict[str, Any]:
    """What this rank runs on; under "same" what must be the same on all."""
    same = versions()
    if uses_cuda():
        same |= {"CUDA": str(torch.version.cuda), "NCCL": ".".join(map(str, torch.cuda.nccl.version()))}
        memory = torch.cuda.get_device_properties(device()).total_memory
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "host": platform.node(),
        "slurm_node": os.environ.get("SLURMD_NODENAME"),
        "device": device_name(),
        "devices_seen": torch.cuda.device_count() if uses_cuda() else 0,
        "memory_bytes": memory,
        "driver": _driver() if uses_cuda() else None,
        "cpu": _cpu_model(),
        "cores_allowed": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "compiled": {name: is_compiled(name) for name in needed_operators()},
        "compiler": find_compiler(),
        "same": same,
    }


def measure_products() -> dict[str, float]:
    """This rank's rate in each precision, in TFLOP/s, the median of rounds that all ranks take at the same time.

    On a CPU also "core_share": how much of its threads' time it was given. Every rank must call it.
    """
    kind = device().type
    matrix = torch.randn(_MATRIX_SIZE[kind], _MATRIX_SIZE[kind], device=device())
    operands = {name: matrix.to(dtype) for name, dtype in _PRECISIONS[kind].items()}
    rates: dict[str, list[float]] = {name: [] for name in operands}
    shares: list[float] = []
    for number in range(_ROUNDS + 1):
        at(Place.PRODUCTS, micro=number)
        for name, operand in operands.items():
            barrier()
            rate, share = _one_round(operand)
            if number:
                rates[name].append(rate)
                shares.append(share)
    found = {name: statistics.median(each) for name, each in rates.items()}
    return found if uses_cuda() else found | {"core_share": statistics.median(shares)}


def synchronize() -> None:
    """Wait until the device has done what it was given."""
    if uses_cuda():
        torch.cuda.synchronize()


def _one_round(operand: torch.Tensor) -> tuple[float, float]:
    """TFLOP/s, and this process's share of its threads' time."""
    out = torch.empty_like(operand)
    synchronize()
    products, elapsed = 0, 0.0
    started, used = time.perf_counter(), time.process_time()
    while elapsed < _ROUND_SECONDS:
        for _ in range(4):
            torch.matmul(operand, operand, out=out)
        synchronize()
        products += 4
        elapsed = time.perf_counter() - started
    share = (time.process_time() - used) / elapsed / torch.get_num_threads()
    return products * 2 * len(operand) ** 3 / elapsed / 1e12, share


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return found[1] if found else "unknown"


def _driver() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
