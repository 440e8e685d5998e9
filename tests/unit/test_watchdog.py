"""Who is named when ranks stand still, and that the process ends."""

import json
import time

import pytest
from torch.distributed import HashStore

from distilcb import watchdog
from distilcb.errors import RankZeroLostError
from distilcb.launcher import World
from distilcb.watchdog import Place, Sight, Watchdog, at, judge

SILENCE, STALL = 60.0, 600.0
NOW = 10_000.0


def sight(step, place, *, micro=0, heard=0.0, moved=0.0, host="node1"):
    """What is known of a rank that was heard of and that moved some seconds ago."""
    return Sight(host, step, micro, place, 5, 5, NOW - heard, NOW - moved)


def verdict(*sights):
    return judge(dict(enumerate(sights)), now=NOW, silence_seconds=SILENCE, stall_seconds=STALL)


def test_ranks_that_move_are_left_alone_and_so_are_those_that_wait_for_one_that_does():
    assert verdict(sight(7, Place.FORWARD), sight(7, Place.BACKWARD)) is None
    assert verdict(sight(7, Place.EVALUATION, moved=1), sight(7, Place.EVALUATION_SUMS, moved=10 * STALL)) is None


def test_a_rank_without_a_sign_of_life_is_named_with_its_machine_and_step():
    found = verdict(sight(7, Place.BACKWARD), sight(7, Place.FORWARD, heard=75, host="node2"))
    assert found == "rank 1 on node2: no sign of life for 75 s, last seen in step 7, the student's forward pass"


def test_of_ranks_that_stand_still_the_one_furthest_back_is_named_and_where_the_others_wait():
    waiting = sight(7, Place.BACKWARD, moved=700)
    found = verdict(waiting, sight(7, Place.READING, moved=900, host="node2"), waiting)
    assert found == (
        "rank 1 on node2: has not moved for 700 s in step 7, reading a batch; "
        "the others wait in step 7, the backward pass"
    )


@pytest.mark.parametrize(
    ("back", "ahead"),
    [
        ((6, Place.SAVING, 0), (7, Place.READING, 0)),
        ((7, Place.UPDATE, 2), (7, Place.READING, 3)),
        ((7, Place.BACKWARD, 3), (7, Place.UPDATE, 3)),
        ((7, Place.EVALUATION, 3), (7, Place.EVALUATION_SUMS, 3)),
    ],
)
def test_an_earlier_step_micro_batch_or_place_is_further_back(back, ahead):
    sights = [sight(step, place, micro=micro, moved=601, host=place.name) for step, place, micro in (ahead, back)]
    assert verdict(*sights).startswith(f"rank 1 on {back[1].name}: has not moved")


def test_where_all_stand_in_the_same_place_nobody_is_blamed():
    found = verdict(*[sight(7, Place.BACKWARD, moved=601)] * 3)
    assert found == "no rank has moved for 601 s: all stand in step 7, the backward pass"


def test_many_culprits_are_counted_rather_than_listed():
    found = verdict(*[sight(7, Place.READING, heard=99)] * 20)
    assert found.count("rank ") == 8
    assert "and 12 more" in found


