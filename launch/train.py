"""Distil a teacher into a smaller student: deepspeed launch/train.py [--recipe FILE] [--section.name VALUE ...]

Or into several at once, which learn from the same passes of the teacher: --students FILE FILE ...
"""

import sys

from distilcb.command_line import parse_command_lines
from distilcb.distributed import exit_code, stop


def main(words: list[str]) -> None:
    commands = parse_command_lines(words)
    # torch and DeepSpeed take seconds to import; --help should not
    from distilcb.train.build import build_together
    from distilcb.train.dry_run import dry_run
    from distilcb.train.loop import train_together

    if commands[0].dry_run:
        dry_run(commands[0])
    elif runs := build_together(commands):
        train_together(runs)
    stop()


if __name__ == "__main__":
    sys.exit(exit_code(main))
