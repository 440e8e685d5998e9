"""Distil a teacher into a smaller student: deepspeed launch/train.py [--recipe FILE] [--section.name VALUE ...]"""

import sys

from distilcb.config import parse_command_line
from distilcb.distributed import exit_code, stop


def main(words: list[str]) -> None:
    command = parse_command_line(words)
    # torch and DeepSpeed take seconds to import; --help should not
    from distilcb.train.build import build
    from distilcb.train.loop import train

    run = build(command)
    if run is not None:
        train(run)
    stop()


if __name__ == "__main__":
    sys.exit(exit_code(main))
