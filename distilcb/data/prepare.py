"""Documents -> packed token blocks on disk.

Documents follow one another, a separator between two, and are cut into full blocks: <s> tokens </s>. Nothing is
padded (RoBERTa's FULL-SENTENCES), so attention needs no mask and every step has the same shape.

The corpus is cut into parts (parts.py), each part is packed for itself by some process of some rank (packing.py,
workers.py, crew.py), and rank zero puts the files together (assembly.py). Until then they lie in a folder beside the
output (working_folder.py), whose name holds a hash of the content (request.py): the next start of the same goes on from
the parts that are finished.
"""

import bisect
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from distilcb.data.assembly import Assembly
from distilcb.data.blocks import Blocks, Description, is_prepared, read_description
from distilcb.data.corpus import is_compressed, is_table, read_documents
from distilcb.data.crew import Crew
from distilcb.data.damage import Damage
from distilcb.data.duplicates import HashMaker, duplicates_of, find_duplicates
from distilcb.data.packing import PartMaker, PartReader
from distilcb.data.parts import PART_BYTES, Part, Share, share_out
from distilcb.data.progress import Progress
from distilcb.data.request import How, Plan, PreparingTokenizer, plan_of, shared_content_key
from distilcb.data.sentence_pieces import faster_encoder
from distilcb.data.tables import Source, starts_of_groups
from distilcb.data.tokenizer import TextTokenizer
from distilcb.data.workers import Workers, parts_of_share
from distilcb.data.working_folder import made_before, working_folder
from distilcb.errors import DataError, writing

# What is compared of a corpus before sentencepiece's library is relied on.
_SAMPLED_SOURCES = 64
_SAMPLED_PLACES = 32
_SAMPLED_DOCUMENTS = 20
_SAMPLED_CHARACTERS = 50_000


def prepare(
    names: Sequence[str],
    *,
    tokenizer: PreparingTokenizer,
    output: Path,
    seq_len: int,
    text_field: str = "text",
    min_characters: int = 0,
    skip_damaged: bool = False,
    drop_duplicates: bool = False,
    part_bytes: int = PART_BYTES,
    processes: int = 1,
    threads: int = 1,
    crew: Crew | None = None,
    show_progress: bool = False,
) -> Description:
    """Write the blocks of the named text to `output`, whole or not at all; the same whoever takes part.

    A folder that already holds the blocks of the same content is left as it is. Stopped, and started again with the
    same content, it goes on from the parts that are finished.

    Args:
        text_field: the text's name in .jsonl and .parquet.
        min_characters: documents with fewer are left out.
        drop_duplicates: of documents that are the same word for word the first one stays.
        skip_damaged: read on past compressed files and tables that are damaged, and records that are no JSON; counted.
        part_bytes: of text that is packed together; the tokens at its end that fill no block are lost.
        processes: on this rank.
        threads: of the tokenizer, in each process.
        crew: the ranks that call this together; each brings its processes.

    Raises:
        DataError: text that cannot be read or fills no block; an output that holds something else.
        ConfigError: blocks too short to mask a token of, or parts of no text.
    """
    how = How(
        tokenizer,
        seq_len,
        text_field,
        min_characters=min_characters,
        skip_damaged=skip_damaged,
        drop_duplicates=drop_duplicates,
        part_bytes=part_bytes,
        processes=processes,
        threads=threads,
    )
    crew = crew or Crew()
    plan = crew.from_main("plan", lambda: plan_of(names, how))
    crew.from_main("whole", lambda: _refuse_broken(output))
    content = shared_content_key(plan, how, crew, show_progress=show_progress)
    return _prepare_content(plan, how, content, output=output, crew=crew, show_progress=show_progress)


def prepare_cached(
    names: Sequence[str],
    *,
    tokenizer: PreparingTokenizer,
    cache: Path,
    seq_len: int,
    text_field: str,
    processes: int = 1,
    show_progress: bool = False,
) -> Path:
    """The folder of blocks for `names`: themselves if they are one prepared folder, else prepared once and cached.

    The cache goes by content: the bytes of the text, the tokenizer and the options. Every rank may call it; a file
    lock lets one work while the others wait, on one node or on a shared file system.
    """
    if prepared := prepared_folder(names):
        return prepared
    how = How(tokenizer, seq_len, text_field, processes=processes)
    plan = plan_of(names, how)
    content = shared_content_key(plan, how, Crew(), show_progress=show_progress)
    output = cache / "blocks" / content[:32]
    with writing(output.parent, DataError, "Give a --data.cache that can be written to."):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{output}.lock").acquire()
    with lock:
        _prepare_content(plan, how, content, output=output, crew=Crew(), show_progress=show_progress)
    return output


def prepared_folder(names: Sequence[str]) -> Path | None:
    """The folder of blocks that `names` stand for, where they are one."""
    if len(names) != 1:
        return None
    try:
        path = Path(names[0]).expanduser()
        return path if is_prepared(path) else None
    except (OSError, RuntimeError):  # find_sources says what is wrong with it
        return None


def _refuse_broken(output: Path) -> None:
    """Raise DataError where blocks are there that cannot be opened: nothing that they can be made of is deleted yet."""
    if is_prepared(output):
        Blocks(output)


