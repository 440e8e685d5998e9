"""No rank stands still unseen: each says every few seconds where it is, and rank zero judges.

A rank that dies ends its neighbours' collectives with an error that names a port, one that stalls ends nothing for half
an hour, and NCCL's own time-out does not name the culprit either. So a thread on each rank writes where its main thread
is to the key-value store on which the ranks have met, over a connection of its own. Where one of them gives no sign of
life, or none gets anywhere, rank zero names the rank that stands furthest back, and all end.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from distilcb.errors import RankZeroLostError, TrainingError, first_line
from distilcb.launcher import World

RESUME_ADVICE = "What was saved stays; the same command goes on from there."
_BEAT_SECONDS = 2.0
# Threads of a process that works get the interpreter in far less.
_LONGEST_SILENCE_SECONDS = 60.0
# Launchers take about as long to end the others after one that has failed.
_VERDICT_IS_READ_WITHIN_SECONDS = 2.5 * _BEAT_SECONDS

# In which a rank that lives has beaten again.
_LOOK_FOR_LOST_SECONDS = 3 * _BEAT_SECONDS

_STACKS_AT_MOST = 8


class Place(IntEnum):
    """What the ranks do, in the order in which they come to it in a step; in collectives they wait for each other."""

    READING = 0
    TEACHER = 1
    FORWARD = 2
    BACKWARD = 3
    UPDATE = 4
    FIGURES = 5
    EVALUATION = 6
    EVALUATION_SUMS = 7
    SAVING = 8
    FINISHING = 9
    # launch/doctor.py's, whose steps are its measurements.
    PRODUCTS = 10
    SUMS = 11
    LINKS = 12
    DISK = 13

    def __str__(self) -> str:
        return _NAMES[self]


_NAMES = {
    Place.READING: "reading a batch",
    Place.TEACHER: "the teacher's forward pass",
    Place.FORWARD: "the student's forward pass",
    Place.BACKWARD: "the backward pass",
    Place.UPDATE: "the optimizer step",
    Place.FIGURES: "summing the figures over ranks",
    Place.EVALUATION: "an evaluation",
    Place.EVALUATION_SUMS: "summing an evaluation over ranks",
    Place.SAVING: "saving a checkpoint",
    Place.FINISHING: "finishing the run",
    Place.PRODUCTS: "measuring matrix products",
    Place.SUMS: "measuring sums over ranks",
    Place.LINKS: "measuring links between nodes",
    Place.DISK: "measuring the file system",
}


@dataclass
class _Position:
    """Where this process's main thread is."""

    step: int = 0
    micro: int = 0
    place: Place = Place.READING
    moves: int = 0


@dataclass
class Sight:
    """What one rank knows of another: when it was last heard of, and where it was, on this rank's clock."""

    host: str = "?"
    step: int = 0
    micro: int = 0
    place: Place = Place.READING
    moves: int = -1
    beat: int = -1
    heard_at: float = field(default_factory=time.monotonic)
    moved_at: float = field(default_factory=time.monotonic)

    def look(self, text: str, now: float) -> None:
        """Take in what the rank has written last."""
        said = json.loads(text)
        if said["beat"] != self.beat:
            self.beat, self.heard_at = said["beat"], now
        if said["moves"] != self.moves:
            self.moves, self.moved_at = said["moves"], now
        self.host, self.step, self.micro, self.place = said["host"], said["step"], said["micro"], Place(said["place"])

    @property
    def position(self) -> tuple[int, int, int]:
        """Sorts ranks by how far they have come."""
        return self.step, self.micro, int(self.place)


def judge(sights: dict[int, Sight], *, now: float, silence_seconds: float, stall_seconds: float) -> str | None:
    """What is wrong among the ranks, naming the culprit; None where nothing is.

    Args:
        silence_seconds: without any sign of life from one rank.
        stall_seconds: without a move of any rank: those that wait for a culprit do not move either.
    """
    silent = {rank: sight for rank, sight in sights.items() if now - sight.heard_at > silence_seconds}
    if silent:
        longest = max(now - sight.heard_at for sight in silent.values())
        return f"{_name(silent)}: no sign of life for {longest:.0f} s, last seen in {_where(silent)}"
    still = min(now - sight.moved_at for sight in sights.values())
    if still <= stall_seconds:
        return None
    furthest_back = min(sight.position for sight in sights.values())
    back = {rank: sight for rank, sight in sights.items() if sight.position == furthest_back}
    if len(back) == len(sights):
        return f"no rank has moved for {still:.0f} s: all stand in {_where(back)}"
    waiting = {rank: sight for rank, sight in sights.items() if rank not in back}
    return f"{_name(back)}: has not moved for {still:.0f} s in {_where(back)}; the others wait in {_where(waiting)}"


