"""Files that a power failure leaves whole: what has its name is on disk."""

import errno
import os
from pathlib import Path


def write_durably(path: Path, content: str | bytes, *, unwritten: Path | None = None) -> None:
    """Replace a file's content in one move that survives a power failure.

    Args:
        unwritten: the name until then, beside it; one of its own where several processes may write the same file.
    """
    unwritten = unwritten or path.with_name(f".{path.name}.tmp")
    with unwritten.open("wb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    unwritten.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have on disk what a file holds, or which names a folder has, as far as the file system knows how."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder may be open to writing alone
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # a network file system may have no such thing for folders
            raise
    finally:
        os.close(descriptor)
