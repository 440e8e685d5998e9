"""How far preparing has come, over all processes and ranks: a bar on a terminal, lines elsewhere."""

import logging
import sys
import time

from tqdm import tqdm

from distilcb.data.crew import Crew

log = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Counts bytes that are done, and says so on rank zero."""

    def __init__(self, crew: Crew, *, what: str, total_bytes: int, shown: bool) -> None:
        """shown: on rank zero; the other ranks only count."""
        self._crew, self._what, self._total = crew, what, max(1, total_bytes)
        self._shown = shown and crew.is_main
        self._bar = tqdm(
            total=total_bytes,
            desc=what,
            unit="B",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not (self._shown and sys.stderr.isatty()),
        )
        self._started = self._told_at = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, size: int) -> None:
        """So many bytes of the sources more are done, here."""
        done = self._crew.add(self._what, size)
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
        elif self._shown and time.monotonic() - self._told_at > _SECONDS_BETWEEN_LINES:
            self._told_at = time.monotonic()
            log.info("%s", self.line(done, self._told_at - self._started))

    def line(self, done: int, seconds: float) -> str:
        """Bytes done and in all, rate, and the time that what is left takes at that rate."""
        rate = done / seconds
        left = tqdm.format_interval((self._total - done) / rate) if rate else "?"
        return f"{self._what}: {done / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {left} left"
