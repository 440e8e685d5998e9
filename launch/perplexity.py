"""Perplexity of causal models by sliding windows: python launch/perplexity.py MODEL [MODEL ...] --text FILE"""

import argparse
import json
import sys
from pathlib import Path

from distilcb import distributed
from distilcb.command_line import Parser, number


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub names, such as runs/x/student")
    parser.add_argument(
        "--text", nargs="+", required=True, metavar="NAME", help="files or hub:NAME:CONFIG:SPLIT, read as they are"
    )
    parser.add_argument("--window", type=number(2), help="tokens of a window (default: the model's positions)")
    parser.add_argument("--stride", type=number(1), help="tokens from window to window (default: half a window)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = parser.parse_args(words)
    from distilcb.data.corpus import read_as_it_runs
    from distilcb.errors import DataError, writing
    from distilcb.eval.perplexity import perplexity_of, perplexity_rows
    from distilcb.eval.report import as_console

    distributed.configure_logging(distributed.discover())
    text, world = "".join(read_as_it_runs(options.text)), distributed.start()
    found = {
        name: perplexity_of(name, text, size=options.window, stride=options.stride, world=world)
        for name in options.models
    }
    if world.is_main:
        print(as_console(perplexity_rows(found)))
    if options.json and world.is_main:
        with writing(options.json.parent, DataError, "Name a folder that can be written to."):
            figures = {name: each.as_dict() for name, each in found.items()}
            options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    distributed.stop()


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
