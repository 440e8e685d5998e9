"""Batches a second: read, masked and laid out, from a warm and from a cold page cache; and what a step waits for them.

python benchmarks/loader.py [--quick] [--json FILE] [--report FILE] [--folder DIR] [--seq_len 256]

Text is the shipped one again and again with other words between. Each contender takes its turns in the same run; the
plain one is what a DataLoader without order or masks could give at best: reading rows one after the other. What workers
have ready when their turn begins is taken before the clock starts, and the cold cache is looked at, page by page.
"""

import ctypes
import gc
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import parser_of, table, tell
from text import MINI, write_text

from distilcb import distributed
from distilcb.command_line import folder, number, parse_command_line
from distilcb.config import MaskingConfig
from distilcb.data.blocks import Blocks
from distilcb.data.loader import FETCHED_AHEAD, Batch, Cut, MicroBatches, training_batches
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.prepare import prepare
from distilcb.data.tokenizer import TextTokenizer
from distilcb.train.build import take_place, wire_stepper
from distilcb.train.models import build_models

MICRO_BATCH = 32
FROM_COLD = "the same from a cold page cache"
# The most of its pages that a cold cache may hold.
COLD_SHARE = 0.01


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--folder", type=folder, help="for text and blocks (default: the temporary folder)")
    parser.add_argument("--seq_len", type=number(8, 65_536), default=256)
    parser.add_argument("--megabytes", type=number(1), help="of text (default: 64, with --quick 4)")
    options = parser.parse_args(words)
    rounds, rows_a_turn = (2, 512) if options.quick else (5, 4096)
    tokenizer = TextTokenizer(str(MINI / "teacher"))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        text = write_text(Path(name) / "text.txt", (options.megabytes or (4 if options.quick else 64)) << 20)
        blocks_folder = Path(name) / "blocks"
        cores = len(os.sched_getaffinity(0))
        prepare([str(text)], tokenizer=tokenizer, output=blocks_folder, seq_len=options.seq_len, processes=cores)
        blocks = Blocks(blocks_folder)
        figures: dict[str, Any] = {"blocks": len(blocks), "seq_len": options.seq_len}
        cold_folder = shutil.copytree(blocks_folder, Path(name) / "cold")
        rates, in_memory = measure(blocks, cold_folder, tokenizer, rows_a_turn, rounds)
        base = rates["rows in their order, nothing else"]
        for contender, rate in rates.items():
            figures[contender] = {"rows_per_second": rate, "over_plain_reading": rate / base}
        figures["share_of_cold_pages_in_memory"] = in_memory
        shown_names = {name: name for name in rates}
        if in_memory > COLD_SHARE:
            shown_names[FROM_COLD] += f" (not cold: {in_memory:.0%} of its pages were in memory)"
        rows = [(shown_names[name], f"{rate:,.0f}", f"{rate / base:.2f}") for name, rate in rates.items()]
        waited = share_waited(blocks_folder, options.seq_len, steps=4 if options.quick else 12)
        figures["share_of_a_step_waited"] = waited
    shown = (
        f"{len(blocks):,} blocks of {options.seq_len} tokens in micro-batches of {MICRO_BATCH}, median of {rounds}.\n\n"
        + table(["", "rows/s", "plain reading = 1"], rows)
        + f"\n\nOf a step of the shipped mini job with 2 workers, {waited:.2%} is spent waiting for batches."
    )
    tell("The loader", shown, figures, options, "python benchmarks/loader.py " + " ".join(words))
    distributed.stop()


def measure(
    blocks: Blocks, cold_folder: Path, tokenizer: TextTokenizer, rows_a_turn: int, rounds: int
) -> tuple[dict[str, float], float]:
    """Rows a second by contender, and the most of the cold blocks' pages that were in memory when a turn began.

    Args:
        cold_folder: the same blocks, which nobody else has opened.
    """
    vocabulary, seq_len = tokenizer.vocabulary, blocks.description.seq_len
    masking = Masking(MaskingConfig(), vocabulary, blocks.token_counts, seq_len=seq_len, seed=0)
    cut = Cut(MICRO_BATCH, MICRO_BATCH, 0, 1)
    batches = MicroBatches(blocks, Order(len(blocks), seed=0), masking, cut)
    count = rows_a_turn // MICRO_BATCH

    def plain(turn: int) -> None:
        first = turn * rows_a_turn % max(1, len(blocks) - rows_a_turn)
        for start in range(first, first + rows_a_turn, MICRO_BATCH):
            blocks.read(np.arange(start, start + MICRO_BATCH) % len(blocks))

    def in_process(turn: int, batches: MicroBatches = batches) -> None:
        for index in range(turn * count, (turn + 1) * count):
            batches[index]

    def cold(turn: int) -> None:
        opened = Blocks(cold_folder)  # pages that a process has mapped stay, so it is opened for each turn
        in_process(turn, MicroBatches(opened, batches.order, masking, cut))

    streams: dict[int, Iterator[Batch]] = {
        workers: training_batches(batches, first_step=0, last_step=10**6, workers=workers, pin_memory=False)
        for workers in (1, 2)
    }
    contenders: dict[str, Callable[[int], Any]] = {
        "rows in their order, nothing else": plain,
        "shuffled and masked, in this process": in_process,
        FROM_COLD: cold,
    }
    in_memory = []

    def cool() -> None:
        gc.collect()
        forget_pages(cold_folder)
        in_memory.append(share_in_memory(cold_folder))

    before: dict[str, Callable[[], Any]] = {FROM_COLD: cool}
    for workers, stream in streams.items():
        name = f"the same, {workers} worker(s)"
        contenders[name] = lambda turn, stream=stream: list(islice(stream, count))
        ready = workers * FETCHED_AHEAD
        before[name] = lambda stream=stream, ready=ready: deque(islice(stream, ready), maxlen=0)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            if name in before:
                before[name]()
            started = time.perf_counter()
            contender(turn)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    rates = {name: count * MICRO_BATCH / statistics.median(values) for name, values in seconds.items()}
    return rates, max(in_memory)


def forget_pages(folder: Path) -> None:
    """Let the kernel drop what it keeps of the files in memory."""
    for path in folder.iterdir():
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def share_in_memory(folder: Path) -> float:
    """Of the pages of a folder's files those that the kernel holds: all of them on tmpfs, which forgets none."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = []
    for path in folder.iterdir():
        mapped = np.memmap(path, dtype=np.uint8, mode="r")
        held = np.zeros(-(-mapped.size // mmap.PAGESIZE), dtype=np.uint8)
        addresses = ctypes.c_void_p(mapped.ctypes.data), ctypes.c_size_t(mapped.size), ctypes.c_void_p(held.ctypes.data)
        if libc.mincore(*addresses):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
        pages.append(held & 1)
    return float(np.concatenate(pages).mean())


def share_waited(blocks_folder: Path, seq_len: int, *, steps: int) -> float:
    """Of the time of steps of the mini models on these blocks."""
    command = parse_command_line(["--data.train", str(blocks_folder), "--data.seq_len", str(seq_len)])
    place = take_place(command, reads_only=True)
    models = build_models(command.config, place)
    _engine, stepper, batches, _counts = wire_stepper(command.config, place, models, Blocks(blocks_folder))
    stream = training_batches(batches, first_step=0, last_step=steps + 2, workers=2, pin_memory=False)
    waited = spent = 0.0
    for step in range(steps + 2):
        started = time.perf_counter()
        result = stepper.step(step, stream)
        result.sums.tolist()  # waits for the device
        if step >= 2:
            spent += time.perf_counter() - started
            waited += result.data_wait_seconds
    return waited / spent


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
