"""The ranks that prepare one corpus together: what they tell each other, over a key-value store of rank zero's.

They need no collectives and no torch process group, but must hear when one of them fails or is gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from distilcb.errors import DataError, LaunchError, UserError, first_line
from distilcb.launcher import World, discover, has_agent, is_started_by_mpi

T = TypeVar("T")

_POLL_SECONDS = 0.1
_BEAT_SECONDS = 1.0
# Of passed time what counts as silence: where more passed, this process was suspended itself, or had no time to look.
_LONGEST_GAP_SECONDS = 2 * _BEAT_SECONDS
# Between rank zero's end and the others', so that its message is the one that is printed.
_RANK_ZERO_SPEAKS_FIRST_SECONDS = 4.0
_GOES_ON = "Finished parts are kept: the same command goes on from there."

log = logging.getLogger(__name__)


class Crew:
    """This process and the ranks beside it; by itself, one rank."""

    rank = 0
    size = 1

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def from_main(self, name: str, action: Callable[[], T]) -> T:
        """What `action` gives on rank zero, on every rank; the name is used once."""
        return action()

    def gather(self, name: str, obj: Any) -> list[Any]:
        """What each rank passes, in the order of ranks, on rank zero; elsewhere nothing. The name is used once."""
        return [obj]

    def add(self, counter: str, amount: int) -> int:
        """Adds to a counter that all ranks share; gives what it is now."""
        self._counters[counter] = self._counters.get(counter, 0) + amount
        return self._counters[counter]

    def check(self) -> None:
        """Raises where another rank has failed or is gone; costs little."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}


