"""Figures of models beside their teacher's: python launch/evaluate.py MODEL [MODEL ...] [--tasks ...] --output DIR"""

import sys

from distilcb import distributed
from distilcb.finetune.evaluate_command import parser_of, run


def main(words: list[str]) -> None:
    options = parser_of(__doc__).parse_args(words)
    distributed.configure_logging(distributed.discover())
    run(options)


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
