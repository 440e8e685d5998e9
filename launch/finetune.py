"""Fine-tune a student on a task or on text, with a teacher's soft targets and without them, seed by seed.

python launch/finetune.py --task piaf_qa --data FOLDER --student MODEL --teacher_base MODEL --output DIR
"""

import sys

from distilcb import distributed


def main(words: list[str]) -> None:
    from distilcb.finetune.command import comparison_of, parser_of

    options = parser_of(__doc__).parse_args(words)
    distributed.configure_logging(distributed.discover())
    comparison = comparison_of(options)
    found = comparison.run(options.output)
    from distilcb.finetune.report import as_table

    print(f"{as_table(found['summary'], comparison.subject.columns, console=True)}\n\nresults: {options.output}")


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