def _name(sights: dict[int, Sight]) -> str:
    names = [f"rank {rank} on {sight.host}" for rank, sight in sorted(sights.items())]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _where(sights: dict[int, Sight]) -> str:
    places = sorted({(sight.position, str(sight.place), sight.step) for sight in sights.values()})
    return " or ".join(f"step {step}, {place}" for _, place, step in places[:3])


class Watchdog:
    """Watches over the ranks from `start` to `stop`; ends the process with exit code 1 where something is wrong."""

    def __init__(self, world: World, store: Any, *, stall_minutes: float, advice: str = RESUME_ADVICE) -> None:
        """store: a connection to the ranks' common store. advice: what to do, told after what is wrong."""
        self.world, self.store, self.advice = world, store, advice
        self.stall_seconds = stall_minutes * 60
        self.silence_seconds = min(_LONGEST_SILENCE_SECONDS, self.stall_seconds)
        self._sights = {rank: Sight() for rank in range(world.size)} if world.is_main else {}
        self._known: set[int] = set()
        self._beats = 0
        self._unanswered_seconds = 0.0
        self._judged_at = time.monotonic()
        self._fault_seen_at = time.monotonic()
        self._beats_at_loss: tuple[float, dict[int, int]] | None = None
        self._ends_process = threading.Lock()  # taken for good by the one thread that ends this process
        self._stopped = threading.Event()
        self._end: Callable[[int], Any] = os._exit

    def start(self) -> None:
        """Watch from now on; a single process has nobody to wait for."""
        if self.world.size > 1:
            threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
            threading.Thread(target=self._wait_for_answers, daemon=True, name="watchdog's watchdog").start()

    def stop(self) -> None:
        """Watch no more: from here on ranks may leave."""
        self._stopped.set()

    def confess(self, error: Exception) -> None:
        """Leave word of what ends this rank, for those that will miss it."""
        if self.world.is_main or self.world.size == 1:
            return  # rank zero tells its faults itself
        with suppress(Exception):  # rank zero may be gone already
            fault = f"{type(error).__name__}: {error}"
            self.store.set("fault", f"rank {self.world.rank} on {platform.node()} ended: {fault}")

    def lost(self, error: Exception) -> TrainingError:
        """The error of a collective whose other side is gone, told by who it was.

        Only the neighbours of a dead rank notice by themselves, so they leave word in the store, and rank zero's thread
        looks who still beats, as all that live go on to do while they wait here. Its verdict ends every rank.
        """
        if not self._ends_process.acquire(blocking=False):
            time.sleep(2 * _VERDICT_IS_READ_WITHIN_SECONDS)  # in which the thread that watches does, and has told why
        deadline = time.monotonic() + _LOOK_FOR_LOST_SECONDS + 2 * _VERDICT_IS_READ_WITHIN_SECONDS
        try:
            self.store.set("lost", str(self.world.rank))
            while time.monotonic() < deadline:
                if self.store.check(["verdict"]):
                    return TrainingError(self._told(self.store.get("verdict").decode(), error))
                time.sleep(_BEAT_SECONDS / 4)
        except Exception:
            where = f"rank 0 at {self.world.master_addr} is gone, and with it the place where ranks meet"
            return RankZeroLostError(self._told(where, error))
        return TrainingError(self._told("another rank is gone", error))

    def _told(self, what: str, error: Exception) -> str:
        return f"step {_position.step}: {what}. {self.advice} ({first_line(error)})"

    def _watch(self) -> None:
        while not self._stopped.is_set():
            try:
                verdict = self._beat()
                self._unanswered_seconds = 0.0
            except Exception:  # the store's errors have no class in common
                verdict = None
            if verdict and not self._stopped.is_set() and self._ends_process.acquire(blocking=False):
                self._carry_out(verdict)
                return
            self._stopped.wait(_BEAT_SECONDS)

    def _carry_out(self, verdict: str) -> None:
        if self.world.is_main:
            self._tell(verdict)
            time.sleep(_VERDICT_IS_READ_WITHIN_SECONDS)
        if self._is_meant(verdict):
            self._show_stack()
        self._end(1)

    def _wait_for_answers(self) -> None:
        """End where rank zero's store gives none: its process has stopped, or the network to it has.

        A store whose process stands still makes the other thread wait without an end. Time in which this process was
        itself suspended does not count.
        """
        looked_at = time.monotonic()
        while not self._stopped.wait(_BEAT_SECONDS):
            passed, looked_at = time.monotonic() - looked_at, time.monotonic()
            self._unanswered_seconds += min(passed, 2 * _BEAT_SECONDS)
            if self._unanswered_seconds > self.silence_seconds and not self._stopped.is_set():
                seconds, step = self._unanswered_seconds, _position.step
                self._tell(f"step {step}: rank 0 at {self.world.master_addr} does not answer for {seconds:.0f} s")
                self._end(1)
                return

    def _beat(self) -> str | None:
        """Say where this rank is; returns the verdict, if there is one."""
        self._beats += 1
        here = _position
        said = {"beat": self._beats, "host": platform.node(), "moves": here.moves}
        said |= {"step": here.step, "micro": here.micro, "place": int(here.place)}
        self.store.set(f"beat/{self.world.rank}", json.dumps(said))
        if not self.world.is_main:
            return self.store.get("verdict").decode() if self.store.check(["verdict"]) else None
        self._forgive_own_absence()
        self._see(self._sights)
        now, silence, stall = time.monotonic(), self.silence_seconds, self.stall_seconds
        verdict = judge(self._sights, now=now, silence_seconds=silence, stall_seconds=stall)
        if (fault := self._confessed()) and time.monotonic() - self._fault_seen_at > _VERDICT_IS_READ_WITHIN_SECONDS:
            verdict = fault  # and this rank has not met the same one
        if verdict := verdict or self._who_is_lost():
            self.store.set("verdict", verdict)
        return verdict

    def _who_is_lost(self) -> str | None:
        """Who has not beaten since a rank left word that another is gone; None where none did, or it is too early."""
        if not self.store.check(["lost"]):
            return None
        if self._beats_at_loss is None:
            self._beats_at_loss = time.monotonic(), {rank: sight.beat for rank, sight in self._sights.items()}
        since, beats = self._beats_at_loss
        if time.monotonic() - since < _LOOK_FOR_LOST_SECONDS:
            return None
        gone = {rank: sight for rank, sight in self._sights.items() if sight.beat == beats[rank]}
        if not gone:
            return "every rank still lives: the connection between them broke"
        return f"{_name(gone)} is gone, last seen in {_where(gone)}"

    def _forgive_own_absence(self) -> None:
        """Time in which this process did not look, because its job was suspended, is not the other ranks' silence."""
        passed, self._judged_at = time.monotonic() - self._judged_at, time.monotonic()
        if (absent := passed - 2 * _BEAT_SECONDS) > 0:
            for sight in self._sights.values():
                sight.heard_at += absent
                sight.moved_at += absent

    def _confessed(self) -> str | None:
        """The fault with which another rank has ended."""
        if not self.store.check(["fault"]):
            self._fault_seen_at = time.monotonic()
            return None
        return str(self.store.get("fault").decode())

    def _see(self, sights: dict[int, Sight]) -> None:
        self._known |= {rank for rank in sights if rank not in self._known and self.store.check([f"beat/{rank}"])}
        ranks = sorted(self._known & sights.keys())
        now = time.monotonic()
        for rank, said in zip(ranks, self.store.multi_get([f"beat/{rank}" for rank in ranks]), strict=True):
            sights[rank].look(said.decode(), now)

    def _tell(self, verdict: str) -> None:
        prefix = "" if self.world.is_main else f"[rank {self.world.rank}] "
        print(f"\n{prefix}TrainingError: {verdict}. {self.advice}", file=sys.stderr, flush=True)

    def _is_meant(self, verdict: str) -> bool:
        """Whether this rank's stack tells more; where nobody is blamed, those of the first few do."""
        if verdict.startswith("no rank has moved"):
            return self.world.rank < _STACKS_AT_MOST
        return f"rank {self.world.rank} on " in verdict

    def _show_stack(self) -> None:
        print(f"\n[rank {self.world.rank}] stands here:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr)


def at(place: Place, *, step: int | None = None, micro: int | None = None) -> None:
    """Say that the main thread has come to a place, in a step counted from 1 and a micro-batch of it."""
    _position.place = place
    if step is not None:
        _position.step, _position.micro = step, 0
    if micro is not None:
        _position.micro = micro
    _position.moves += 1


_position = _Position()
