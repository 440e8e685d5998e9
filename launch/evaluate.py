"""Held-out figures of models, beside their teacher's: python launch/evaluate.py MODEL [MODEL ...] --output DIR"""

import argparse
import sys
from pathlib import Path

from distilcb import distributed
from distilcb.command_line import Parser, number
from distilcb.config import DataConfig, cache_folder


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub names, such as runs/mini/student")
    parser.add_argument("--teacher", metavar="MODEL", help="kl and agreement are with it")
    parser.add_argument("--heldout", nargs="+", metavar="NAME", help="text or blocks (default: the shipped text)")
    parser.add_argument("--seq_len", type=number(8, 65_536), default=128, help="tokens in a block (default: 128)")
    parser.add_argument("--text_field", default="text", help="the text's name in .jsonl and .parquet (default: text)")
    parser.add_argument("--maskings", type=number(2), default=8, help="fixed maskings to average over (default: 8)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for results.json and .md")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = parser.parse_args(words)
    from distilcb.eval.models import default_text, evaluate_models, write_results
    from distilcb.eval.report import as_console, heldout_rows

    text = options.heldout or [default_text()]
    cut = {"seq_len": options.seq_len, "text_field": options.text_field, "maskings": options.maskings}
    distributed.configure_logging(distributed.discover())
    world = distributed.start()
    models, cache = options.models, cache_folder(DataConfig())
    figures = evaluate_models(models, teacher=options.teacher, text=text, cache=cache, world=world, **cut)
    settings = {"models": models, "teacher": options.teacher, "text": text, "ranks": world.size} | cut
    distributed.on_main(lambda: write_results(options.output, figures, settings))
    if world.is_main:
        print(f"{as_console(heldout_rows(figures))}\n\nresults: {options.output}")
    distributed.stop()


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
