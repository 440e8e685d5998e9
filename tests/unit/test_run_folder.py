"""Who may begin and go on with a run folder."""

from types import SimpleNamespace

import pytest
import torch
import yaml

from distilcb.command_line import CommandLine
from distilcb.config import Config
from distilcb.engine.deepspeed_config import state_layout
from distilcb.errors import CheckpointError
from distilcb.train import build
from distilcb.train.run_folder import RunFolder, RunState

FACTS = {"precision": "fp32", "teacher": "t", "text": {"train": "a"}, "deepspeed": state_layout({})}


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start(tmp_path):
    """Looks into the run folder as a start does, and goes on to take it; each call is another process."""

    def look(*, fresh=False):
        folder = RunFolder(tmp_path / "runs" / "one")
        command = CommandLine(Config(), folder.path, tmp_path / "recipe.yaml", fresh=fresh, dry_run=False, words=())
        state = folder.look(command)

        def begin(facts=FACTS, slurm_job=None):
            folder.begin_or_check(command, state, {"world_size": 1, "slurm_job": slurm_job}, facts)
            return folder

        return state, begin

    return look


def test_of_two_first_starts_at_a_time_the_second_is_refused_and_moves_nothing(start, monkeypatch):
    (one, begin_one), (two, begin_two) = start(), start()
    assert one is two is RunState.NEW
    folder = begin_one()
    monkeypatch.setattr("os.getpid", lambda: 1)  # the lock of another process, which lives
    with pytest.raises(CheckpointError, match="trains there"):
        begin_two()
    monkeypatch.undo()
    assert [path.name for path in folder.path.parent.iterdir()] == ["one"]
    folder.leave()
    with pytest.raises(CheckpointError, match="begun by another start meanwhile"):
        begin_two()
    assert (folder.path / "config.yaml").is_file()


def test_what_a_first_start_leaves_that_is_killed_at_once_is_no_run(start, tmp_path):
    folder = tmp_path / "runs" / "one"
    folder.mkdir(parents=True)
    (folder / ".config.yaml.tmp").write_text("half")
    state, begin = start()
    assert state is RunState.NEW
    begin().leave()
    assert start()[0] is RunState.RESUMED


def test_a_deepspeed_file_that_lays_out_states_otherwise_is_refused(start):
    start()[1]().leave()
    state, begin = start()
    assert state is RunState.RESUMED
    other = state_layout({"zero_optimization": {"stage": 2, "round_robin_gradients": True, "overlap_comm": True}})
    with pytest.raises(CheckpointError, match="DeepSpeed file, round_robin_gradients: False -> True"):
        begin(FACTS | {"deepspeed": other})
    same = state_layout({"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}})
    begin(FACTS | {"deepspeed": same}).leave()


@pytest.mark.parametrize(("began_by", "state"), [("41", RunState.NEW), ("42", RunState.RESUMED)])
def test_fresh_holds_for_a_later_slice_too_unless_its_own_job_made_the_folder(start, monkeypatch, began_by, state):
    start()[1](slurm_job=began_by).leave()
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert start(fresh=True)[0] is state


def test_fresh_keeps_the_run_that_was_there_aside(start):
    folder = start()[1]()
    (folder.path / "DONE").touch()
    folder.leave()
    start(fresh=True)[1]().leave()
    names = sorted(path.name for path in folder.path.parent.iterdir())
    assert names[0] == "one"
    assert (folder.path.parent / names[1] / "DONE").exists()
    assert "provenance" in yaml.safe_load((folder.path / "config.yaml").read_text())


@pytest.mark.parametrize("checkpoint", [None, "one"])
def test_a_start_that_finds_no_checkpoint_is_the_one_that_the_run_comes_from(start, monkeypatch, checkpoint):
    begun = start()[1](slurm_job="7")
    begun.leave()
    before = yaml.safe_load(begun.config.read_text())
    state, _ = start()
    assert state is RunState.RESUMED
    for name in ("check_free_disk", "save_recipe_of_model"):
        monkeypatch.setattr(build, name, lambda *_, **__: None)
    monkeypatch.setattr(build.Checkpoints, "newest_or_none_at_all", lambda _: checkpoint)
    place = SimpleNamespace(world=SimpleNamespace(size=4))
    models = SimpleNamespace(student=torch.nn.Linear(1, 1), tokenizer=SimpleNamespace(hugging_face=None))
    folder = RunFolder(begun.path)
    command = CommandLine(Config(), folder.path, folder.path, fresh=False, dry_run=False, words=())
    build._begin(command, place, folder, state, models, FACTS)
    after = yaml.safe_load(folder.config.read_text())
    assert folder.provenance()["world_size"] == (1 if checkpoint else 4)
    assert folder.provenance()["slurm_job"] == "7"
    assert folder.changed_facts(FACTS) == folder.changed_settings(Config()) == []
    assert (after == before) is bool(checkpoint)
