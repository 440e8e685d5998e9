"""Write a student as a Hugging Face folder: a run's checkpoint, or a recipe's student before its first step.

python launch/export.py RUN [--step N] --output DIR
python launch/export.py --untrained [--recipe FILE] [--section.name VALUE ...] --output DIR
"""

import argparse
import sys
from pathlib import Path

from distilcb.command_line import Parser, parse_command_line
from distilcb.distributed import exit_code
from distilcb.errors import ConfigError


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untrained", action="store_true", help="the student of a recipe, with its first weights")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    if "--untrained" in words:
        options, settings = parser.parse_known_args(words)
        config = parse_command_line([*settings, "--dry_run"]).config  # which needs no text
        from distilcb.train.export import export_untrained

        print(f"student: {export_untrained(config, options.output)}")
        return
    parser.add_argument("run", type=Path, nargs="?", help="run folder, such as runs/mini")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest good one)")
    options = parser.parse_args(words)
    if options.run is None:
        raise ConfigError("needed a run folder, such as runs/mini, or --untrained and a --recipe.")
    from distilcb.train.export import export_run

    print(f"student: {export_run(options.run, step=options.step, output=options.output)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
