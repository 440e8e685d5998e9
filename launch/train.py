"""Distil a teacher into a smaller student: deepspeed launch/train.py [--recipe FILE] [--section.name VALUE ...]"""

import sys

from distilcb.command_line import parse_command_line
from distilcb.distributed import exit_code, stop


def main(words: list[str]) -> None:
    command = parse_command_line(words)
    # torch and DeepSpeed take seconds to import; --help should not
    from distilcb.train.build import build
    from distilcb.train.dry_run import dry_run
    from distilcb.train.loop import train

    if command.dry_run:
        dry_run(command)
    elif (run := build(command)) is not None:
        train(run)
    stop()


if __name__ == "__main__":
    sys.exit(exit_code(main))
