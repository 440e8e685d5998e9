"""Processes, starts that were killed, and starts side by side: the same blocks, nothing done twice."""

import gzip
import json
import lzma
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_prepare import TEXT, Numerals, all_blocks, files_of, random_numerals, write_lines

from distilcb.config import REPOSITORY
from distilcb.data.blocks import Blocks, read_description
from distilcb.data.crew import RanksCrew
from distilcb.data.data_report import length_quantiles
from distilcb.data.packing import finished_part
from distilcb.data.prepare import prepare, prepare_cached
from distilcb.data.prepare_command import cores_of_rank
from distilcb.data.progress import Progress
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import ConfigError, DataError, LaunchError
from distilcb.launcher import World

PART_BYTES = 4000


def write_corpus(folder):
    """Every kind of file, big ones among them; gives the lines in order."""
    folder.mkdir()
    lines = random_numerals(1400)
    write_lines(folder / "a.txt", lines[:500])
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[500:700]))
    (folder / "c.txt.gz").write_bytes(gzip.compress("\n".join(lines[700:1000]).encode()))
    (folder / "d.txt.xz").write_bytes(lzma.compress("\n".join(lines[1000:1010]).encode()))
    with pyarrow.output_stream(str(folder / "e.txt.zst"), compression="zstd") as stream:
        stream.write("\n".join(lines[1010:1200]).encode())
    pyarrow.parquet.write_table(pyarrow.table({"text": lines[1200:]}), folder / "f.parquet", row_group_size=60)
    return lines


def prepared(names, output, **more):
    settings = {"tokenizer": Numerals(), "seq_len": 16, "part_bytes": PART_BYTES}
    prepare([str(name) for name in names], output=output, **(settings | more))
    return files_of(output)


@pytest.mark.parametrize("processes", [2, 3])
def test_blocks_do_not_depend_on_the_number_of_processes(tmp_path, processes):
    write_corpus(tmp_path / "text")
    expected = prepared([tmp_path / "text"], tmp_path / "one", processes=1)
    assert prepared([tmp_path / "text"], tmp_path / "more", processes=processes) == expected
    assert len(read_description(tmp_path / "one").files) > 10


def test_a_real_tokenizer_gives_the_same_blocks_in_several_processes(tmp_path):
    how = {"tokenizer": TextTokenizer(str(REPOSITORY / "recipes/mini/teacher")), "part_bytes": 60_000}
    expected = prepared([TEXT], tmp_path / "one", **how)
    assert prepared([TEXT], tmp_path / "two", processes=2, **how) == expected


def test_parts_lose_less_than_a_block_each_and_nothing_else(tmp_path):
    lines = write_corpus(tmp_path / "text")
    prepared([tmp_path / "text"], tmp_path / "out")
    made = read_description(tmp_path / "out")
    tokens = sum(len(line.split()) + 1 for line in lines)
    assert made.documents == len(lines)
    assert made.blocks * 14 + made.dropped["tokens_at_the_end"] == tokens
    assert made.dropped["tokens_at_the_end"] < 14 * len(made.files)
    inner = all_blocks(tmp_path / "out")[:, 1:-1]
    numbers = iter(" ".join(lines).split())
    assert all(str(token) in numbers for token in inner[inner > 3])  # in order, some left out


def test_one_part_is_as_if_there_were_none(tmp_path):
    lines = write_corpus(tmp_path / "text")
    prepared([tmp_path / "text"], tmp_path / "out", part_bytes=1 << 25, processes=3)
    assert read_description(tmp_path / "out").files == ["blocks-00000.arrow"]
    stream = [token for line in lines for token in [*map(int, line.split()), 1]]
    inner = all_blocks(tmp_path / "out")[:, 1:-1].ravel().tolist()
    assert inner == stream[: len(inner)]


# Stopped and started again


