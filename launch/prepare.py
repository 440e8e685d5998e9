"""Turn text into packed token blocks: python launch/prepare.py --input FILES... --tokenizer DIR --output DIR"""

import argparse
import sys
from pathlib import Path

from distilcb.distributed import exit_code


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="NAME", help="files, folders, globs, hub:NAME:CONFIG:SPLIT"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="tokenizer or model folder, or hub name")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder of blocks to write")
    parser.add_argument("--seq_len", type=int, default=512, help="tokens in a block (default: 512)")
    parser.add_argument("--text_field", default="text", help="the text's name in .jsonl and .parquet (default: text)")
    options = parser.parse_args(words)
    from distilcb.data.prepare import prepare
    from distilcb.data.tokenizer import TextTokenizer

    description = prepare(
        options.input,
        tokenizer=TextTokenizer(options.tokenizer),
        output=options.output,
        seq_len=options.seq_len,
        text_field=options.text_field,
        show_progress=True,
    )
    print(f"{description.documents:,} documents, {description.blocks:,} blocks, {description.tokens:,} tokens")
    print(f"blocks: {options.output}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
