"""slurm/prepare.sbatch on a real Slurm: nodes share the work, and a lost one costs only what it was at."""

import pytest

from distilcb.config import DEFAULT_RECIPE
from distilcb.data.blocks import Blocks, read_description

MINI = DEFAULT_RECIPE.parent / "mini"
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=60")


def words_for(output, text, *, part_megabytes="0.05"):
    options = ("--tokenizer", MINI / "teacher", "--seq_len", "64", "--part_megabytes", part_megabytes)
    return ("--input", text, "--output", output, *options)


def files_of(folder):
    """Names and bytes, but for the report, which tells times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


@pytest.fixture(scope="module")
def on_one_node(lab):
    """What one task makes of the shipped text."""
    output = lab.shared / "one_node"
    job = lab.submit(*words_for(output, MINI / "text/train"), options=TWO_NODES[1:], script="prepare.sbatch")
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    assert len(read_description(output).files) > 4
    return output


@pytest.mark.parametrize("protocol", ["", "--mpi=pmix"])
def test_two_nodes_make_the_files_that_one_makes(lab, on_one_node, protocol):
    known = lab.run("srun", "--mpi=list", check=False)
    if protocol.partition("=")[2] not in known.stdout + known.stderr:
        pytest.skip(f"this Slurm has no {protocol}")
    output = lab.shared / f"two_nodes{protocol}"
    environ = {"DISTILCB_SRUN": protocol} if protocol else None
    words = words_for(output, MINI / "text/train")
    job = lab.submit(*words, options=TWO_NODES, script="prepare.sbatch", environ=environ)
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    assert files_of(output) == files_of(on_one_node)
    assert job.said().count("blocks: ") == 1


def test_a_mistake_fails_the_job_with_one_message(lab):
    words = words_for(lab.shared / "nothing", lab.shared / "nowhere.txt")
    job = lab.submit(*words, options=TWO_NODES, script="prepare.sbatch")
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"].partition(":")[0]) == ("FAILED", "2"), job.said()
    assert job.said().count("DataError: ") == 1
    assert "nowhere.txt does not exist" in job.said()


def test_a_job_goes_on_after_its_time_limit_and_after_a_kill_with_the_same_line(lab):
    text, output = lab.shared / "long.txt", lab.shared / "resumed"
    words = "".join(path.read_text(encoding="utf-8") for path in sorted((MINI / "text/train").glob("*.txt")))
    text.write_text(words * 60, encoding="utf-8")

    def finished_parts():
        return len(list(lab.shared.glob(".resumed.*.tmp/*.json")))

    first = lab.submit(*words_for(output, text, part_megabytes="0.2"), options=TWO_NODES, script="prepare.sbatch")
    first.wait_until(lambda: finished_parts() >= 2, "two parts are finished")
    lab.run("scancel", "--batch", "--signal=USR1", first.number)
    first.wait_until(lambda: first.facts()["Restarts"] == "1", "it is requeued")
    kept = finished_parts()
    first.wait_until(lambda: finished_parts() > kept, "it has gone on", seconds=180)
    lab.run("scancel", "--signal=KILL", first.number)
    assert first.ended()["JobState"] != "COMPLETED"
    assert "going on from there" in first.said()
    assert not output.exists()
    second = lab.submit(*words_for(output, text, part_megabytes="0.2"), options=TWO_NODES, script="prepare.sbatch")
    assert second.ended()["JobState"] == "COMPLETED", second.said()
    assert "going on from there" in second.said()
    assert len(Blocks(output)) == read_description(output).blocks