class RanksCrew(Crew):
    """Several ranks. Leaving with an error ends the others too."""

    def __init__(self, world: World, *, silence_seconds: float = 60.0, meeting_seconds: float = 600.0) -> None:
        """Meets rank zero.

        Args:
            silence_seconds: without a sign of life, after which a rank counts as gone.
            meeting_seconds: for ranks to come: imports from a file system in use take some of them minutes.

        Raises:
            LaunchError: rank zero is not to be found, or its port is taken.
        """
        super().__init__()
        self.rank, self.size = world.rank, world.size
        self._world, self._silence, self._meeting = world, silence_seconds, meeting_seconds
        is_host = world.is_main and not has_agent(os.environ)
        self._store = self._connect(host=is_host)
        watched = range(1, world.size) if world.is_main else (0,)
        self._beats = dict.fromkeys(watched, (0, 0.0))  # how many, and seconds without one
        self._looked_at = time.monotonic()
        self._unanswered_seconds = 0.0
        self._left = threading.Event()
        threading.Thread(target=self._beat, daemon=True, name="beat").start()
        if not is_host:
            threading.Thread(target=self._wait_for_answers, daemon=True, name="beat's watchdog").start()

    def __enter__(self) -> RanksCrew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave the others; after an error, once they know of it. Ranks but zero end here with exit code 2 then."""
        if isinstance(error, Exception) and not self.is_main and not isinstance(error, (UserError, _HeardError)):
            # A fault of ours, of which rank zero is sent one line.
            print(f"[rank {self.rank}]", *traceback.format_exception(error), file=sys.stderr, flush=True)
        try:
            with _talking():
                if error is None:
                    self._leave_together()
                else:
                    self._tell(error)
        except (_HeardError, UserError) as later:
            error = error or later
        if error is None:
            self._left.set()
            return
        if self.is_main:
            self._left.set()
            raise error.error if isinstance(error, _HeardError) else error
        if not isinstance(error, _HeardError) and not self._rank_zero_tells():
            print(f"[rank {self.rank}] {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        time.sleep(_RANK_ZERO_SPEAKS_FIRST_SECONDS)
        os._exit(2)  # at once: MPI's own end would wait for ranks that may not come

    def _leave_together(self) -> None:
        self._store.add("left", 1)
        while self.is_main and self._store.add("left", 0) < self.size:
            self.check()
            time.sleep(_POLL_SECONDS)

    def _tell(self, error: BaseException) -> None:
        """Let the others know of this rank's error; rank zero waits a little until they do."""
        if not isinstance(error, _HeardError) and not self._store.check(["fault"]):
            self._store.set("fault", pickle.dumps((self.rank, _as_user_error(error, self.rank))))
        if not self.is_main:
            return
        self._store.set("told", "")
        deadline = time.monotonic() + _RANK_ZERO_SPEAKS_FIRST_SECONDS
        while self._store.add("heard", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _rank_zero_tells(self) -> bool:
        """Whether rank zero fails with this fault, or with one of its own."""
        deadline = time.monotonic() + _RANK_ZERO_SPEAKS_FIRST_SECONDS
        try:
            self._store.add("heard", 1)
            while time.monotonic() < deadline:
                if self._store.check(["told"]):
                    return True
                time.sleep(_POLL_SECONDS)
        except RuntimeError:
            pass
        return False

    def from_main(self, name: str, action: Callable[[], T]) -> T:
        if self.is_main:
            result = action()
            with _talking():
                self._store.set(f"main/{name}", pickle.dumps(result))
            return result
        return self._wait_for(f"main/{name}")  # type: ignore[no-any-return]

    def gather(self, name: str, obj: Any) -> list[Any]:
        if not self.is_main:
            with _talking():
                self._store.set(f"{name}/{self.rank}", pickle.dumps(obj))
            return []
        return [obj, *(self._wait_for(f"{name}/{rank}") for rank in range(1, self.size))]

    def add(self, counter: str, amount: int) -> int:
        with _talking():
            return int(self._store.add(f"count/{counter}", amount))

    def check(self) -> None:
        passed = time.monotonic() - self._looked_at
        if passed < _BEAT_SECONDS / 2:
            return
        self._looked_at += passed
        with _talking():
            self._look(min(passed, _LONGEST_GAP_SECONDS))

    def _look(self, passed: float) -> None:
        if self._store.check(["fault"]):
            rank, error = pickle.loads(self._store.get("fault"))
            self._store.add("heard", 1)
            raise _HeardError(rank, error)
        for rank, (before, silent) in self._beats.items():
            beat = self._store.add(f"beat/{rank}", 0)
            silent = silent + passed if beat == before else 0.0
            self._beats[rank] = beat, silent
            if not beat and silent > self._meeting:
                raise DataError(f"rank {rank} has not come within {silent:.0f} s: look for what it says. {_GOES_ON}")
            if beat and silent > self._silence:
                raise DataError(f"rank {rank} is gone: no sign of life for {silent:.0f} s. {_GOES_ON}")

    def _wait_for(self, key: str) -> Any:
        while True:
            self.check()
            with _talking():
                if self._store.check([key]):
                    return pickle.loads(self._store.get(key))
            time.sleep(_POLL_SECONDS)

    def _beat(self) -> None:
        try:
            store = self._connect(host=False)  # of its own: what waits on the other does not delay it
            while not self._left.is_set():
                store.add(f"beat/{self.rank}", 1)
                self._unanswered_seconds = 0.0
                self._left.wait(_BEAT_SECONDS)
        except (RuntimeError, LaunchError):
            return  # rank zero is gone, as check() will find

    def _wait_for_answers(self) -> None:
        """End where rank zero's store gives none: a process that stands still, or a network that has gone.

        Any other thread that asks it then waits without an end.
        """
        looked_at = time.monotonic()
        while not self._left.wait(_BEAT_SECONDS):
            passed = time.monotonic() - looked_at
            looked_at += passed
            self._unanswered_seconds += min(passed, _LONGEST_GAP_SECONDS)
            if self._unanswered_seconds > self._silence and not self._left.is_set():
                print(
                    f"[rank {self.rank}] DataError: rank 0 at {self._world.master_addr} does not answer for "
                    f"{self._unanswered_seconds:.0f} s. {_GOES_ON}",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)

    def _connect(self, *, host: bool) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        address, port = self._world.master_addr, self._world.master_port
        try:
            patience = timedelta(seconds=self._meeting)
            store = TCPStore(address, port, is_master=host, timeout=patience, wait_for_workers=False)
        except RuntimeError as error:
            causes = "" if host else f"Rank 0 has not come within {self._meeting:.0f} s: look for what it says. Or "
            raise LaunchError(
                f"ranks cannot meet at {address}, port {port} ({first_line(error)}). {causes or 'Perhaps '}the port is "
                "taken: set MASTER_PORT to a free one, the same for every rank."
            ) from error
        # Under torchrun the store outlives the ranks; those that it starts again find nothing of the first ones.
        return PrefixStore(f"prepare/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def _talking() -> Iterator[None]:
    """Say of the store's errors, which are RuntimeErrors, what they mean."""
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"the ranks have lost each other ({first_line(error)}). {_GOES_ON}") from error


class _HeardError(Exception):
    """Another rank has failed, and has said how."""

    def __init__(self, rank: int, error: UserError) -> None:
        super().__init__(f"rank {rank}: {error}")
        self.error = error


def _as_user_error(error: BaseException, rank: int) -> UserError:
    if isinstance(error, UserError):
        return error
    return DataError(f"rank {rank} failed ({type(error).__name__}: {first_line(error)})")


def join_crew(world: World) -> Crew:
    """The ranks beside this one; one that nobody launched is alone."""
    return RanksCrew(world) if world.size > 1 else Crew()


def find_world() -> World:
    """This process's place among the ranks; MPI itself is asked where mpirun or mpiexec started it.

    Where mpi4py does not load the launcher's variables have to do.
    """
    if is_started_by_mpi(os.environ):
        try:
            import mpi4py.MPI  # noqa: F401

            return discover(use_mpi=True)
        except (ImportError, RuntimeError) as error:
            log.warning("mpi4py does not load (%s): ranks are told by the launcher's variables", first_line(error))
    return discover()