@pytest.fixture
def dogs(monkeypatch):
    """Watchdogs of two ranks in one process, fast, over one store; their processes' ends are noted."""
    monkeypatch.setattr(watchdog, "_BEAT_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "_LOOK_FOR_LOST_SECONDS", 0.5)
    monkeypatch.setattr(watchdog, "_VERDICT_IS_READ_WITHIN_SECONDS", 0.2)
    store, ended, made = HashStore(), {}, []

    def make(rank, **settings):
        size = settings.pop("size", 2)
        world = World("env", rank, size, rank, size, "node1", 1)
        dog = Watchdog(world, settings.pop("store", store), stall_minutes=1 / 120)
        dog._end = lambda code: ended.setdefault(rank, code)
        made.append(dog)
        return dog

    yield make, store, ended
    for dog in made:
        dog.stop()


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_rank_that_falls_silent_ends_the_others_with_its_name(dogs, capfd):
    make, store, ended = dogs
    store.set("beat/1", json.dumps({"beat": 9, "host": "node2", "moves": 3, "step": 41, "micro": 0, "place": 3}))
    make(0).start()
    wait_for(lambda: ended)
    assert ended == {0: 1}
    said = capfd.readouterr().err
    assert "TrainingError: rank 1 on node2: no sign of life" in said
    assert "step 41, the backward pass" in said
    assert "the same command goes on" in said


def test_the_verdict_ends_every_rank_and_the_culprit_shows_where_it_stands(dogs, capfd):
    make, _, ended = dogs
    at(Place.READING, step=12)
    for rank in (0, 1):
        make(rank).start()
    wait_for(lambda: len(ended) == 2)
    assert ended == {0: 1, 1: 1}
    said = capfd.readouterr().err
    assert said.count("no rank has moved for") == 1
    assert "step 12, reading a batch" in said


def test_ranks_that_go_on_moving_are_not_ended(dogs):
    make, _, ended = dogs
    for rank in (0, 1):
        make(rank).start()
    started = time.monotonic()
    while time.monotonic() - started < 1.5:  # three times the patience
        at(Place.FORWARD, step=3)
        time.sleep(0.02)
    assert not ended


class Gone:
    """A store whose process has died."""

    def set(self, *_):
        raise RuntimeError("Connection reset by peer")


class Stopped:
    """A store whose process stands still."""

    def set(self, *_):
        time.sleep(60)


@pytest.mark.parametrize("store", [Gone, Stopped])
def test_where_the_place_that_ranks_meet_at_does_not_answer_a_rank_ends_after_a_while(dogs, capfd, store):
    at(Place.BACKWARD, step=8)
    make, _, ended = dogs
    started = time.monotonic()
    make(1, store=store()).start()
    wait_for(lambda: ended)
    assert ended == {1: 1}
    assert time.monotonic() - started > 0.4
    assert "[rank 1] TrainingError: step 8: rank 0 at node1 does not answer for " in capfd.readouterr().err


def test_a_lost_connection_is_told_by_who_is_gone(dogs):
    make, store, ended = dogs
    at(Place.BACKWARD, step=8)
    store.set("beat/1", json.dumps({"beat": 9, "host": "node2", "moves": 3, "step": 8, "micro": 1, "place": 3}))
    alive = make(0)
    alive.stall_seconds = alive.silence_seconds = 1e9
    alive.start()
    told = str(alive.lost(RuntimeError("gloo: Connection closed by peer [10.0.0.2]:4711\nmore")))
    assert not ended  # by the thread: this error ends it
    assert told.startswith("step 8: rank 1 on node2 is gone, last seen in step 8, the backward pass.")
    assert told.endswith("(gloo: Connection closed by peer [10.0.0.2]:4711)")


def test_of_many_ranks_only_the_one_that_is_gone_is_named_though_others_have_met_the_loss(dogs, capfd):
    """Those beside it notice; rank zero, further on, hears of it from them."""
    make, store, ended = dogs
    at(Place.BACKWARD, step=8)
    store.set("beat/2", json.dumps({"beat": 9, "host": "node3", "moves": 3, "step": 8, "micro": 1, "place": 3}))
    ranks = [make(rank, size=4) for rank in (0, 1, 3)]
    for each in ranks:
        each.stall_seconds = each.silence_seconds = 1e9
        each.start()
    wait_for(lambda: all(store.check([f"beat/{rank}"]) for rank in (0, 1, 3)))
    told = str(ranks[1].lost(RuntimeError("gloo: Connection closed by peer")))
    assert told.startswith("step 8: rank 2 on node3 is gone, last seen in step 8, the backward pass.")
    wait_for(lambda: len(ended) == 2)
    assert ended == {0: 1, 3: 1}
    assert "TrainingError: rank 2 on node3 is gone" in capfd.readouterr().err


def test_where_all_beat_on_the_connection_is_said_to_have_broken(dogs):
    make, store, _ = dogs
    both = [make(0), make(1)]
    for each in both:
        each.stall_seconds = each.silence_seconds = 1e9
        each.start()
    wait_for(lambda: store.check(["beat/1"]))
    told = str(both[0].lost(RuntimeError("gloo: Connection closed by peer")))
    assert "every rank still lives: the connection between them broke" in told


class Closed:
    """A store whose process has ended."""

    def set(self, *_):
        raise RuntimeError("Connection reset by peer")


def test_where_rank_zero_itself_is_gone_another_rank_says_so(dogs):
    make, _, _ = dogs
    at(Place.BACKWARD, step=8)
    error = make(1, store=Closed()).lost(RuntimeError("gloo: Connection closed by peer"))
    assert isinstance(error, RankZeroLostError)
    assert str(error).startswith("step 8: rank 0 at node1 is gone, and with it the place where ranks meet.")


def test_time_in_which_rank_zero_itself_was_suspended_is_nobody_elses_silence(dogs):
    make, store, _ = dogs
    store.set("beat/1", json.dumps({"beat": 9, "host": "node2", "moves": 3, "step": 8, "micro": 1, "place": 3}))
    zero = make(0)
    assert zero._beat() is None
    for sight in zero._sights.values():  # as if all had stood still for a minute
        sight.heard_at -= 60
        sight.moved_at -= 60
    zero._judged_at -= 60
    assert zero._beat() is None
    zero._sights[1].heard_at -= 60
    assert "rank 1 on node2: no sign of life" in zero._beat()


def test_a_fault_that_a_rank_has_left_word_of_is_told_instead(dogs, capfd):
    make, _, ended = dogs
    at(Place.SAVING, step=8)
    make(1).confess(OSError("No space left on device"))
    alive = make(0)
    alive.start()
    told = str(alive.lost(RuntimeError("gloo: Connection closed by peer")))
    assert "ended: OSError: No space left on device. " in told
    assert told.startswith("step 8: rank 1 on ")
    make(0).start()  # where nothing breaks its collective, the watchdog ends it
    wait_for(lambda: ended)
    assert "ended: OSError: No space left on device" in capfd.readouterr().err


def test_rank_zero_leaves_no_word_as_it_tells_its_faults_itself(dogs):
    make, store, _ = dogs
    make(0).confess(OSError("No space left on device"))
    assert not store.check(["fault"])


def test_a_single_process_is_not_watched():
    import threading

    before = threading.active_count()
    Watchdog(World("single", 0, 1, 0, 1, "127.0.0.1", 1), HashStore(), stall_minutes=10).start()
    assert threading.active_count() == before
