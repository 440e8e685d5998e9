"""Processes that make parts, and what is read ahead for them: nobody waits unseen, and no end goes untold."""

import gzip
import os
import signal
import threading
import time

import pytest

from distilcb.data import workers
from distilcb.data.corpus import read_chunks
from distilcb.data.parts import Part, Span, cut, share_out
from distilcb.data.workers import Workers, parts_of_share
from distilcb.errors import DataError


def part(number, size=1):
    return Part(f"{number:06d}-000000", (Span(0, size, size),))


def name_of(part, tick):
    return part.name


def pid_of(part, tick):
    return os.getpid()


class LongToTell:
    """More than a pipe holds."""

    def __init__(self):
        self.ballast = bytes(4 << 20)

    def __call__(self, part, tick):
        return part.name


def end_at_once(*_):
    os._exit(7)


def test_a_part_that_is_done_is_given_while_the_next_is_not_there_yet():
    given, ticks = [], []

    def parts():
        yield part(0)
        deadline = time.monotonic() + 60
        while not given and time.monotonic() < deadline:
            yield None
            time.sleep(0.01)
        assert given

    with Workers(name_of, 2) as crowd:
        for made, name in crowd.results(parts(), lambda: ticks.append(1)):
            given.append((made.name, name))
    assert given == [(part(0).name, part(0).name)]
    assert ticks


def test_a_process_that_ends_before_it_hears_what_to_do_is_told_as_one_that_was_killed(monkeypatch):
    monkeypatch.setattr(workers, "_work", end_at_once)
    with Workers(LongToTell(), 1) as crowd, pytest.raises(DataError, match=r"killed \(exit code 7"):
        list(crowd.results(iter([part(0)]), lambda: None))


def test_a_process_that_ends_between_two_parts_is_told_as_one_that_was_killed():
    with Workers(pid_of, 1) as crowd:
        made = crowd.results(map(part, range(3)), lambda: None)
        _, pid = next(made)
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(DataError, match=r"killed \(exit code -9"):
            next(made)


@pytest.fixture
def slow_stream(tmp_path, monkeypatch):
    """A share of one stream, whose second chunk is read when the event is set."""
    lines = [f"ligne {number}" for number in range(400)]
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    go_on = threading.Event()

    def read_slowly(path, *, chunk_bytes, skip_damaged):
        for number, chunk in enumerate(read_chunks(path, chunk_bytes=chunk_bytes)):
            if number == 1:
                go_on.wait(60)
            yield chunk

    monkeypatch.setattr(workers, "read_chunks", read_slowly)
    sources = [tmp_path / "a.txt.gz"]
    (share,) = share_out(cut(sources, text_field="text", part_bytes=1000), ranks=1)
    return share, sources, go_on


def test_whoever_asks_for_parts_does_not_wait_for_what_is_read_slowly(slow_stream):
    share, sources, go_on = slow_stream
    parts = parts_of_share(share, sources, part_bytes=1000, processes=1)
    first = next(filter(None, parts))
    started = time.monotonic()
    assert [next(parts), next(parts)] == [None, None]
    assert time.monotonic() - started < 20
    go_on.set()
    text = b"".join(each.chunk.text for each in [first, *filter(None, parts)])
    assert text == gzip.decompress(sources[0].read_bytes())
