"""Turn text into packed token blocks: python launch/prepare.py --input FILES... --tokenizer DIR --output DIR

On all cores of this machine. Under srun, mpirun or torchrun the ranks share the work. The blocks are the same either
way, and the same line again goes on where it was stopped.
"""

import sys

from distilcb.distributed import exit_code


def main(words: list[str]) -> None:
    from distilcb.data.prepare_command import prepare_from

    prepare_from(words, description=__doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
