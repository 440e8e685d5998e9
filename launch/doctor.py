"""Measure the machines one means to train on, and name the slow one: deepspeed launch/doctor.py [--output FILE]"""

import argparse
import sys
from pathlib import Path

from distilcb.command_line import Parser, number
from distilcb.distributed import exit_code, on_main, stop
from distilcb.errors import ConfigError, MachineError, writing


def main(words: list[str]) -> None:
    parser = Parser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run_dir", type=Path, default="runs", help="where runs will be written (default: runs)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every figure there, as JSON")
    patience = number(0.01, 10_000, kind=float)
    parser.add_argument("--wait_minutes", type=patience, default=5, help="patience with a rank (default: 5)")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher appends it
    options = parser.parse_args(words)
    if options.output and not options.output.parent.is_dir():
        raise ConfigError(f"--output {options.output}: there is no folder {options.output.parent}. Make it first.")
    # torch and DeepSpeed take seconds to import; --help should not
    from distilcb.doctor.examination import examine

    report = examine(options.run_dir, wait_minutes=options.wait_minutes)

    def tell() -> None:
        print(report.as_text(), flush=True)
        if options.output:
            with writing(options.output, ConfigError, "Give an --output that can be written to."):
                options.output.write_text(report.as_json(), encoding="utf-8")

    on_main(tell)
    if report.findings:
        raise MachineError(report.verdict())
    stop()


if __name__ == "__main__":
    sys.exit(exit_code(main))
