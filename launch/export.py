"""Write a run's checkpoint as a Hugging Face folder: python launch/export.py RUN [--step N] --output DIR"""

import sys
from pathlib import Path

from distilcb.command_line import Parser
from distilcb.distributed import exit_code


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="run folder, such as runs/mini")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest good one)")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    options = parser.parse_args(words)
    from distilcb.train.export import export_run

    print(f"student: {export_run(options.run, step=options.step, output=options.output)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
