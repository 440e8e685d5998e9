"""Files as the bytes that they hold: plain, or unpacked as a stream."""

import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

COMPRESSIONS = (".gz", ".xz", ".zst")


@contextmanager
def open_bytes(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """The decompressed bytes, and how far the file itself has been read."""
    if path.suffix == ".zst":
        import pyarrow

        # zstandard's stream_reader takes a file that ends in the middle for a whole one.
        with pyarrow.OSFile(str(path)) as raw, pyarrow.CompressedInputStream(raw, "zstd") as zst:
            yield io.BufferedReader(zst, buffer_size=1 << 20), raw.tell
        return
    with path.open("rb") as file:
        if path.suffix == ".gz":
            with gzip.open(file) as stream:
                yield stream, file.tell  # type: ignore[misc]
        elif path.suffix == ".xz":
            yield io.BufferedReader(_XzStreams(file), buffer_size=1 << 16), file.tell
        else:
            yield file, file.tell


class _XzStreams(io.RawIOBase):
    """What all streams of an .xz hold.

    lzma.open ends without a word where what follows a stream is damaged, or is the padding that the format allows.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._ahead = file, b""
        self._stream = lzma.LZMADecompressor()

    def readable(self) -> bool:
        """As BufferedReader asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the beginning of `buffer`; how many bytes, 0 at the end. LZMAError or EOFError where it is damaged."""
        data = b""
        while not data:
            if self._stream.eof and not self._begin_next():
                return 0
            taken = b""
            if self._stream.needs_input:
                taken, self._ahead = self._ahead or self._file.read(io.DEFAULT_BUFFER_SIZE), b""
                if not taken:
                    raise EOFError
            data = self._stream.decompress(taken, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _begin_next(self) -> bool:
        """Whether there is another stream; LZMAError where something else follows."""
        padding, after = 0, self._stream.unused_data
        while after or (after := self._file.read(io.DEFAULT_BUFFER_SIZE)):
            padding += len(after)
            after = after.lstrip(b"\0")
            padding -= len(after)
            if after:
                break
        if padding % 4:
            raise lzma.LZMAError("zero bytes after a stream, not in fours")
        if after:
            self._stream, self._ahead = lzma.LZMADecompressor(lzma.FORMAT_XZ), after
        return bool(after)
