"""Documents -> packed token blocks on disk.

Documents follow one another, a separator between two, and are cut into full blocks: <s> tokens </s>. Nothing is
padded (RoBERTa's FULL-SENTENCES), so attention needs no mask and every step has the same shape.

The corpus is cut into parts (parts.py), each part is packed for itself by some process of some rank (packing.py,
workers.py, crew.py), and rank zero puts the files together. Until then they lie in a folder beside the output, whose
name holds a hash of the content: the next start of the same goes on from the parts that are finished.
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from distilcb.data.blocks import TOKEN_COUNTS, Description, is_prepared, read_description
from distilcb.data.corpus import Damage, OpenDataset, Source, find_sources, kind_of, opened, read_documents
from distilcb.data.crew import Crew
from distilcb.data.data_report import DataReport, write_report
from distilcb.data.duplicates import HashMaker, duplicates_of, find_duplicates
from distilcb.data.packing import ON_FULL_DISK, PartFacts, PartMaker, PartReader, has_finished_parts, sum_of_arrays
from distilcb.data.parts import PART_BYTES, Part, Share, Stream, cut, share_out
from distilcb.data.progress import Progress
from distilcb.data.sentence_pieces import faster_encoder
from distilcb.data.tokenizer import TextTokenizer, Vocabulary
from distilcb.data.workers import Workers, parts_of_share
from distilcb.errors import ConfigError, DataError, writing

log = logging.getLogger(__name__)

# Files are hashed in stretches of this size, so that several threads and ranks share a big one.
_HASHED_BYTES = 64 << 20
# What is compared of a corpus before sentencepiece's library is relied on.
_SAMPLED_SOURCES = 64
_SAMPLED_DOCUMENTS = 20
_SAMPLED_CHARACTERS = 50_000
# Other nodes may see a file on a shared file system so much later.
_FILES_ARE_SEEN_WITHIN_SECONDS = 90.0


class PreparingTokenizer(Protocol):
    """What preparing needs of a tokenizer; a TextTokenizer is one."""

    folder: str

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, documents: list[str]) -> list[list[int]]: ...

    def pieces(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True)
class _How:
    """What `prepare` is asked for."""

    tokenizer: PreparingTokenizer
    seq_len: int
    text_field: str
    min_characters: int = 0
    skip_damaged: bool = False
    drop_duplicates: bool = False
    part_bytes: int = PART_BYTES
    processes: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        if self.seq_len < 8:
            raise ConfigError(f"seq_len={self.seq_len} tokens: a block needs 8 or more, separators included.")
        if self.min_characters < 0 or self.part_bytes < 1:
            raise ConfigError(
                f"min_characters={self.min_characters}, part_bytes={self.part_bytes}: needed 0 or more characters, and "
                "parts of a byte or more."
            )

    def described(self) -> dict[str, Any]:
        """The options that decide what the blocks hold; of the newer ones those that are not as they always were."""
        cut = {"part_bytes": self.part_bytes} if self.part_bytes != PART_BYTES else {}
        return {"text_field": self.text_field} | {k: v for each in self.cleaning for k, v in each.items()} | cut

    @property
    def cleaning(self) -> list[dict[str, Any]]:
        """What is asked for beyond what always was."""
        asked = {name: getattr(self, name) for name in ("min_characters", "skip_damaged", "drop_duplicates")}
        return [{name: value} for name, value in asked.items() if value]


@dataclass(frozen=True)
class _Plan:
    """What rank zero has found, for all ranks."""

    names: tuple[str, ...]
    sources: tuple[Path | OpenDataset, ...]
    units: tuple[Part | Stream, ...]

    @property
    def is_one_part(self) -> bool:
        return len(self.units) == 1 and isinstance(self.units[0], Part)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(unit.size for unit in self.units)


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
        skip_damaged: read on past compressed files that end in the middle, and records that are no JSON; counted.
        part_bytes: of text that is packed together; the tokens at its end that fill no block are lost.
        processes: on this rank.
        threads: of the tokenizer, in each process.
        crew: the ranks that call this together; each brings its processes.

    Raises:
        DataError: text that cannot be read or fills no block; an output that holds something else.
        ConfigError: blocks too short to mask a token of, or parts of no text.
    """
    how = _How(
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
    plan = crew.from_main("plan", lambda: _plan(names, how))
    content = _shared_content_key(plan, how, crew, show_progress=show_progress)
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
    how = _How(tokenizer, seq_len, text_field, processes=processes)
    plan = _plan(names, how)
    content = _shared_content_key(plan, how, Crew(), show_progress=show_progress)
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


def _plan(names: Sequence[str], how: _How) -> _Plan:
    sources = tuple(map(opened, find_sources(names)))
    return _Plan(tuple(names), sources, tuple(cut(sources, text_field=how.text_field, part_bytes=how.part_bytes)))


def _prepare_content(
    plan: _Plan, how: _How, content: str, *, output: Path, crew: Crew, show_progress: bool
) -> Description:
    started = time.monotonic()
    if there := crew.from_main("there", lambda: _made_before(output, content)):
        return there
    with _working_folder(output, content, crew) as folder:
        if there := crew.from_main("there by now", lambda: _made_before(output, content)):
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
            _Assembly(plan, how, content, folder, facts).finish(output, seconds=time.monotonic() - started)
        return crew.from_main("description", lambda: read_description(output))


def _shared_content_key(plan: _Plan, how: _How, crew: Crew, *, show_progress: bool) -> str:
    """A hash of all that decides what the blocks hold; the ranks share the reading.

    Raises:
        DataError: a file that cannot be read.
    """
    stretches = [(source, start) for source in plan.sources for start in _starts(source)]
    digests = []
    with (
        ThreadPoolExecutor(how.processes) as pool,
        Progress(crew, what="hashing", total_bytes=plan.size, shown=show_progress) as progress,
    ):
        for digest, size in pool.map(_digest, stretches[crew.rank :: crew.size]):
            crew.check()
            progress.add(size)
            digests.append(digest)
    by_rank = crew.gather("digests", digests)
    return crew.from_main("content", lambda: _content_key(plan, how, stretches, by_rank))


def _content_key(plan: _Plan, how: _How, stretches: Sequence[tuple[Source, int]], by_rank: list[list[bytes]]) -> str:
    kinds = [kind_of(source) for source in plan.sources]
    facts: list[Any] = [1, how.tokenizer.vocabulary.fingerprint, how.seq_len, how.text_field, kinds]
    facts += how.cleaning
    if not plan.is_one_part:
        facts.append({"part_bytes": how.part_bytes})
    key = hashlib.sha256(json.dumps(facts).encode())
    in_order = [by_rank[number % len(by_rank)][number // len(by_rank)] for number in range(len(stretches))]
    for _, own in itertools.groupby(zip(stretches, in_order, strict=True), key=lambda pair: pair[0][0]):
        digests = [digest for _, digest in own]
        key.update(digests[0] if len(digests) == 1 else hashlib.sha256(b"".join(digests)).digest())
    return key.hexdigest()


def _starts(source: Source) -> range:
    """Where the stretches of a source begin that are hashed for themselves."""
    if not isinstance(source, Path):
        return range(1)
    return range(0, max(1, source.stat().st_size), _HASHED_BYTES)


def _digest(stretch: tuple[Source, int]) -> tuple[bytes, int]:
    """What tells a stretch from another: a hash of its bytes, the fingerprint of a data set; and its size."""
    source, start = stretch
    if isinstance(source, OpenDataset):
        return f"{source} {source.rows._fingerprint}".encode(), 0
    digest, left = hashlib.sha256(), _HASHED_BYTES
    try:
        with Path(str(source)).open("rb") as stream:
            stream.seek(start)
            while left and (data := stream.read(min(left, 1 << 20))):
                digest.update(data)
                left -= len(data)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}.") from error
    return digest.digest(), _HASHED_BYTES - left


def _made_before(output: Path, content: str) -> Description | None:
    """The description of the output, where it is there already.

    Raises:
        DataError: it is there and is something else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if is_prepared(output) and (made := read_description(output)).content == content:
        folder, lock_file = _working_names(output, content)
        if folder.exists():  # of a start that was killed when it had named the output
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                lock_file.unlink()
        return made
    raise DataError(f"{output} is there and holds something else. Name another folder, or move it aside.")


@contextmanager
def _working_folder(output: Path, content: str, crew: Crew) -> Iterator[Path]:
    """The folder for the parts of this content, beside the output, for one start at a time.

    What is not finished when it is left is gone, and so is the folder where nothing is.
    """
    folder, lock_file = _working_names(output, content)
    if not crew.is_main:
        crew.from_main("folder", lambda: None)
        yield folder
        return
    with writing(output, DataError, "Name a folder that can be written to."):
        output.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(lock_file, crew)
    try:
        with writing(output, DataError, "Name a folder that can be written to."):
            folder.mkdir(exist_ok=True)  # not mkdtemp, whose folders are closed to other users
        if has_finished_parts(folder):
            log.info("%s holds finished parts of an earlier start: going on from there", folder)
        crew.from_main("folder", lambda: None)
        yield folder
    finally:
        if not has_finished_parts(folder):
            shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()


def _working_names(output: Path, content: str) -> tuple[Path, Path]:
    """Of the working folder and of its lock."""
    folder = output.parent / f".{output.name}.{content[:16]}.tmp"
    return folder, folder.with_suffix(".lock")


def _acquired(lock_file: Path, crew: Crew) -> FileLock:
    lock = FileLock(lock_file)
    told = False
    while True:
        try:
            lock.acquire(timeout=1)
            return lock
        except Timeout:
            crew.check()
            if not told:
                log.info("another process prepares the same text: waiting for it (%s)", lock_file)
            told = True


def _encoder(how: _How, plan: _Plan) -> Any:
    """What turns text into the tokenizer's ids the fastest."""
    if not isinstance(how.tokenizer, TextTokenizer):
        return how.tokenizer
    threads = how.threads * how.processes if plan.is_one_part else how.threads
    sample = _sample(plan.sources, how.text_field, skip_damaged=how.skip_damaged)
    return faster_encoder(how.tokenizer, sample, threads=threads) or how.tokenizer.encoder


def _sample(sources: Sequence[Source], text_field: str, *, skip_damaged: bool) -> Iterator[str]:
    """The first documents of each source, or of some where there are many."""
    for source in sources[:: -(-len(sources) // _SAMPLED_SOURCES)]:
        characters = 0
        for document in itertools.islice(
            read_documents(source, text_field=text_field, damage=Damage(skips=skip_damaged)), _SAMPLED_DOCUMENTS
        ):
            yield document[:_SAMPLED_CHARACTERS]
            characters += len(document)
            if characters > _SAMPLED_CHARACTERS:
                break


def _each_part(
    share: Share, maker: Callable[..., Any], plan: _Plan, how: _How, crew: Crew, progress: Progress
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


@dataclass(frozen=True)
class _Assembly:
    """All parts are made: one folder of them."""

    plan: _Plan
    how: _How
    content: str
    folder: Path
    facts: list[PartFacts]

    def finish(self, output: Path, *, seconds: float) -> None:
        """Give the blocks their names, description and report, and the folder its place."""
        facts, vocabulary = self.facts, self.how.tokenizer.vocabulary
        if not self._sum("blocks"):
            shutil.rmtree(self.folder, ignore_errors=True)
            raise DataError(
                f"{', '.join(self.plan.names)}: {self._sum('documents')} documents with {self._sum('tokens')} tokens "
                f"fill no block of {self.how.seq_len} tokens. Give more text, or a smaller seq_len."
            )
        assembled = self.folder / "assembled"
        shutil.rmtree(assembled, ignore_errors=True)  # of a start that was killed here
        with writing(output, DataError, ON_FULL_DISK):
            assembled.mkdir()
            files: list[str] = []
            for part in facts:
                if part.blocks:
                    files.append(f"blocks-{len(files):05d}.arrow")
                    _link(self.folder / f"{part.name}.arrow", assembled / files[-1])
            token_counts, lengths = sum_of_arrays(self.folder, [each.name for each in facts], vocabulary.size)
            np.save(assembled / TOKEN_COUNTS, token_counts)
            description = self._description(files)
            description.write(assembled)
            report = DataReport.of(description, facts, token_counts, lengths, self.how.tokenizer, seconds=seconds)
            write_report(report, assembled)
            self._warn_of_damage(description)
            if output.is_dir():
                output.rmdir()  # it was empty: rename needs the name free
            assembled.rename(output)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _description(self, files: list[str]) -> Description:
        blocks = self._sum("blocks")
        tokenizer, seq_len = self.how.tokenizer, self.how.seq_len
        left_out = {"short_documents": self._sum("short_documents")} if self.how.min_characters else {}
        if self.how.drop_duplicates:
            left_out["duplicate_documents"] = self._sum("duplicate_documents")
        return Description(
            blocks=blocks,
            seq_len=seq_len,
            vocab_size=tokenizer.vocabulary.size,
            tokenizer=str(tokenizer.folder),
            tokenizer_fingerprint=tokenizer.vocabulary.fingerprint,
            documents=self._sum("documents"),
            tokens=blocks * seq_len,
            dropped={
                "tokens_at_the_end": self._sum("pending"),
                "blocks_of_special_tokens": self._sum("dropped_blocks"),
            }
            | left_out,
            damage=self._damage(),
            sources=[self._source(number, source) for number, source in enumerate(self.plan.sources)],
            options=self.how.described(),
            files=files,
            content=self.content,
            versions=_versions(),
        )

    def _source(self, number: int, source: Source) -> dict[str, Any]:
        read = [each.read[number] for each in self.facts if number in each.read]
        size = source.stat().st_size if isinstance(source, Path) else None
        documents, characters = (sum(tally[which] for tally in read) for which in (0, 1))
        return {"path": str(source), "bytes": size, "documents": documents, "characters": characters}

    def _sum(self, name: str) -> int:
        return sum(getattr(each, name) for each in self.facts)

    def _damage(self) -> dict[str, int]:
        """What was survived; the newer counts where they are not zero."""
        counts = {each.name: sum(part.damage.get(each.name, 0) for part in self.facts) for each in fields(Damage)}
        return {name: count for name, count in counts.items() if count or not name.startswith("damaged_")}

    def _warn_of_damage(self, made: Description) -> None:
        names, damage = ", ".join(self.plan.names), made.damage
        if damage["undecodable_documents"]:
            log.warning(
                "%s: %d of %d documents are not UTF-8; what could not be read became U+FFFD. If the text is in another "
                "encoding convert it first, as with iconv -f latin1 -t utf-8",
                *(names, damage["undecodable_documents"], made.documents),
            )
        if damage.keys() & {"damaged_files", "damaged_records"}:
            log.warning(
                "%s: skipped what %d damaged file(s) held after the damage, and %d record(s) that are no JSON",
                *(names, damage.get("damaged_files", 0), damage.get("damaged_records", 0)),
            )
        if damage["control_characters"]:
            log.warning("%s: %d control characters became spaces", names, damage["control_characters"])


def _link(path: Path, target: Path) -> None:
    """The file under another name as well, or a copy of it; it may take a while to be seen from here."""
    deadline = time.monotonic() + _FILES_ARE_SEEN_WITHIN_SECONDS
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.5)
    try:
        os.link(path, target)
    except FileNotFoundError:
        raise
    except OSError:  # not every file system has links
        shutil.copyfile(path, target)


def _versions() -> dict[str, str]:
    import datasets
    import transformers

    import distilcb

    return {
        "distilcb": distilcb.__version__,
        "datasets": datasets.__version__,
        "transformers": transformers.__version__,
    }
