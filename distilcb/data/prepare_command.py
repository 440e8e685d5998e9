"""The command that prepares text: its options, the ranks and processes that take part, and what it prints."""

import argparse
import logging
import os
from collections.abc import Mapping

from distilcb.command_line import Parser, number, some_name, some_path
from distilcb.data.corpus import find_sources
from distilcb.data.parts import PART_BYTES
from distilcb.hub import model_folder
from distilcb.launcher import World

log = logging.getLogger(__name__)

_DEFAULT_MEGABYTES = PART_BYTES / (1 << 20)


def prepare_from(words: list[str], *, description: str | None) -> None:
    """Prepare what the words of the command line ask for, with all ranks; rank zero prints what was made.

    Raises:
        UserError: on rank zero; the other ranks end with exit code 2.
    """
    options = _parser(description).parse_args(words)
    if options.check:
        find_sources(options.input)
        model_folder(options.tokenizer, what="tokenizer", weights=False)
        return
    from distilcb.data.crew import find_world, join_crew
    from distilcb.data.prepare import prepare
    from distilcb.data.tokenizer import TextTokenizer
    from distilcb.distributed import configure_logging

    world = find_world()
    configure_logging(world)
    cores = cores_of_rank(world, os.environ)
    processes = options.processes or cores
    with join_crew(world) as crew:
        tokenizer = TextTokenizer(options.tokenizer)
        if tokenizer.vocabulary.is_causal:
            log.info("tokenizer %s has no mask token: blocks for causal models such as GPT-2", options.tokenizer)
        made = prepare(
            options.input,
            tokenizer=tokenizer,
            output=options.output,
            seq_len=options.seq_len,
            text_field=options.text_field,
            min_characters=options.min_characters,
            skip_damaged=options.skip_damaged,
            drop_duplicates=options.drop_duplicates,
            part_bytes=round(options.part_megabytes * (1 << 20)),
            processes=processes,
            threads=max(1, cores // processes),
            crew=crew,
            show_progress=True,
        )
    if world.is_main:
        print(f"{made.documents:,} documents, {made.blocks:,} blocks, {made.tokens:,} tokens")
        print(f"blocks: {options.output}")


def cores_of_rank(world: World, environ: Mapping[str, str]) -> int:
    """The cores that this rank may use: its own, where the launcher says so, or an even share of the machine's."""
    mine = len(os.sched_getaffinity(0))
    if by_slurm := environ.get("SLURM_CPUS_PER_TASK", ""):
        return min(mine, int(by_slurm)) if by_slurm.isdecimal() and int(by_slurm) else mine
    bound = mine < (os.cpu_count() or mine)
    return mine if bound else max(1, mine // (world.local_size or world.size))


def _parser(description: str | None) -> Parser:
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="NAME",
        type=some_name,
        help="files, folders, globs, hub:NAME:CONFIG:SPLIT",
    )
    parser.add_argument(
        "--tokenizer", required=True, type=some_name, metavar="DIR", help="tokenizer or model folder, or hub name"
    )
    parser.add_argument("--output", required=True, type=some_path, metavar="DIR", help="folder of blocks to write")
    parser.add_argument("--seq_len", type=number(8, 65_536), default=512, help="tokens in a block (default: 512)")
    parser.add_argument("--text_field", default="text", help="the text's name in .jsonl and .parquet (default: text)")
    parser.add_argument("--processes", type=number(1), help="on each rank (default: one a core that the rank may use)")
    parser.add_argument(
        "--min_characters", type=number(0), default=0, metavar="N", help="leave out shorter documents (default: 0)"
    )
    parser.add_argument(
        "--drop_duplicates",
        action="store_true",
        help="of documents (lines of .txt) that are the same word for word the first one stays; the text is read twice",
    )
    parser.add_argument(
        "--skip_damaged",
        action="store_true",
        help="read on past compressed files and tables that are damaged and records that are no JSON; they are counted",
    )
    parser.add_argument(
        "--part_megabytes",
        type=number(0.001, kind=float),
        default=_DEFAULT_MEGABYTES,
        metavar="MB",
        help=f"text that one process packs at a time; decides where blocks begin (default: {_DEFAULT_MEGABYTES:.0f})",
    )
    parser.add_argument("--check", action="store_true", help="look at the options and at what they name, and end")
    # The deepspeed launcher adds it to every command.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser
