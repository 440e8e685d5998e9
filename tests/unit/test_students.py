"""Several recipes for one start: what they may differ in, and what each becomes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distilcb.command_line import parse_command_line, parse_command_lines
from distilcb.config import FREE_AMONG_STUDENTS, Config, flatten
from distilcb.errors import ConfigError
from distilcb.train import loop

SHARED = {
    "teacher.model": "another",
    "teacher.allow_pickle": True,
    "data.train": ["other.txt"],
    "data.heldout": ["other.txt"],
    "data.seq_len": 64,
    "data.language_exponent": 0.5,
    "data.fraction": 0.5,
    "data.tokenizer": "another",
    "data.text_field": "body",
    "data.workers": 0,
    "data.cache": "elsewhere",
    "masking.rate": 0.2,
    "masking.mask_share": 0.7,
    "masking.random_share": 0.2,
    "masking.smoothing": 0.0,
    "masking.whole_word": True,
    "optim.global_batch": 64,
    "optim.micro_batch": 4,
    "train.steps": 99,
    "train.seed": 1,
    "train.compile": True,
    "train.stall_minutes": 5.0,
    "deepspeed": "zero2_cpu",
}
FREE = {
    "student.num_layers": 3,
    "student.init_layers": "first_of_pairs",
    "student.dropout": 0.2,
    "student.architecture": "distilbert",
    "loss.kl": 0.0,
    "loss.temperature": 3.0,
    "loss.kl_positions": "masked",
    "optim.lr": 1e-4,
    "optim.betas": [0.9, 0.999],
    "optim.name": "lamb",
    "optim.clip": 0.0,
    "train.log_every": 7,
    "train.save_every": 7,
    "train.eval_every": 7,
    "train.keep_checkpoints": 5,
    "train.activation_checkpointing": True,
    "data.sample_sentences": [],
}


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """Writes a.yaml with no settings but texts, and b.yaml with these besides; gives the words that name them."""
    monkeypatch.chdir(tmp_path)

    def write(**settings):
        for name, more in (("a", {}), ("b", settings)):
            tree = {"data": {"train": ["some.txt", "more.txt"]}}
            for dotted, value in more.items():
                *section, setting = dotted.split(".")
                (tree.setdefault(section[0], {}) if section else tree)[setting] = value
            Path(f"{name}.yaml").write_text(yaml.safe_dump(tree))
        return ["--students", "a.yaml", "b.yaml"]

    return write


def refusal(words):
    with pytest.raises(ConfigError) as caught:
        parse_command_lines(words)
    return str(caught.value)


def test_each_student_has_its_own_recipe_and_a_run_folder_of_its_name(recipes, tmp_path):
    commands = parse_command_lines(recipes(**{"student.num_layers": 2}))
    assert [command.run_dir for command in commands] == [tmp_path / "runs" / "a", tmp_path / "runs" / "b"]
    assert [command.recipe for command in commands] == [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    assert [command.config.student.num_layers for command in commands] == [None, 2]


def test_a_run_dir_is_the_folder_above_those_of_the_students(recipes, tmp_path):
    commands = parse_command_lines([*recipes(), "--run_dir", "out", "--fresh"])
    assert [command.run_dir for command in commands] == [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    assert all(command.fresh for command in commands)


def test_an_override_holds_for_every_student(recipes):
    commands = parse_command_lines([*recipes(**{"optim.lr": 1e-4}), "--optim.lr", "0.002", "--train.steps", "9"])
    assert [(each.config.optim.lr, each.config.train.steps) for each in commands] == [(0.002, 9)] * 2


def test_without_students_there_is_the_one_of_the_recipe(recipes):
    recipes()
    words = ["--recipe", "a.yaml", "--optim.lr", "0.002"]
    assert parse_command_lines(words) == [parse_command_line(words)]


@pytest.mark.parametrize("name", SHARED)
def test_students_that_differ_in_what_they_share_are_refused_by_setting_and_files(recipes, name):
    told = refusal(recipes(**{name: SHARED[name]}))
    (line,) = [line for line in told.splitlines() if f"{name}:" in line]
    assert "in a.yaml" in line
    assert f"{SHARED[name]!r} in b.yaml" in line
    assert f"--{name} VALUE" in line


@pytest.mark.parametrize("name", FREE)
def test_students_may_differ_in_what_is_their_own(recipes, name):
    one, two = (flatten(command.config) for command in parse_command_lines(recipes(**{name: FREE[name]})))
    assert one.pop(name) != two.pop(name)
    assert one == two


def test_every_setting_is_either_shared_or_free():
    sections = {name for name in FREE_AMONG_STUDENTS if "." not in name}
    free = {name for name in flatten(Config()) if name in FREE_AMONG_STUDENTS or name.split(".")[0] in sections}
    assert set(flatten(Config())) - free == set(SHARED)
    assert {name for name in FREE_AMONG_STUDENTS if "." in name} <= free
    assert set(FREE) <= free


def test_all_that_differs_is_told_at_once(recipes):
    told = refusal(recipes(**{"train.seed": 1, "data.seq_len": 64, "optim.lr": 1e-4}))
    assert "train.seed: 0 in a.yaml, 1 in b.yaml" in told
    assert "data.seq_len: 512 in a.yaml, 64 in b.yaml" in told
    assert "optim.lr" not in told


def test_an_override_makes_equal_what_differs(recipes):
    words = recipes(**{"train.seed": 1})
    assert [command.config.train.seed for command in parse_command_lines([*words, "--train.seed", "3"])] == [3, 3]


def test_a_fault_is_told_with_its_file(recipes):
    told = refusal(recipes(**{"optim.learning_rate": 1.0}))
    assert "b.yaml: unknown setting optim.learning_rate" in told
    assert "a.yaml" not in told


def test_a_faulty_override_is_told_once(recipes):
    told = refusal([*recipes(), "--optim.lr", "-1"])
    assert told.count("optim.lr") == 1
    assert "a.yaml, b.yaml: optim.lr" in told


@pytest.mark.parametrize(
    ("settings", "words", "told"),
    [
        ({}, ["--recipe", "a.yaml"], "--recipe a.yaml beside --students"),
        ({}, ["--dry_run"], "--dry_run takes one student"),
        ({}, ["--optim.micro_batch", "auto"], "optim.micro_batch: auto"),
        ({}, ["--xyzzy", "1"], "unknown option --xyzzy"),
        (
            {},
            ["--teacher.model", "null", "--student.init", "m", "--loss.kl", "0", "--loss.cos", "0"],
            "there is no teacher to share",
        ),
    ],
)
def test_what_several_students_cannot_have_is_refused(recipes, settings, words, told):
    assert told in refusal([*recipes(**settings), *words])


def test_two_recipes_of_one_name_are_refused(recipes, tmp_path):
    recipes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.yaml").write_text((tmp_path / "a.yaml").read_text())
    assert "a.yaml, other/a.yaml: one run folder, a, for 2 recipes" in refusal(["--students", "a.yaml", "other/a.yaml"])
    assert "one run folder" in refusal(["--students", "a.yaml", "a.yaml"])


def test_a_recipe_that_is_not_there_is_told(recipes):
    recipes()
    assert "none.yaml" in refusal(["--students", "a.yaml", "none.yaml"])


def test_other_commands_take_one_recipe(recipes):
    with pytest.raises(ConfigError, match=r"--students is launch/train.py's alone"):
        parse_command_line(recipes())


def test_the_configuration_of_each_is_printed_as_a_yaml_document(recipes, capsys):
    with pytest.raises(SystemExit):
        parse_command_lines([*recipes(**{"student.num_layers": 2}), "--print_config"])
    one, two = yaml.safe_load_all(capsys.readouterr().out)
    assert (one["student"]["num_layers"], two["student"]["num_layers"]) == (None, 2)


def test_the_run_folder_that_is_printed_is_done_last(recipes, tmp_path, capsys):
    """A batch file looks there for DONE."""
    words = [*recipes(), "--print_run_dir"]
    shown = []
    for done in ((), ("b",), ("a", "b")):
        for name in done:
            (tmp_path / "runs" / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / "runs" / name / "DONE").touch()
        with pytest.raises(SystemExit):
            parse_command_lines(words)
        shown.append(Path(capsys.readouterr().out.strip()).name)
    assert shown == ["b", "a", "b"]


def test_the_run_dir_that_is_printed_tells_how_far_all_are(recipes, tmp_path, capsys):
    """A batch file looks there for a step that was saved, and for DONE."""

    def printed():
        with pytest.raises(SystemExit):
            parse_command_lines([*recipes(), "--print_run_dir"])
        return Path(capsys.readouterr().out.strip()).name

    for name, step in (("a", 4), ("b", 500)):
        latest = tmp_path / "runs" / name / "checkpoints" / "latest"
        latest.parent.mkdir(parents=True)
        latest.write_text(f"step_{step:08d}\n")
    assert printed() == "a"  # it alone takes steps until it is as far as b
    (tmp_path / "runs" / "a" / "checkpoints" / "latest").write_text("step_00000500\n")
    assert printed() == "b"  # which is finished last
    (tmp_path / "runs" / "b" / "DONE").touch()
    assert printed() == "a"


def test_recipes_named_one_after_the_other_are_all_taken(recipes):
    recipes()
    assert len(parse_command_lines(["--students", "a.yaml", "--students", "b.yaml"])) == 2


def test_two_names_of_one_recipe_have_one_run_folder_and_are_refused(recipes, tmp_path):
    words = recipes()
    (tmp_path / "b.yaml").unlink()
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    assert "one run folder, a, for 2 recipes" in refusal(words)


def test_what_was_trained_is_saved_where_a_stop_comes_in_an_evaluation_that_another_student_owes(monkeypatch):
    """A was behind and has caught up with B, which came from a checkpoint at which it owed its evaluation."""
    stop = SimpleNamespace(asked=None, agreed_after=lambda step: None)
    stop.agreed_now = lambda: stop.asked

    def run(name, step, owes):
        train = SimpleNamespace(steps=100, save_every=50, log_every=100, eval_every=10)
        progress = SimpleNamespace(step=step, owes_evaluation=owes, window=None, seconds=0.0)
        place = SimpleNamespace(device="cpu", world=SimpleNamespace(rank=0, size=1))
        facts = {"name": name, "progress": progress, "config": SimpleNamespace(train=train), "stop": stop}
        facts |= {"place": place, "heldout": True, "saved_step": step, "stepper": name}
        return SimpleNamespace(**facts, writer=None, batches=None, window=None)

    def evaluate(run, *_):
        if run.name == "b":
            stop.asked = "SIGTERM came"
            raise loop.InterruptedEvaluation

    saved = []
    result = SimpleNamespace(sums=0, skipped=0, data_wait_seconds=0.0)
    monkeypatch.setattr(loop, "step_together", lambda steppers, *_: [result for _ in steppers])
    monkeypatch.setattr(loop, "_evaluate", evaluate)
    monkeypatch.setattr(loop, "_save", lambda run: saved.append((run.name, run.progress.step)))
    assert loop._take_steps([run("a", 0, False), run("b", 10, True)]) == "SIGTERM came"
    assert saved == [("a", 10)]
