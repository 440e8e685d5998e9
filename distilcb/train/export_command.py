"""launch/export.py: its options, and what they ask for. Imports no torch, so `--help` answers at once."""

import argparse
import logging
from pathlib import Path
from typing import Any

from distilcb.command_line import Parser, parse_command_line, some_path
from distilcb.errors import ConfigError
from distilcb.launcher import discover
from distilcb.machine import size_cpu_threads

log = logging.getLogger(__name__)

_TIMED_LENGTHS, _TIMED_BATCHES = (16, 128), {1: 9}


def parser_of(description: str | None, *, untrained: bool = False) -> Parser:
    """The options of launch/export.py; with --untrained those beside a recipe's settings."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--untrained", action="store_true", help="the student of a recipe, with its first weights")
    if untrained:  # a setting's value must not be taken for the run
        parser.set_defaults(run=None, step=None, model=None)
    else:
        parser.add_argument("run", type=some_path, nargs="?", help="run folder, such as runs/mini")
        parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest good one)")
        parser.add_argument("--model", type=some_path, metavar="DIR", help="a model's folder that is there, for --onnx")
    parser.add_argument("--output", type=some_path, metavar="DIR", help="folder to write")
    parser.add_argument("--onnx", action="store_true", help="write onnx/model.onnx too, checked against PyTorch")
    parser.add_argument("--int8", action="store_true", help="and onnx/model_int8.onnx, dynamically quantised")
    return parser


def run(words: list[str], description: str | None) -> None:
    """Export, and say what was made.

    Raises:
        UserError: what cannot be exported.
    """
    untrained = "--untrained" in words
    parser = parser_of(description, untrained=untrained)
    options, settings = parser.parse_known_args(words) if untrained else (parser.parse_args(words), [])
    check_options(options)
    folder = options.model or _write_folder(options, settings)
    if options.model is None:
        print(f"student: {folder}")
    if options.onnx:
        size_cpu_threads(discover())
        print(_write_onnx(folder, int8=options.int8))


def check_options(options: argparse.Namespace) -> None:
    """Raise ConfigError with every fault of the options in one message."""
    faults = []
    sources = [name for name in ("run", "untrained", "model") if getattr(options, name)]
    if not sources:
        faults.append("needed a run folder, such as runs/mini; or --untrained and a --recipe; or --model and --onnx")
    if len(sources) > 1:
        faults.append(f"{' and '.join(sources)}: give one of a run folder, --untrained and --model")
    if options.model and (options.output or options.step is not None):
        faults.append("--model stays where it is: leave --output and --step out")
    if options.model and not options.onnx:
        faults.append("--model needs --onnx, which is written into its folder")
    if options.model and not (options.model / "config.json").is_file():
        faults.append(
            f"--model {options.model}: no config.json there. Needed: a model's folder, such as runs/mini/student"
        )
    if sources and not options.model and not options.output:
        faults.append("needed --output, the folder to write")
    if options.int8 and not options.onnx:
        faults.append("--int8 is made of ONNX: add --onnx")
    if faults:
        raise ConfigError("; ".join(faults) + ".")


def _write_folder(options: argparse.Namespace, settings: list[str]) -> Path:
    from distilcb.train.export import export_run, export_untrained

    if options.untrained:
        config = parse_command_line([*settings, "--dry_run"]).config  # which needs no text
        return export_untrained(config, options.output)
    return export_run(options.run, step=options.step, output=options.output)


def _write_onnx(folder: Path, *, int8: bool) -> str:
    """Write it; how large, how fast and how near to PyTorch it is."""
    from distilcb.eval.report import as_console
    from distilcb.eval.speed import sizes, speed_rows, speeds
    from distilcb.export.onnx import export_onnx

    found = export_onnx(folder, int8=int8)
    name = folder.name
    seconds = speeds({name: str(folder)}, lengths=_TIMED_LENGTHS, batches=_TIMED_BATCHES)
    rows = speed_rows({name: sizes(str(folder))}, seconds, beside=name)
    return "\n\n".join([as_console(rows), *(_told(kind, facts) for kind, facts in found.items())])


def _told(kind: str, facts: dict[str, Any]) -> str:
    chosen = f"; {facts['agreement']:.1%} of first choices are the same" if "agreement" in facts else ""
    return (
        f"{kind}: of random tokens, logits differ from PyTorch's by at most {facts['error']:.2g} of their standard "
        f"deviation{chosen}"
    )
