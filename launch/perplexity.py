"""Perplexity of causal models by sliding windows: python launch/perplexity.py MODEL [MODEL ...] --text FILE"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from distilcb import distributed
from distilcb.command_line import Parser, number


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub names, such as runs/x/student")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="read as it is; also .gz, .xz, .zst")
    parser.add_argument("--window", type=number(2), help="tokens of a window (default: the model's positions)")
    parser.add_argument("--stride", type=number(1), help="tokens from window to window (default: half a window)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = parser.parse_args(words)
    from distilcb.data.corpus import whole_text
    from distilcb.errors import DataError, writing
    from distilcb.eval.perplexity import perplexity_of
    from distilcb.eval.report import as_console

    distributed.configure_logging(distributed.discover())
    text, world = whole_text(options.text), distributed.start()
    rows, found = [["", "perplexity a token", "a word", "bits a character", "tokens"]], {}
    for name in options.models:
        each = perplexity_of(name, text, size=options.window, stride=options.stride, world=world)
        figures = (f"{each.a_token:.2f}", f"{each.a_word:.2f}", f"{each.bits_a_character:.4f}", f"{each.tokens:,}")
        rows.append([name, *figures])
        found[name] = asdict(each) | {"perplexity_a_token": each.a_token, "perplexity_a_word": each.a_word}
    if world.is_main:
        print(as_console(rows))
    if options.json and world.is_main:
        with writing(options.json.parent, DataError, "Name a folder that can be written to."):
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    distributed.stop()


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
