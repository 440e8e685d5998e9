"""The folder beside the output in which parts lie until all are there; one start at a time works in it."""

import errno
import glob
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from distilcb.data.blocks import Blocks, Description, is_prepared, read_description
from distilcb.data.crew import Crew
from distilcb.data.packing import has_finished_parts
from distilcb.errors import DataError, writing

log = logging.getLogger(__name__)

# Other nodes may see a file on a shared file system so much later.
_FILES_ARE_SEEN_WITHIN_SECONDS = 90.0
# Of parts (packing.py) and of their hashes (duplicates.py); all else is of one start.
_LASTING = (".arrow", ".npz", ".json", ".hashes", ".places")


def made_before(output: Path, content: str) -> Description | None:
    """The description of the output, where it is there already.

    Raises:
        DataError: it is there and is something else, or cannot be replaced when all is done.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        if output.is_symlink():
            raise DataError(f"{output} is a link that leads to itself: name another folder.")
        if os.path.ismount(output):
            raise DataError(f"{output} is a mount point and cannot be replaced: name a folder in it, {output}/blocks.")
        return None
    if is_prepared(output) and (made := read_description(output)).content == content:
        folder, lock_file = _working_names(output, content)
        if folder.exists():  # of a start that was killed when it had named the output
            Blocks(output)  # if it is damaged, DataError: its parts stay
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                lock_file.unlink()
        return made
    raise DataError(f"{output} is there and holds something else{_held_by(output)}. Name another, or move it aside.")


def _held_by(output: Path) -> str:
    """What a folder of other blocks was made of and with, for messages."""
    if not is_prepared(output):
        return ""
    made = read_description(output)
    blocks = f"{made.blocks:,} blocks of {made.seq_len} tokens of {made.documents:,} documents, by {made.tokenizer}"
    return f": {blocks}, of other text or with other options"


@contextmanager
def working_folder(output: Path, content: str, crew: Crew) -> Iterator[Path]:
    """The folder for the parts of this content, beside the output, for one start at a time.

    What killed starts have not finished is gone when it is entered, and the folder when it is left with nothing
    finished.
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
        _remove_leftovers(folder)
        _tell_of_others(output, folder)
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


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed starts have left half written."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.suffix not in _LASTING:
            with suppress(OSError):
                path.unlink()


def _tell_of_others(output: Path, folder: Path) -> None:
    """Log which folders starts with other text or options have left for the same output: nobody else deletes them."""
    for other in output.parent.glob(f".{glob.escape(output.name)}.{'[0-9a-f]' * 16}.tmp"):
        with suppress(OSError):  # the start that it is of ends just now
            if other != folder:
                size = sum(path.stat().st_size for path in other.iterdir())
                log.info(
                    "%s holds %.1f MB of a start with other text or options: delete it if none is to go on from it",
                    *(other, size / 1e6),
                )


def _acquired(lock_file: Path, crew: Crew) -> FileLock:
    lock = FileLock(lock_file)
    told = False
    while True:
        try:
            lock.acquire(timeout=1)
            return lock
        except Timeout:
            crew.check()
            if told:
                continue
            # FileLock takes a folder that is closed for one that is locked. The lock's own name is left alone: where
            # the file system has no locks, that the file is there is the lock.
            with writing(lock_file, DataError, "Name a folder in which files can be made."):
                _try_to_make_a_file(lock_file.parent)
            told = True
            log.info("another process prepares the same text: waiting for it (%s)", lock_file)


def _try_to_make_a_file(folder: Path) -> None:
    """OSError where none can be made; whether a disk is full is for the process that writes there to find out."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def wait_until_seen(path: Path) -> None:
    """Until a file that another node may have written is seen here; DataError where it is not."""
    deadline = time.monotonic() + _FILES_ARE_SEEN_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise DataError(f"{path} is not seen here: is it one file system on all nodes?")
        time.sleep(0.5)
