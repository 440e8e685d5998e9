"""What a run will need and cost: python launch/plan.py --recipe FILE --gpus 32 --gpu h200 [--section.name VALUE ...]"""

import sys

from distilcb.distributed import exit_code


def main(words: list[str]) -> None:
    from distilcb.plan.command import plan_from

    plan_from(words, description=__doc__)


if __name__ == "__main__":
    sys.exit(exit_code(main))
