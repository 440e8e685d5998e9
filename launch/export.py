"""Write a student as a Hugging Face folder: a run's checkpoint, or a recipe's student before its first step.

python launch/export.py RUN [--step N] --output DIR [--onnx [--int8]]
python launch/export.py --untrained [--recipe FILE] [--section.name VALUE ...] --output DIR
python launch/export.py --model DIR --onnx [--int8]
"""

import sys

from distilcb.distributed import exit_code
from distilcb.train.export_command import run


def main(words: list[str]) -> None:
    run(words, __doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
