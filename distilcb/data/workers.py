"""Processes that make parts, and what reads ahead for them.

multiprocessing's own pools keep a queue of what is to be done: forty parts of a stream would lie there. Here a part
goes straight to a process that has nothing to do.
"""

import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from distilcb.data.corpus import Chunk, read_chunks
from distilcb.data.parts import Part, Share, Span, StreamShare
from distilcb.data.tables import Source
from distilcb.errors import DataError, UserError

# Processes that one decompressing thread keeps busy, about.
_PROCESSES_A_READER = 8
_READING_IS_WAITED_FOR_SECONDS = 0.5


class Workers:
    """Up to `count` processes that call `make` on parts; started when there is something to do."""

    def __init__(self, make: Callable[..., Any], count: int, *, threads: int = 1) -> None:
        """threads: of the tokenizer, in each process."""
        self._make = pickle.dumps(make)
        self._count, self._threads = count, threads
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, _Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in [*self._idle, *self._busy.values()]:
            worker.end()

    def results(self, parts: Iterator[Part | None], tick: Callable[[], None]) -> Iterator[tuple[Part, Any]]:
        """(part, what `make` gave for it), in the order in which they get done. `tick` is called at least each second.

        Where `parts` give None there is nothing to begin yet.

        Raises:
            UserError: as raised in a process; or a process that was killed.
        """
        for part in parts:
            if part is None:
                tick()
                yield from self._done(timeout=0)
                continue
            while not self._idle and len(self._busy) == self._count:
                tick()
                yield from self._done(timeout=1)
            worker = self._idle.pop() if self._idle else _Worker(self._make, self._threads)
            self._busy[worker.connection] = worker
            worker.begin(part)
            yield from self._done(timeout=0)
        while self._busy:
            tick()
            yield from self._done(timeout=1)

    def _done(self, *, timeout: float) -> Iterator[tuple[Part, Any]]:
        ready: list[Any] = wait(list(self._busy), timeout)
        for connection in ready:
            worker = self._busy.pop(connection)
            try:
                yield worker.part, worker.result()
            except BaseException:
                worker.end()
                raise
            self._idle.append(worker)


class _Worker:
    """One process and what it does."""

    part: Part

    def __init__(self, make: bytes, threads: int) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, threads, os.getpid()), daemon=True)
        self._process.start()
        theirs.close()  # so that the end of the process is the end of what can be read
        with suppress(ConnectionError):  # result() tells
            self.connection.send_bytes(make)

    def begin(self, part: Part) -> None:
        """Let it make this part; result() waits for it."""
        # Only its number is wanted back.
        self.part = Part(part.name, part.spans)
        with suppress(ConnectionError):  # as above
            self.connection.send(part)

    def result(self) -> Any:
        """What was made of the part; what the process raised is raised here, and DataError where it was killed."""
        try:
            result, fault = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join(5)
            raise DataError(
                f"a process that prepared text was killed (exit code {self._process.exitcode}; the machine may be "
                "short of memory). Finished parts are kept: the same command goes on, with fewer --processes."
            ) from None
        if isinstance(fault, BaseException):
            raise fault
        if fault:
            raise RuntimeError(f"a process that prepared text failed:\n{fault}")
        return result

    def end(self) -> None:
        self.connection.close()
        if self._process.is_alive():
            self._process.terminate()
        self._process.join(5)


def _work(connection: Connection, threads: int, parent: int) -> None:
    """What a process does until the one that started it closes the connection, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is for the one that started it
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["OMP_NUM_THREADS"] = "1"

    def end_if_alone() -> None:
        if os.getppid() != parent:
            os._exit(1)

    with suppress(EOFError, ConnectionError):
        make = pickle.loads(connection.recv_bytes())
        while True:
            part = connection.recv()
            answer: tuple[Any, Any]
            try:
                answer = make(part, end_if_alone), None
            except UserError as error:
                answer = None, error
            except Exception:
                answer = None, traceback.format_exc()
            connection.send(answer)


def parts_of_share(
    share: Share, sources: Sequence[Source], *, part_bytes: int, processes: int, skip_damaged: bool = False
) -> Iterator[Part | None]:
    """All parts of a share. Streams are read ahead in threads, and other parts fill the time in which none is ready.

    None, now and then, while there is nothing but to wait for them.
    """
    if not share.streams:
        yield from share.parts
        return
    readers = min(len(share.streams), 1 + processes // _PROCESSES_A_READER)
    read = partial(read_chunks, chunk_bytes=part_bytes, skip_damaged=skip_damaged)
    reading = _ReadAhead(share.streams, sources, read, readers=readers)
    rest = iter(share.parts)
    try:
        while True:
            part = reading.ready() or next(rest, None)
            if part is None and reading.is_over:
                return
            yield part or reading.next()
    finally:
        reading.stop()


class _ReadAhead:
    """The parts of streams, read by threads: decompressing leaves Python's lock to others."""

    def __init__(
        self,
        streams: Sequence[StreamShare],
        sources: Sequence[Source],
        read_chunks: Callable[[Any], Iterator[tuple[Chunk, int]]],
        *,
        readers: int,
    ) -> None:
        self._sources, self._read_chunks = sources, read_chunks
        self._streams = iter(streams)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._found: queue.Queue[Part | BaseException | None] = queue.Queue(maxsize=1)
        self._reading = readers
        for _ in range(readers):
            threading.Thread(target=self._read, daemon=True).start()

    def ready(self) -> Part | None:
        """The next part, if there is one already."""
        try:
            return self._take(self._found.get_nowait())
        except queue.Empty:
            return None

    def next(self) -> Part | None:
        """The next part, where there is one before long."""
        try:
            return self._take(self._found.get(timeout=_READING_IS_WAITED_FOR_SECONDS))
        except queue.Empty:
            return None

    @property
    def is_over(self) -> bool:
        """Whether all parts are taken."""
        return not self._reading

    def stop(self) -> None:
        self._stopped.set()

    def _take(self, found: Part | BaseException | None) -> Part | None:
        if isinstance(found, BaseException):
            raise found
        if found is None:
            self._reading -= 1
        return found

    def _read(self) -> None:
        try:
            while True:
                with self._lock:
                    share = next(self._streams, None)
                if share is None:
                    break
                self._read_stream(share)
            self._put(None)
        except BaseException as error:  # raised again by the one that takes
            self._put(error)

    def _read_stream(self, share: StreamShare) -> None:
        stream = share.stream
        path: Any = self._sources[stream.source]
        for number, (chunk, size) in enumerate(self._read_chunks(path)):
            if self._stopped.is_set():
                return
            if share.has(number):
                span = Span(stream.source, size, len(chunk.text))
                self._put(Part(stream.name(number), (span,), chunk))

    def _put(self, found: Part | BaseException | None) -> None:
        while not self._stopped.is_set():
            with suppress(queue.Full):
                self._found.put(found, timeout=0.2)
                return
