"""Documents that were there before, word for word: of each the first stays, in the order in which the corpus is read.

Every part's documents are hashed by whoever would pack it, sorted, and kept beside the parts:

    <folder>/<part>.hashes   (documents,) uint64, sorted
    <folder>/<part>.places   (documents + 1,) uint32, where each of them stands in the part; last, how many there are

Rank zero then takes one range of hashes after another from all parts, so that memory stays bounded whatever the corpus,
and writes a bit a document:

    <folder>/duplicates.bits    a part begins at a whole byte
    <folder>/duplicates.index   JSON: by part the byte where it begins and its number of documents

Hashes have 64 bits: among a billion different documents one is taken for another's twin with a probability of 3 %.
"""

import itertools
import json
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from distilcb.data.damage import Damage
from distilcb.data.packing import ON_FULL_DISK, PartFacts, PartReader
from distilcb.data.parts import Part
from distilcb.data.working_folder import wait_until_seen
from distilcb.durability import write_durably
from distilcb.errors import DataError, writing

_BITS, _INDEX = "duplicates.bits", "duplicates.index"
# Hashes that are compared at a time, about: 24 bytes each.
_COMPARED_AT_ONCE = 1 << 24
_IS_SHORT = "does not hold all that was written: is it one file system on all nodes? Start the same command again."


@dataclass(frozen=True)
class HashMaker:
    """Hashes the documents of a part; it pickles, for processes that do several."""

    reader: PartReader
    folder: Path

    def __call__(self, part: Part, tick: Callable[[], None] = lambda: None) -> str:
        """The part's name, once its hashes are in the folder.

        Raises:
            DataError: text that cannot be read, or files that cannot be written.
        """
        if _HashedPart.find(self.folder, part.name) is None:
            self._make(part, tick)
        return part.name

    def _make(self, part: Part, tick: Callable[[], None]) -> None:
        found = []
        for number, document in enumerate(
            self.reader.read(part, Damage(skips=self.reader.skip_damaged), PartFacts(""))
        ):
            found.append(xxhash.xxh3_64_intdigest(document.encode()))
            if number % 4096 == 0:
                tick()
        hashes = np.array(found, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        with writing(self.folder, DataError, ON_FULL_DISK):
            for path, array in (
                (_hashes(self.folder, part.name), hashes[order]),
                (_places(self.folder, part.name), np.append(order, np.uint32(order.size))),
            ):
                # Not tofile, which does not say when the disk is full.
                write_durably(path, array.tobytes(), unwritten=path.with_name(f"{path.name}.{uuid.uuid4().hex}"))


def find_duplicates(folder: Path, names: Sequence[str], *, tick: Callable[[], None] = lambda: None) -> int:
    """Write which documents of these parts, in their order, were there before; returns how many.

    Raises:
        DataError: files of other nodes that are not seen, or a full disk.
    """
    parts = [_HashedPart.seen(folder, name) for name in names]
    starts = np.cumsum([0, *(-(-part.documents // 8) for part in parts)])
    bits = np.zeros(int(starts[-1]), dtype=np.uint8)
    total = sum(part.documents for part in parts)
    ranges = max(1, -(-total // _COMPARED_AT_ONCE))
    borders = [(number << 64) // ranges for number in range(ranges + 1)]
    dropped = 0
    for first, last in itertools.pairwise(borders):
        tick()
        dropped += _mark(parts, starts, bits, first, last)
    index = {part.name: [int(start), part.documents] for part, start in zip(parts, starts, strict=False)}
    with writing(folder, DataError, ON_FULL_DISK):
        write_durably(folder / _BITS, bits.tobytes())
        write_durably(folder / _INDEX, json.dumps(index))
    return dropped


def _mark(parts: "list[_HashedPart]", starts: NDArray[np.int64], bits: NDArray[np.uint8], first: int, last: int) -> int:
    """Set the bits of later twins among the hashes from `first` up to `last`; returns how many."""
    hashes, numbers = [], []
    for part, start in zip(parts, starts, strict=False):
        some, places = part.between(first, last)
        hashes.append(some)
        numbers.append(places.astype(np.int64) + 8 * int(start))
    together, where = np.concatenate(hashes), np.concatenate(numbers)
    # Twins of one part stand in its order already, and parts in theirs, so a stable sort keeps the first one first.
    order = np.argsort(together, kind="stable")
    together, where = together[order], where[order]
    later = where[1:][together[1:] == together[:-1]]
    np.bitwise_or.at(bits, later >> 3, (128 >> (later & 7)).astype(np.uint8))
    return int(later.size)


def duplicates_of(folder: Path, name: str) -> NDArray[np.bool_]:
    """(documents,) of a part: whether each was there before.

    Raises:
        DataError: files of rank zero's that are not seen, or not whole.
    """
    wait_until_seen(folder / _INDEX)
    start, documents = json.loads((folder / _INDEX).read_text(encoding="utf-8"))[name]
    size = -(-documents // 8)
    bits = np.fromfile(folder / _BITS, dtype=np.uint8, offset=start, count=size)
    if bits.size < size:
        raise DataError(f"{folder / _BITS} {_IS_SHORT}")
    return np.unpackbits(bits, count=documents).astype(bool)


@dataclass(frozen=True)
class _HashedPart:
    """The files of a part; opened for each look, as there may be more parts than a process may have files open."""

    folder: Path
    name: str
    documents: int

    @classmethod
    def find(cls, folder: Path, name: str) -> "_HashedPart | None":
        """None where the files are not there, or not whole."""
        hashes, places = _hashes(folder, name), _places(folder, name)
        try:
            with places.open("rb") as stream:
                stream.seek(-4, os.SEEK_END)
                documents = int(np.fromfile(stream, dtype=np.uint32)[0])
            sizes = hashes.stat().st_size, places.stat().st_size
        except OSError:
            return None
        return cls(folder, name, documents) if sizes == (8 * documents, 4 * (documents + 1)) else None

    @classmethod
    def seen(cls, folder: Path, name: str) -> "_HashedPart":
        """As `find`, of what another node may have written; DataError where it does not come."""
        for path in (_hashes(folder, name), _places(folder, name)):
            wait_until_seen(path)
        if found := cls.find(folder, name):
            return found
        raise DataError(f"{_places(folder, name)} {_IS_SHORT}")

    def between(self, first: int, last: int) -> tuple[NDArray[np.uint64], NDArray[np.uint32]]:
        """Hashes from `first` up to `last`, and their places."""
        if not self.documents:
            return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint32)
        hashes = np.memmap(_hashes(self.folder, self.name), dtype=np.uint64, mode="r")
        places = np.memmap(_places(self.folder, self.name), dtype=np.uint32, mode="r")
        start = int(np.searchsorted(hashes, np.uint64(first)))
        stop = self.documents if last >= 1 << 64 else int(np.searchsorted(hashes, np.uint64(last)))
        return np.array(hashes[start:stop]), np.array(places[start:stop])


def _hashes(folder: Path, name: str) -> Path:
    return folder / f"{name}.hashes"


def _places(folder: Path, name: str) -> Path:
    return folder / f"{name}.places"
