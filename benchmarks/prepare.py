"""From text to blocks: MB and tokens a second, beside line-by-line tokenisation and the first Distil* scripts' way.

python benchmarks/prepare.py [--quick] [--json FILE] [--report FILE] [--folder DIR] [--megabytes N] [--large N]

Ours is the whole of launch/prepare.py's work: hashing, reading, tokenising, packing, writing Arrow files, counting. The
plain loop only gives each line to the Hugging Face tokenizer and keeps the ids. The original way does so with the
separators written into the text, turns each line into an array, shuffles and pickles them all, and reads the pickle
again to count tokens. Text is the shipped one again and again with other words between.

Ours cuts it into parts of 4 MB, where launch/prepare.py has 32, so that a small text too gives every process some; only
--large has the command's own.
"""

import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from text import MINI, write_text

from distilcb import distributed
from distilcb.command_line import folder as existing
from distilcb.command_line import number
from distilcb.config import REPOSITORY
from distilcb.data.blocks import read_description
from distilcb.data.parts import PART_BYTES
from distilcb.data.prepare import prepare
from distilcb.data.tokenizer import TextTokenizer

SEQ_LEN = 512
PART_MEGABYTES = 4


def main(words: list[str]) -> None:
    # Processes that prepare begin by importing this file, and launch/prepare.py has nothing as slow as torch.
    from side_by_side import medians, parser_of, tell

    parser = parser_of(__doc__ or "")
    parser.add_argument("--folder", type=existing, help="for text and blocks (default: the temporary folder)")
    parser.add_argument("--megabytes", type=number(1), help="of text for ours (default: 96, with --quick 6)")
    parser.add_argument(
        "--large", type=number(1), metavar="N", help="also time N MB once, launch/prepare.py on all cores"
    )
    options = parser.parse_args(words)
    megabytes = options.megabytes or (6 if options.quick else 96)
    rounds = 1 if options.quick else 3
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        long, short = (
            write_text(folder / "long.txt", megabytes << 20),
            write_text(folder / "short.txt", megabytes << 18),
        )
        sizes = {"long": long.stat().st_size, "short": short.stat().st_size}
        # The slow ones get a quarter of the text.
        contenders: dict[str, tuple[Callable[[], Any], int]] = {
            "line by line, one process": (lambda: line_by_line(short), sizes["short"]),
            "the original's way": (lambda: original_way(short, folder / "original.pickle"), sizes["short"]),
        }
        for processes in sorted({1, 2, cores}):
            contenders[f"ours, {processes} process(es)"] = (
                lambda processes=processes: ours(long, folder / "blocks", processes),
                sizes["long"],
            )
        seconds = medians({name: call for name, (call, _) in contenders.items()}, rounds=rounds)
        description = read_description(folder / "blocks")
        tokens_a_byte = description.blocks * SEQ_LEN / sizes["long"]
        peak = peak_of_a_process(long, folder / "blocks")
        long.unlink()
        large = prepare_large(folder, options.large << 20, cores) if options.large else {}
    rates = {name: size / seconds[name] for name, (_, size) in contenders.items()}
    rows = {name: figures_of(rate, rates, tokens_a_byte) for name, rate in rates.items()}
    figures = {"megabytes": megabytes, "cores": cores, "peak_bytes_of_a_process": peak} | rows
    if large:
        figures["large"] = large
    text = text_of(rows, large, rounds=rounds, megabytes=megabytes, cores=cores, peak=peak)
    tell("Preparing text", text, figures, options, "python benchmarks/prepare.py " + " ".join(words))


def figures_of(rate: float, rates: dict[str, float], tokens_a_byte: float) -> dict[str, float]:
    """Of a contender that takes so many bytes a second."""
    return {
        "bytes_per_second": rate,
        "tokens_per_second": rate * tokens_a_byte,
        "over_line_by_line": rate / rates["line by line, one process"],
        "over_the_original": rate / rates["the original's way"],
    }


