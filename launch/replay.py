"""Take a step of a past run again, sample by sample, and compare it: python launch/replay.py RUN --step N"""

import argparse
import sys
from pathlib import Path

from distilcb.command_line import Parser
from distilcb.distributed import exit_code, stop

SETTINGS = {
    "teacher.model": "where the teacher lies now",
    "data.train": "where the training text lies now",
    "data.heldout": "taken and not read: held-out text is no part of a step",
    "data.cache": "where prepared text is kept",
    "data.workers": "processes that make batches ahead of time, a rank",
    "optim.micro_batch": "where the run was resumed with another",
    "train.log_every": "where the run was resumed with another",
}


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder, such as runs/mini; it is not changed")
    parser.add_argument("--step", type=int, required=True, help="the step, counted from 1 as in metrics.jsonl")
    parser.add_argument("--worst", type=int, metavar="COUNT", help="print so many samples only (default: all)")
    parser.add_argument("--full", action="store_true", help="print the samples' whole text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all that was found as JSON, too")
    for name, meaning in SETTINGS.items():
        parser.add_argument(f"--{name}", dest=name, metavar="VALUE", help=f"{meaning} (default: as the run began)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = vars(parser.parse_args(words))
    from distilcb.train.replay import replay

    settings = [word for name in SETTINGS if options[name] is not None for word in (f"--{name}", options[name])]
    shown = {name: options[name] for name in ("worst", "full", "output")}
    replay(options["run"], step=options["step"], settings=settings, **shown)
    stop()


if __name__ == "__main__":
    sys.exit(exit_code(main))
