"""What the benchmarks have in common: contenders in turn, medians, peak memory, tables and files."""

import argparse
import ctypes
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from distilcb.command_line import new_file
from distilcb.config import REPOSITORY
from distilcb.durability import write_durably
from distilcb.eval.speed import in_turn, wait_for_device


def parser_of(description: str) -> argparse.ArgumentParser:
    """With the options that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=new_file, metavar="FILE", help="also write the figures there, ratios named")
    parser.add_argument("--report", type=new_file, metavar="FILE", help="also write the tables there, as Markdown")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer rounds: under a minute")
    return parser


def medians(contenders: Mapping[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Seconds a call, the median of `rounds` in which each contender has its turn, after one to warm up."""
    return {name: statistics.median(values) for name, values in in_turn(contenders, rounds=rounds).items()}


def median_peaks(contenders: Mapping[str, Callable[[], Any]], *, rounds: int = 3) -> dict[str, float]:
    """As `peak_bytes`, the median of `rounds` in turn: what an allocator keeps differs from call to call."""
    found = [{name: peak_bytes(contender) for name, contender in contenders.items()} for _ in range(rounds)]
    return {name: statistics.median(each[name] for each in found) for name in contenders}


def peak_bytes(contender: Callable[[], Any]) -> int:
    """What a call needs at its peak beyond what was there before: device memory on CUDA, else resident memory."""
    contender()
    wait_for_device()
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contender()
        wait_for_device()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what the first call has freed, training keeps
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from now on
    before = _resident("VmRSS")
    contender()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; every column but the first is of figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def setting() -> dict[str, Any]:
    """Commit and hardware."""
    words = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=10"]
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "commit": said.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    model = re.search(r"model name\s*:\s*(.+)", text)
    flags = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{name}\b", text)]
    return f"{model[1].strip() if model else platform.machine()} ({', '.join(flags)})"


def tell(title: str, text: str, figures: Mapping[str, Any], options: argparse.Namespace, command: str) -> None:
    """Print the tables; write them and the figures where the options say."""
    facts = setting()
    where = (
        f"`{command}`, commit {facts['commit']}, {facts['date']}, {facts['device']}, {facts['cores']} cores, "
        f"{facts['threads']} thread(s), torch {facts['torch']}."
    )
    if options.quick:
        where += " Quick: this shows that it runs; its figures are not to be quoted."
    page = f"# {title}\n\n{text}\n\n{where}\n"
    print(page)
    if options.report:
        write_durably(options.report, page)
    if options.json:
        write_durably(options.json, json.dumps({"setting": facts | {"command": command}, **figures}, indent=2) + "\n")