class Stopped(Numerals):
    """Stops at a call."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def encode(self, documents):
        if self.calls == self.at:
            raise KeyboardInterrupt
        return super().encode(documents)


def working_folder(folder):
    (found,) = folder.glob(".out.*.tmp")
    return found


def parts_in(folder):
    """The finished parts: name -> (file, time)."""
    stats = {path.stem: path.stat() for path in folder.glob("*.arrow") if finished_part(folder, path.stem)}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture
def interrupted(tmp_path):
    """A corpus, and an output of which some parts are finished."""
    write_corpus(tmp_path / "text")
    with pytest.raises(KeyboardInterrupt):
        prepared([tmp_path / "text"], tmp_path / "store/out", tokenizer=Stopped(at=6))
    assert len(parts_in(working_folder(tmp_path / "store"))) == 6
    return tmp_path


def test_a_stopped_preparation_goes_on_without_making_finished_parts_again(interrupted):
    before = parts_in(working_folder(interrupted / "store"))
    again = Numerals()
    found = prepared([interrupted / "text"], interrupted / "store/out", tokenizer=again)
    files = [path.stat() for path in (interrupted / "store/out").glob("*.arrow")]
    assert {(stat.st_ino, stat.st_mtime_ns) for stat in files} >= set(before.values())
    whole = Numerals()
    assert found == prepared([interrupted / "text"], interrupted / "whole", tokenizer=whole)
    assert again.calls == whole.calls - 6
    assert [path.name for path in (interrupted / "store").iterdir()] == ["out"]


@pytest.mark.parametrize("damage", ["cut arrow", "other arrow", "no arrow", "no json", "cut json", "no npz", "cut npz"])
def test_a_damaged_part_is_made_again(interrupted, damage):
    folder = working_folder(interrupted / "store")
    before = parts_in(folder)
    how, suffix = damage.split()
    victim = folder / f"{min(before)}.{suffix}"
    data = victim.read_bytes()
    if how == "no":
        victim.unlink()
    else:
        victim.write_bytes(data[: len(data) // 2] if how == "cut" else bytes(reversed(data)))
    again = Numerals()
    found = prepared([interrupted / "text"], interrupted / "store/out", tokenizer=again)
    whole = Numerals()
    assert found == prepared([interrupted / "text"], interrupted / "whole", tokenizer=whole)
    assert again.calls == whole.calls - 5


def test_parts_of_another_content_are_not_taken(interrupted):
    write_lines(interrupted / "text/a.txt", random_numerals(500, seed=9))
    again, whole = Numerals(), Numerals()
    found = prepared([interrupted / "text"], interrupted / "store/out", tokenizer=again)
    assert found == prepared([interrupted / "text"], interrupted / "whole", tokenizer=whole)
    assert again.calls == whole.calls


def test_a_start_that_was_killed_while_putting_parts_together_is_finished_by_the_next(interrupted):
    folder = working_folder(interrupted / "store")
    (folder / "assembled").mkdir()
    (folder / "assembled/blocks-00000.arrow").write_bytes(b"left")
    found = prepared([interrupted / "text"], interrupted / "store/out")
    assert found == prepared([interrupted / "text"], interrupted / "whole")


def test_what_killed_starts_have_left_half_written_goes_with_the_next(interrupted):
    folder = working_folder(interrupted / "store")
    finished = {path.name for path in folder.iterdir()}
    left = [folder / name for name in ("000009-000000.5f0c", "000009-000000.hashes.77aa", ".duplicates.bits.tmp")]
    for path in (*left, folder / "assembled/blocks-00000.arrow"):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"left")
    with pytest.raises(KeyboardInterrupt):
        prepared([interrupted / "text"], interrupted / "store/out", tokenizer=Stopped(at=0))
    assert {path.name for path in folder.iterdir()} == finished


def test_what_starts_with_other_options_have_left_is_told(interrupted, caplog):
    caplog.set_level("INFO")
    left = working_folder(interrupted / "store")
    (interrupted / "store/.out.v2.0123456789abcdef.tmp").mkdir()  # another output's
    (left / "more").write_bytes(bytes(3_000_000))
    prepared([interrupted / "text"], interrupted / "store/out", seq_len=17)
    (told,) = [said for said in caplog.messages if "with other text or options" in said]
    assert told.startswith(f"{left} holds 3.0 MB of a start")
    assert (left / "more").exists()


def test_what_a_start_left_that_was_killed_when_it_had_named_the_output_goes_with_the_next(interrupted):
    leftover = working_folder(interrupted / "store")
    expected = prepared([interrupted / "text"], interrupted / "whole")
    (interrupted / "whole").rename(interrupted / "store/out")
    leftover.with_suffix(".lock").touch()
    again = Numerals()
    assert prepared([interrupted / "text"], interrupted / "store/out", tokenizer=again) == expected
    assert again.calls == 0
    assert [path.name for path in (interrupted / "store").iterdir()] == ["out"]


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    write_corpus(tmp_path / "text")
    expected = prepared([tmp_path / "text"], tmp_path / "linked")
    monkeypatch.setattr(os, "link", refuse)
    assert prepared([tmp_path / "text"], tmp_path / "copied") == expected


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux's /proc/self/fd")
@pytest.mark.parametrize("links", [True, False])
def test_all_is_on_disk_before_it_is_named_and_the_name_before_the_parts_are_deleted(tmp_path, monkeypatch, links):
    write_corpus(tmp_path / "text")
    (store := tmp_path / "store").mkdir()
    synced, sync = [], os.fsync

    def noted(descriptor):
        synced.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")), bool(list(store.glob(".out.*.tmp")))))
        sync(descriptor)

    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "fsync", noted)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    prepared([tmp_path / "text"], store / "out")
    *files, folder = [path for path, _ in synced if "assembled" in path.parts]
    assert {path.name for path in files} == {path.name for path in (store / "out").iterdir()}
    assert folder.name == "assembled"
    assert synced[-1] == (store, True)


def test_starts_side_by_side_do_the_work_once(tmp_path):
    write_corpus(tmp_path / "text")
    tokenizers = [Numerals() for _ in range(4)]
    with ThreadPoolExecutor(4) as starts:
        how = {"output": tmp_path / "store/out"}
        found = list(starts.map(lambda each: prepared([tmp_path / "text"], tokenizer=each, **how), tokenizers))
    assert all(files == found[0] for files in found)
    assert sum(tokenizer.calls > 0 for tokenizer in tokenizers) == 1
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["out"]


def test_the_cache_is_filled_by_several_processes(tmp_path):
    lines = random_numerals(100)
    text = write_lines(tmp_path / "a.txt", lines)
    how = {"tokenizer": Numerals(), "seq_len": 16, "text_field": "text"}
    folder = prepare_cached([text], cache=tmp_path / "cache", processes=3, **how)
    assert np.array_equal(all_blocks(folder), all_blocks(prepare_cached([text], cache=tmp_path / "other", **how)))


# Faults


class Dies(Numerals):
    """Its process is killed at a document."""

    def encode(self, documents):
        if any("77777" in document for document in documents):
            os.kill(os.getpid(), 9)
        return super().encode(documents)


def test_a_process_that_is_killed_ends_the_preparation_with_what_to_do(tmp_path):
    text = write_lines(tmp_path / "a.txt", [*random_numerals(2000), "77777"])
    with pytest.raises(DataError, match=r"was killed \(exit code -9.*with fewer --processes"):
        prepared([text], tmp_path / "store/out", tokenizer=Dies(size=80_000), processes=2)
    assert parts_in(working_folder(tmp_path / "store"))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_fault_in_one_part_is_told_by_its_line(tmp_path, processes):
    records = [json.dumps({"text": line}) for line in random_numerals(1000)]
    records[700] = "{"
    text = write_lines(tmp_path / "a.jsonl", records)
    with pytest.raises(DataError, match=r"a\.jsonl, line 701: not JSON"):
        prepared([text], tmp_path / "out", processes=processes)


class Broken(Numerals):
    def encode(self, documents):
        raise ZeroDivisionError("a fault of ours")


def test_a_fault_of_ours_in_a_process_is_told_with_where_it_was(tmp_path):
    text = write_lines(tmp_path / "a.txt", random_numerals(1000))
    with pytest.raises(RuntimeError, match=r"(?s)in encode.*ZeroDivisionError: a fault of ours"):
        prepared([text], tmp_path / "store/out", tokenizer=Broken(), processes=2)
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("wrong", [{"min_characters": -1}, {"part_bytes": 0}])
def test_options_out_of_range_are_refused(tmp_path, wrong):
    text = write_lines(tmp_path / "a.txt", random_numerals(10))
    with pytest.raises(ConfigError, match="needed 0 or more characters, and parts of a byte or more"):
        prepared([text], tmp_path / "out", **wrong)


# Cleaning and report


def test_short_documents_are_left_out_and_counted(tmp_path):
    text = write_lines(tmp_path / "a.txt", ["10 11", "10 11 12 13 14 15", "20", "20 21 22 23 24 25"])
    made = prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=9, min_characters=6)
    assert all_blocks(tmp_path / "out").tolist() == [
        [0, 10, 11, 12, 13, 14, 15, 1, 1],
        [0, 20, 21, 22, 23, 24, 25, 1, 1],
    ]
    assert made.dropped == {"tokens_at_the_end": 0, "blocks_of_special_tokens": 0, "short_documents": 2}
    assert made.options == {"text_field": "text", "min_characters": 6}
    other = prepare([text], tokenizer=Numerals(), output=tmp_path / "all", seq_len=9)
    assert other.content != made.content


def test_the_reports_figures_are_those_counted_by_hand(tmp_path):
    text = write_lines(tmp_path / "a.txt", ["10 11 12", "13 10", "", "3 16 17 10 19", "7"])
    prepare([text], tokenizer=Numerals(), output=tmp_path / "out", seq_len=8, min_characters=2)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["documents"] == 3
    assert report["words"] == report["tokens"] == 10
    assert report["tokens_per_word"] == 1.0
    assert report["unknown_share"] == 0.1
    assert (report["blocks"], report["seq_len"], report["parts"]) == (2, 8, 1)
    assert report["dropped"] == {"tokens_at_the_end": 1, "blocks_of_special_tokens": 0, "short_documents": 1}
    assert report["lengths"] == {
        "mean": 3.33,
        "50%": 3,
        **dict.fromkeys(("shortest", "1%", "5%", "25%"), 2),
        **dict.fromkeys(("75%", "95%", "99%", "longest"), 5),
    }
    # 10 11 12 </s> 13 10 | </s> 3 16 17 10 19; what is special (3 is <unk>) does not count.
    assert report["frequent_tokens"][0] == ["10", 3]
    assert sorted(report["frequent_tokens"][1:]) == [["11", 1], ["12", 1], ["13", 1], ["16", 1], ["17", 1], ["19", 1]]
    assert report["text_megabytes"] == round((8 + 5 + 13) / 1e6, 3)
    assert report["seconds"] > 0
    table = (tmp_path / "out/report.md").read_text()
    assert "| tokens a word | 1.000 |" in table
    assert "| unknown tokens | 10.0000% |" in table
    assert "| `10` | 3 |" in table


def test_the_report_is_the_same_for_several_processes_but_for_times(tmp_path):
    write_corpus(tmp_path / "text")
    for processes in (1, 3):
        prepared([tmp_path / "text"], tmp_path / str(processes), processes=processes)
    one, three = (json.loads((tmp_path / name / "report.json").read_text()) for name in "13")
    timed = {"seconds", "megabytes_per_second"}
    assert {name: value for name, value in one.items() if name not in timed} == {
        name: value for name, value in three.items() if name not in timed
    }


def test_length_quantiles_are_the_least_lengths_that_the_share_does_not_exceed():
    lengths = np.zeros(301, dtype=np.int64)
    lengths[[0, 1, 100, 200, 300]] = 50, 1, 49, 49, 1
    found = length_quantiles(lengths)
    assert found["shortest"] == found["1%"] == 1
    assert found["5%"] == found["50%"] == 100
    assert found["75%"] == found["99%"] == 200
    assert found["longest"] == 300
    assert found["mean"] == (1 + 4900 + 9800 + 300) / 100
    assert length_quantiles(np.array([7])) == {}


# Ranks


def a_world(rank, size, port, *, local_size=0):
    return World("env", rank, size, rank, local_size or size, "127.0.0.1", port)


@pytest.fixture
def port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_a_rank_that_does_not_come_is_named(port):
    crew = RanksCrew(a_world(0, 2, port), silence_seconds=0.1, meeting_seconds=2)
    started = time.monotonic()
    with pytest.raises(DataError, match="rank 1 has not come within"):
        crew.gather("facts", 1)
    assert 1.5 < time.monotonic() - started < 10
    crew._left.set()


def test_rank_zero_waits_longer_for_a_rank_to_come_than_for_one_that_was_there(port):
    crew = RanksCrew(a_world(0, 2, port), silence_seconds=1.5, meeting_seconds=60)
    with_rank_one(port, "import time; time.sleep(2.5)", "crew.gather('facts', 'here'); time.sleep(1)", "os._exit(0)")
    assert crew.gather("facts", "zero") == ["zero", "here"]
    with pytest.raises(DataError, match="rank 1 is gone: no sign of life for"):
        crew.gather("more", 1)
    crew._left.set()


def test_where_rank_zero_is_not_met_both_causes_are_told(port):
    with pytest.raises(LaunchError, match=r"Rank 0 has not come within 1 s.*Or the port is taken: set MASTER_PORT"):
        RanksCrew(a_world(1, 2, port), meeting_seconds=1)


RANK_ONE = """
import os, sys, time
{before}
from distilcb.data.crew import RanksCrew
from distilcb.launcher import World
crew = RanksCrew(World("env", 1, 2, 1, 2, "127.0.0.1", {port}), silence_seconds={silence})
{then}
"""


def with_rank_one(port, before, *then, silence=3):
    """Starts rank one in a process of its own."""
    program = RANK_ONE.format(port=port, before=before, then="\n".join(then), silence=silence)
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)


HOST = """
import sys, time
from distilcb.data.crew import RanksCrew
from distilcb.launcher import World
crew = RanksCrew(World("env", 0, 2, 0, 2, "127.0.0.1", int(sys.argv[1])))
print("there", flush=True)
time.sleep(60)
"""


def test_a_rank_notices_that_rank_zero_is_killed(port):
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(port)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert host.stdout.readline() == b"there\n"
        crew = RanksCrew(a_world(1, 2, port), silence_seconds=5)
        threading.Timer(1, host.kill).start()
        with pytest.raises(DataError, match=r"the ranks have lost each other|rank 0 is gone"):
            crew.from_main("plan", lambda: None)
        crew._left.set()
    finally:
        host.kill()
        host.wait()


@pytest.fixture
def rank_zero(port):
    """Its process, which waits."""
    host = subprocess.Popen([sys.executable, "-c", HOST, str(port)], cwd=REPOSITORY, stdout=subprocess.PIPE)
    assert host.stdout.readline() == b"there\n"
    yield host
    host.kill()
    host.wait()


def wait_until_it_beats(port):
    from torch.distributed import PrefixStore, TCPStore

    store = PrefixStore("prepare/0", TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False))
    while store.add("beat/1", 0) < 2:
        time.sleep(0.05)


def test_a_rank_ends_where_rank_zero_stands_still(port, rank_zero):
    one = with_rank_one(port, "", "crew.from_main('plan', lambda: None)")
    wait_until_it_beats(port)
    os.kill(rank_zero.pid, signal.SIGSTOP)
    _, said = one.communicate(timeout=30)
    assert one.returncode == 2
    assert "[rank 1] DataError: rank 0 at 127.0.0.1 does not answer for" in said
    assert "Traceback" not in said


SOON = "import distilcb.data.crew; distilcb.data.crew._RANK_ZERO_SPEAKS_FIRST_SECONDS = 0.1"


def test_a_fault_of_ours_on_another_rank_is_told_with_where_it_was(port, rank_zero):
    one = with_rank_one(port, f"{SOON}\ndef divide(): 1 / 0", "with crew: divide()")
    _, said = one.communicate(timeout=30)
    assert one.returncode == 2
    assert "[rank 1] Traceback" in said
    assert "in divide" in said


def test_a_mistake_of_the_users_on_another_rank_is_told_without(port, rank_zero):
    one = with_rank_one(port, f"{SOON}\nfrom distilcb.errors import DataError", "with crew: raise DataError('no text')")
    _, said = one.communicate(timeout=30)
    assert one.returncode == 2
    assert said == "[rank 1] DataError: no text\n"


def test_a_rank_that_was_suspended_itself_goes_on(port, rank_zero):
    one = with_rank_one(port, "", "time.sleep(14); os._exit(0)", silence=6)
    wait_until_it_beats(port)
    os.kill(one.pid, signal.SIGSTOP)
    time.sleep(8)
    os.kill(one.pid, signal.SIGCONT)
    _, said = one.communicate(timeout=30)
    assert one.returncode == 0, said


@pytest.mark.parametrize(
    ("environ", "local_size", "cores"),
    [
        ({}, 1, 8),
        ({}, 4, 2),
        ({}, 3, 2),
        ({}, 99, 1),
        ({"SLURM_CPUS_PER_TASK": "6"}, 4, 6),
        ({"SLURM_CPUS_PER_TASK": "40"}, 1, 8),
    ],
)
def test_ranks_of_a_machine_share_its_cores(monkeypatch, environ, local_size, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores_of_rank(a_world(0, 99, 1, local_size=local_size), environ) == cores


def test_a_rank_that_is_bound_to_cores_takes_them_all(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5})
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cores_of_rank(a_world(0, 4, 1), {}) == 2


def test_progress_tells_rate_and_time_left():
    from distilcb.data.crew import Crew

    with Progress(Crew(), what="preparing", total_bytes=10_000_000, shown=False) as progress:
        assert progress.line(4_000_000, 2.0) == "preparing: 4 of 10 MB, 2.0 MB/s, 00:03 left"


def test_blocks_of_many_files_are_read_as_one(tmp_path):
    write_corpus(tmp_path / "text")
    prepared([tmp_path / "text"], tmp_path / "out")
    blocks = Blocks(tmp_path / "out")
    assert len(blocks) == read_description(tmp_path / "out").blocks > 100
    shuffled = np.random.default_rng(0).permutation(len(blocks))
    assert np.array_equal(blocks.read(shuffled), all_blocks(tmp_path / "out")[shuffled])
