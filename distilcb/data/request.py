"""What a preparation is asked for, what rank zero has found of it, and the hash of all that decides its blocks."""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from distilcb.data.corpus import find_sources, kind_of
from distilcb.data.crew import Crew
from distilcb.data.parts import PART_BYTES, Part, Stream, cut
from distilcb.data.progress import Progress
from distilcb.data.tables import OpenDataset, Source, opened
from distilcb.data.tokenizer import Vocabulary
from distilcb.errors import ConfigError, DataError

log = logging.getLogger(__name__)

# Files are hashed in stretches of this size, so that several threads and ranks share a big one.
_HASHED_BYTES = 64 << 20


class PreparingTokenizer(Protocol):
    """What preparing needs of a tokenizer; a TextTokenizer is one."""

    folder: str

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode(self, documents: list[str]) -> list[list[int]]: ...

    def pieces(self, ids: list[int]) -> list[str]: ...


@dataclass(frozen=True)
class How:
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


class ChangedError(DataError):
    """Text is not what it was when its preparation began."""


@dataclass(frozen=True)
class Plan:
    """What rank zero has found, for all ranks.

    Attributes:
        states: of each source that is a file its bytes and its time in nanoseconds, before anything of it was read.
    """

    names: tuple[str, ...]
    sources: tuple[Path | OpenDataset, ...]
    states: tuple[tuple[int, int] | None, ...]
    units: tuple[Part | Stream, ...]

    @property
    def is_one_part(self) -> bool:
        return len(self.units) == 1 and isinstance(self.units[0], Part)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(unit.size for unit in self.units)

    def check_unchanged(self, content: str, how: How) -> None:
        """Look whether every file is what it was before anything of it was read.

        content: what `shared_content_key` gave. What was but touched is read once more, and then is the same.

        Raises:
            ChangedError: it is not.
            DataError: that cannot be told, as a file cannot be read.
        """
        pairs = zip(self.sources, self.states, strict=True)
        changed = next((source for source, before in pairs if _state_of(source) != before), None)
        if changed is None:
            return
        log.info("%s was touched or written to meanwhile: hashing the text once more", changed)
        is_there = all(source.exists() for source in self.sources if isinstance(source, Path))
        if not is_there or shared_content_key(self, how, Crew(), show_progress=False) != content:
            raise ChangedError(
                f"{changed} was written to or moved while it was read: its blocks would be of neither text, and none "
                "are kept. Start again when nothing changes it."
            )


def plan_of(names: Sequence[str], how: How) -> Plan:
    """The sources that the names stand for, cut into parts and streams; DataError where a name stands for nothing."""
    sources = tuple(map(opened, find_sources(names)))
    states = tuple(map(_state_of, sources))
    units = cut(sources, text_field=how.text_field, part_bytes=how.part_bytes, skip_damaged=how.skip_damaged)
    return Plan(tuple(names), sources, states, tuple(units))


def _state_of(source: Source) -> tuple[int, int] | None:
    """None of a data set, and of a file that is gone."""
    if not isinstance(source, Path):
        return None
    try:
        found = source.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns


def shared_content_key(plan: Plan, how: How, crew: Crew, *, show_progress: bool) -> str:
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


def _content_key(plan: Plan, how: How, stretches: Sequence[tuple[Source, int]], by_rank: list[list[bytes]]) -> str:
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