def _prepare_content(
    plan: Plan, how: How, content: str, *, output: Path, crew: Crew, show_progress: bool
) -> Description:
    started = time.monotonic()
    # A link stays: what it points to is made.
    if crew.from_main("is_link", output.is_symlink):
        output = crew.from_main("output", lambda: Path(os.path.realpath(output)))
    if there := crew.from_main("there", lambda: made_before(output, content)):
        return there
    with working_folder(output, content, crew) as folder:
        if there := crew.from_main("there by now", lambda: made_before(output, content)):
            return there
        encoder = crew.from_main("encoder", lambda: _encoder(how, plan))
        reader = PartReader(plan.sources, how.text_field, how.min_characters, how.skip_damaged)
        share = share_out(plan.units, ranks=crew.size)[crew.rank]
        twins = None
        if how.drop_duplicates:
            with Progress(crew, what="looking for duplicates", total_bytes=plan.size, shown=show_progress) as progress:
                hashed = list(_each_part(share, HashMaker(reader, folder), plan, how, crew, progress))
                names = sorted(itertools.chain(*crew.gather("hashed", hashed)))
            crew.from_main("duplicates", lambda: find_duplicates(folder, names, tick=crew.check))
            twins = partial(duplicates_of, folder)
        maker = PartMaker(reader, encoder, how.tokenizer.vocabulary, how.seq_len, folder, twins)
        with Progress(crew, what="preparing", total_bytes=plan.size, shown=show_progress) as progress:
            own = list(_each_part(share, maker, plan, how, crew, progress))
            facts = sorted(itertools.chain(*crew.gather("facts", own)), key=lambda each: each.name)
        if crew.is_main:
            Assembly(plan, how, content, folder, facts).finish(output, seconds=time.monotonic() - started)
        return crew.from_main("description", lambda: read_description(output))


def _encoder(how: How, plan: Plan) -> Any:
    """What turns text into the tokenizer's ids the fastest."""
    if not isinstance(how.tokenizer, TextTokenizer):
        return how.tokenizer
    threads = how.threads * how.processes if plan.is_one_part else how.threads
    sample = dict.fromkeys(_sample(plan, how.text_field, skip_damaged=how.skip_damaged))
    return faster_encoder(how.tokenizer, sample, threads=threads) or how.tokenizer.encoder


def _sample(plan: Plan, text_field: str, *, skip_damaged: bool) -> Iterator[str]:
    """A few documents of each of some places; where these are close together some come twice."""
    for source, start, end in _sampled_places(plan):
        characters = 0
        damage = Damage(skips=skip_damaged, tells=False)  # whoever packs it does
        read = read_documents(source, text_field=text_field, damage=damage, start=start, end=end)
        for document in itertools.islice(read, _SAMPLED_DOCUMENTS):
            yield document[:_SAMPLED_CHARACTERS]
            characters += len(document)
            if characters > _SAMPLED_CHARACTERS:
                break


def _sampled_places(plan: Plan) -> Iterator[tuple[Source, int, int | None]]:
    """Stretches of sources that begin where each does, of many some, and all over what can be entered in the middle."""
    groups: dict[Source, list[int]] = {}
    for source in plan.sources[:: -(-len(plan.sources) // _SAMPLED_SOURCES)]:
        yield source, 0, None
    spans = [span for unit in plan.units if isinstance(unit, Part) for span in unit.spans]
    ends = list(itertools.accumulate(span.text_bytes for span in spans))
    total = ends[-1] if ends else 0
    for number in range(_SAMPLED_PLACES if total else 0):
        place = total * number // _SAMPLED_PLACES
        which = bisect.bisect_right(ends, place)
        span = spans[which]
        source, start = plan.sources[span.source], span.start
        if isinstance(source, Path):
            if is_compressed(source):
                continue
            if is_table(source):
                starts = groups[source] = groups.get(source) or starts_of_groups(source)
                start = starts[bisect.bisect_right(starts, start) - 1]
            else:
                start += place - (ends[which] - span.text_bytes)
        yield source, start, span.end


def _each_part(
    share: Share, maker: Callable[..., Any], plan: Plan, how: How, crew: Crew, progress: Progress
) -> Iterator[Any]:
    """What `maker` gives for each part of the share."""
    processes = 1 if share.is_one_part else how.processes
    parts = parts_of_share(
        share, plan.sources, part_bytes=how.part_bytes, processes=processes, skip_damaged=how.skip_damaged
    )
    for size, made in _made(parts, maker, processes, how.threads, crew.check):
        progress.add(size)
        yield made


def _made(
    parts: Iterator[Part | None], maker: Callable[..., Any], processes: int, threads: int, tick: Callable[[], None]
) -> Iterator[tuple[int, Any]]:
    """(bytes of the sources, what was made) of each part, here or by other processes."""
    if processes == 1:
        for part in parts:
            if part is None:
                tick()
            else:
                yield part.size, maker(part, tick)
        return
    with Workers(maker, processes, threads=threads) as workers:
        for part, facts in workers.results(parts, tick):
            yield part.size, facts