def text_of(
    rows: dict[str, dict[str, float]],
    large: dict[str, float],
    *,
    rounds: int,
    megabytes: int,
    cores: int,
    peak: int,
) -> str:
    """The figures as Markdown."""
    from side_by_side import table

    shown = [
        (
            name,
            f"{each['bytes_per_second'] / 1e6:.2f}",
            f"{each['tokens_per_second']:,.0f}",
            f"{each['over_line_by_line']:.1f}",
            f"{each['over_the_original']:.1f}",
        )
        for name, each in rows.items()
    ]
    text = (
        f"{megabytes} MB of French for ours, a quarter of it for the others, blocks of {SEQ_LEN}, median of {rounds} "
        "in turn; one process of ours beside one of theirs is the ratio a core. Ours in parts of "
        f"{PART_MEGABYTES} MB, where the command has {PART_BYTES >> 20}.\n\n"
        + table(["", "MB/s", "tokens/s", "line by line = 1", "the original = 1"], shown)
        + f"\n\nPeak memory of one process of ours: {peak / 1e6:,.0f} MB."
    )
    if not large:
        return text
    minutes, rate, most = large["seconds"] / 60, large["bytes"] / large["seconds"], large["peak_bytes_of_a_process"]
    return text + (
        f"\n\n`launch/prepare.py` on {large['bytes'] / 1e9:.1f} GB, {cores} processes: {minutes:.1f} minutes, "
        f"{rate / 1e6:.1f} MB/s; no process had more than {most / 1e6:,.0f} MB of resident memory."
    )


def ours(text: Path, output: Path, processes: int) -> None:
    """All of launch/prepare.py, in smaller parts."""
    shutil.rmtree(output, ignore_errors=True)
    tokenizer = TextTokenizer(str(MINI / "teacher"))
    cut = {"seq_len": SEQ_LEN, "part_bytes": PART_MEGABYTES << 20}
    prepare([str(text)], tokenizer=tokenizer, output=output, processes=processes, **cut)


def line_by_line(text: Path) -> list[list[int]]:
    """The ids of each line."""
    tokenizer = TextTokenizer(str(MINI / "teacher")).hugging_face
    with text.open(encoding="utf-8") as stream:
        return [tokenizer.encode(line.strip(), add_special_tokens=False) for line in stream]


def original_way(text: Path, path: Path) -> Counter[int]:
    """Lines to arrays, shuffled, pickled; and the counts of their tokens from the pickle."""
    tokenizer = TextTokenizer(str(MINI / "teacher")).hugging_face
    first, last = tokenizer.cls_token, tokenizer.sep_token
    arrays = []
    with text.open(encoding="utf-8") as stream:
        for line in stream:
            ids = tokenizer.encode(f"{first} {line.strip()} {last}", add_special_tokens=False)
            arrays.append(np.array(ids, dtype=np.uint16))
    random.Random(0).shuffle(arrays)
    with path.open("wb") as out:
        pickle.dump(arrays, out, protocol=pickle.HIGHEST_PROTOCOL)
    with path.open("rb") as back:
        found = pickle.load(back)
    counts: Counter[int] = Counter()
    for array in found:
        counts.update(array)
    return counts


def peak_of_a_process(text: Path, output: Path) -> int:
    """Resident bytes at most of a process of its own that prepares it all."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_tell_peak, args=(text, output, sender))
    process.start()
    sender.close()  # so that a process that fails ends the waiting
    peak: int = receiver.recv()
    process.join()
    return peak


def _tell_peak(text: Path, output: Path, sender: Any) -> None:
    ours(text, output, 1)
    sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def most_resident(process: int) -> int:
    """Bytes that a process has had resident at most so far."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) * 1024 if found else 0  # a process that has just ended has none


def prepare_large(folder: Path, size: int, processes: int) -> dict[str, float]:
    """Seconds of launch/prepare.py on so many bytes, and the most memory that one of its processes had resident."""
    text = write_text(folder / "large.txt", size)
    words = ["--input", str(text), "--tokenizer", str(MINI / "teacher"), "--output", str(folder / "large")]
    words += ["--processes", str(processes)]
    started = time.perf_counter()
    command = subprocess.Popen([sys.executable, str(REPOSITORY / "launch" / "prepare.py"), *words])
    peak = 0
    try:
        while command.poll() is None:
            with suppress(psutil.Error, OSError):
                for process in [psutil.Process(command.pid), *psutil.Process(command.pid).children(recursive=True)]:
                    peak = max(peak, most_resident(process.pid))
            time.sleep(0.5)
    finally:
        command.kill()
    seconds = time.perf_counter() - started
    if command.returncode:
        raise SystemExit(f"launch/prepare.py ended with exit code {command.returncode}")
    return {"bytes": text.stat().st_size, "seconds": seconds, "peak_bytes_of_a_process": peak}


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
