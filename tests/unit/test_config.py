"""Configuration: defaults < recipe < command line, every fault at once, and a --help that tells all."""

import dataclasses
import json
import os
import random
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distilcb import config as config_module
from distilcb.command_line import parse_command_line
from distilcb.config import (
    REPOSITORY,
    RESULT_NEUTRAL,
    Config,
    DataConfig,
    OptimConfig,
    accumulation_steps,
    cache_folder,
    differences,
    flatten,
    to_plain,
)
from distilcb.errors import ConfigError
from distilcb.recipe import load_recipe, validate

TRAIN = REPOSITORY / "launch" / "train.py"
DEFAULTS = to_plain(Config())
SETTINGS = sorted(flatten(DEFAULTS))


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and give the words that name it. A recipe of no text of its own gets some."""

    def write(content="data: {train: some.txt}\n"):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return ["--recipe", str(path)]

    return write


def faults_of(action):
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def nested(dotted, value):
    """{"optim": {"lr": value}} of "optim.lr"."""
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return value


def merged(*trees):
    """One tree of several, sections joined."""
    result = {}
    for tree in trees:
        for name, value in tree.items():
            result[name] = result.get(name, {}) | value if isinstance(value, dict) else value
    return result


def setting(config, dotted):
    for part in dotted.split("."):
        config = getattr(config, part)
    return config


# --help


class Help:
    """What one `launch/train.py --help` printed, imported and cost."""

    def __init__(self):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-X", "importtime", str(TRAIN), "--help"],
            capture_output=True,
            text=True,
            check=True,
            env=os.environ | {"COLUMNS": "10000"},
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # of the processor, not of the clock: other work on this machine should not fail the test
        self.seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        self.imported = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
        shown = re.findall(r"^  --(\S+) (\S+)\s+(\S.*) \(default: (.*)\)$", done.stdout, flags=re.MULTILINE)
        self.options = {name: (kind, meaning, default) for name, kind, meaning, default in shown}


@pytest.fixture(scope="module")
def shown_help():
    return Help()


def test_help_lists_every_setting_with_type_meaning_and_default(shown_help):
    assert len(SETTINGS) > 40
    for name in SETTINGS:
        assert name in shown_help.options, f"--help does not list --{name} with type, meaning and default"
        kind, meaning, default = shown_help.options[name]
        value = flatten(DEFAULTS)[name]
        expected = {bool: "bool", int: "int", float: "float", list: "[", type(None): "null"}.get(type(value))
        assert (expected or "str") in kind or kind.split("|").count(value) == 1, f"--{name} is shown as {kind}"
        assert len(meaning.split()) > 1, f"--{name} is not explained"
        assert default == (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def test_every_default_that_help_shows_can_be_given_back(shown_help, recipe):
    words = [
        word
        for name in SETTINGS
        for word in (f"--{name}", shown_help.options[name][2])
        if name != "data.train"  # its default, no text, is a fault
    ]
    given = parse_command_line([*recipe(), *words]).config
    assert differences(merged(DEFAULTS, {"data": {"train": ["some.txt"]}}), given) == []


def test_help_answers_at_once_because_torch_is_not_imported(shown_help):
    assert "pydantic" in shown_help.imported
    assert shown_help.imported.isdisjoint({"torch", "deepspeed", "transformers", "datasets"})
    assert shown_help.seconds < 1.5


def test_a_users_mistake_ends_with_one_message_and_exit_code_2():
    done = subprocess.run(
        [sys.executable, str(TRAIN), "--optim.lr", "-1", "--masking.rate", "2"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("ConfigError: 2 faults:")
    assert "optim.lr" in done.stderr
    assert "masking.rate" in done.stderr
    assert "Traceback" not in done.stderr


# where values come from


def test_command_line_beats_recipe_and_recipe_beats_defaults(recipe):
    words = recipe("data: {train: t.txt}\noptim: {lr: 1.0e-3, eps: 1.0e-7}\n")
    config = parse_command_line([*words, "--optim.lr", "2e-3"]).config
    assert (config.optim.lr, config.optim.eps) == (2e-3, 1e-7)
    assert config.optim.global_batch == OptimConfig().global_batch


@pytest.mark.parametrize("empty", ["", "# nothing\n", "optim:\n", "optim: {}\n"])
def test_a_recipe_that_says_nothing_gives_the_defaults(recipe, empty):
    assert load_recipe(Path(recipe(empty)[1])) == Config()


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("optim.lr", "5e-4", 5e-4),
        ("optim.lr", "3", 3.0),
        ("optim.eps", "1E-8", 1e-8),
        ("optim.betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("optim.schedule", "cosine", "cosine"),
        ("train.steps", "12", 12),
        ("student.init_layers", "[0,2,4]", (0, 2, 4)),
        ("student.num_layers", "null", None),
        ("student.dropout", "0", 0.0),
        ("student.freeze_position_embeddings", "true", True),
        ("student.freeze_position_embeddings", "false", False),
        ("masking.whole_word", "True", True),
        ("data.tokenizer", "null", None),
        ("data.tokenizer", "012", "012"),
        ("data.text_field", "yes", "yes"),
        ("data.text_field", "null", "null"),
        ("data.train", "a.txt", ("a.txt",)),
        ("data.train", "a.txt,b/*.jsonl,c", ("a.txt", "b/*.jsonl", "c")),
        ("data.train", "[a.txt, 'b,c.txt']", ("a.txt", "b,c.txt")),
        ("data.train", "[ab]*.txt", ("[ab]*.txt",)),
        ("data.heldout", "[]", ()),
        ("data.sample_sentences", "['Un <mask>, deux.']", ("Un <mask>, deux.",)),
        ("deepspeed", "zero2_bf16", "zero2_bf16"),
    ],
)
def test_a_value_on_the_command_line_is_read_as_its_setting_needs(recipe, name, text, value):
    for words in ([f"--{name}", text], [f"--{name}={text}"]):
        found = setting(parse_command_line([*recipe(), *words]).config, name)
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("written", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_a_rate_in_a_recipe_is_a_number_however_it_is_written(recipe, written):
    assert load_recipe(Path(recipe(f"optim: {{lr: {written}}}")[1])).optim.lr == 5e-4


def test_recipe_dir_stands_for_the_recipes_folder(recipe, tmp_path):
    config = load_recipe(Path(recipe('data: {train: ["{recipe_dir}/a", b]}')[1]))
    assert config.data.train == (f"{tmp_path}/a", "b")


def test_what_concerns_this_start_only_is_no_part_of_the_configuration(recipe, tmp_path):
    plain = parse_command_line(recipe())
    words = [*recipe(), "--fresh", "--dry_run", "--run_dir", str(tmp_path / "run"), "--local_rank=3"]
    command = parse_command_line(words)
    assert command.config == plain.config
    assert (command.fresh, command.dry_run, command.run_dir) == (True, True, tmp_path / "run")
    assert (plain.fresh, plain.dry_run) == (False, False)
    assert plain.run_dir == Path.cwd() / "runs" / "recipe"
    assert command.words == tuple(words)


def test_print_config_prints_yaml_that_loads_back_to_the_same_config(recipe, capsys, tmp_path):
    words = [
        *recipe('data: {train: "{recipe_dir}/é, à.txt"}\nstudent: {init_layers: [0, 3]}'),
        *("--optim.lr", "1e-5", "--data.text_field", "no", "--teacher.model", "007", "--optim.betas", "[0.8,0.9]"),
    ]
    with pytest.raises(SystemExit) as ended:
        parse_command_line([*words, "--print_config"])
    assert ended.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    config = parse_command_line(words).config
    assert load_recipe(printed) == config
    assert set(flatten(yaml.safe_load(printed.read_text(encoding="utf-8")))) == set(SETTINGS)


def test_a_plain_configuration_is_json_and_validates_to_itself():
    config = validate({"student": {"init_layers": [0, 5]}, "data": {"train": ["a", "b"]}})
    assert validate(json.loads(json.dumps(to_plain(config)))) == config


def test_a_run_folders_config_serves_as_a_recipe(tmp_path, recipe):
    config = parse_command_line([*recipe(), "--train.seed", "7"]).config
    saved = tmp_path / "config.yaml"
    document = to_plain(config) | {"provenance": {"versions": {"torch": "2"}, "command_line": "x"}}
    saved.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    assert load_recipe(saved) == config
    assert parse_command_line(["--recipe", str(saved)]).config == config


# names that nobody knows


def misspelled(name):
    return name[:-2] + name[-1]  # its last letter but one is lost


def test_a_misspelled_option_names_the_one_that_was_meant(recipe):
    told = faults_of(lambda: parse_command_line([*recipe(), *(f"--{misspelled(name)}=1" for name in SETTINGS)]))
    for name in SETTINGS:
        assert f"unknown option --{misspelled(name)}: did you mean --{name}?" in told


def test_a_misspelled_key_of_a_recipe_names_the_one_that_was_meant():
    wrong = [name for name in SETTINGS if "." in name]
    told = faults_of(lambda: validate(merged(*(nested(misspelled(name), 1) for name in wrong))))
    for name in wrong:
        assert f"unknown setting {misspelled(name)}: did you mean {name}?" in told


@pytest.mark.parametrize("name", [name for name in SETTINGS if "." in name])
def test_a_key_in_the_wrong_place_names_the_right_one(name):
    last = name.split(".")[-1]
    wrong = [last, *(f"{section}.{last}" for section in DEFAULTS if isinstance(DEFAULTS[section], dict))]
    for misplaced in set(wrong) - set(SETTINGS) - set(DEFAULTS):
        assert faults_of(lambda key=misplaced: validate(nested(key, 1))).endswith(f"did you mean {name}?")


@pytest.mark.parametrize(
    ("section", "meant"), [("optimizer", "optim"), ("losses", "loss"), ("deep_speed", "deepspeed")]
)
def test_a_misspelled_section_names_the_one_that_was_meant(section, meant):
    assert f"did you mean {meant}?" in faults_of(lambda: validate({section: {"lr": 1}}))


@pytest.mark.parametrize(
    ("word", "meant"), [("--dryrun", "--dry_run"), ("--lr", "--optim.lr"), ("--rundir=x", "--run_dir")]
)
def test_misspelled_options_of_the_start_are_unknown_too(recipe, word, meant):
    assert f"did you mean {meant}?" in faults_of(lambda: parse_command_line([*recipe(), word]))


def test_a_name_like_none_points_to_help(recipe):
    assert "--help" in faults_of(lambda: parse_command_line([*recipe(), "--xyzzy", "1"]))


def test_options_are_not_abbreviated(recipe):
    assert "unknown option --optim.l:" in faults_of(lambda: parse_command_line([*recipe(), "--optim.l", "1"]))


def test_a_stray_word_is_a_fault(recipe):
    assert "'stray'" in faults_of(lambda: parse_command_line([*recipe(), "stray"]))


@pytest.mark.parametrize("words", [["--optim.lr"], ["--optim.lr", "--fresh"], ["--fresh=yes"], ["--recipe"]])
def test_an_option_without_its_value_is_a_users_fault(words):
    assert words[0].split("=")[0] in faults_of(lambda: parse_command_line(words))


# recipes that cannot be read


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("optim: {lr: 1.0}\ndata: {}\noptim: {lr: 2.0}\n", "['optim'] written twice"),
        ("optim:\n  lr: 1.0\n  lr: 2.0\n", "['lr'] written twice"),
        ("? [a]\n: 1\n? [a]\n: 2\n", "written twice"),
        ("optim: [lr\n", "not readable as YAML"),
        ("optim:\n\tlr: 1\n", "not readable as YAML"),
        ("- optim\n", "came list"),
        ("word\n", "came str"),
        ("optim: 5\n", "optim=5"),
        ("optim: [lr]\n", "optim=['lr']"),
        ("deepspeed:\n", "deepspeed=None"),
        ("1: 2\n", "1"),
        ("!!python/object/apply:os.getcwd []\n", "not readable as YAML"),
    ],
)
def test_a_recipe_that_is_none_is_a_fault(recipe, content, told):
    assert told in faults_of(lambda: load_recipe(Path(recipe(content)[1])))
    assert told in faults_of(lambda: parse_command_line([*recipe(content), "--optim.eps", "1e-7"]))


def test_a_recipe_that_is_not_there_or_not_text_is_a_fault(tmp_path):
    assert "absent.yaml" in faults_of(lambda: load_recipe(tmp_path / "absent.yaml"))
    assert str(tmp_path) in faults_of(lambda: load_recipe(tmp_path))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("teacher: {model: été}".encode("latin-1"))
    assert "latin.yaml" in faults_of(lambda: load_recipe(latin))


# faults


def test_several_faults_are_reported_together(recipe):
    words = recipe("data: {train: t}\noptim: {lr: -1, learning: 2}\nloss: {kl: many}\ntrainer: {}\n")
    told = faults_of(lambda: parse_command_line([*words, "--train.steps", "0", "--fersh", "--masking.rate=0.9"]))
    assert told.startswith("7 faults:")
    for part in (
        "optim.lr=-1",
        "optim.learning",
        "loss.kl='many'",
        "trainer",
        "train.steps=0",
        "fersh",
        "masking.rate",
    ):
        assert part in told
    assert len(told.splitlines()) == 8


def test_faults_between_settings_are_reported_together():
    tree = {
        "loss": {"kl": 0, "mlm": 1, "cos": 0, "clm": 1},
        "masking": {"mask_share": 0.9, "random_share": 0.2},
        "student": {"init_layers": [0, 1], "num_layers": 3},
    }
    told = faults_of(lambda: validate(tree))
    assert told.startswith("3 faults:")
    for part in ("loss.mlm=1.0 and loss.clm=1.0", "masking.mask_share=0.9", "student.num_layers=3"):
        assert part in told


def test_one_fault_is_told_without_a_count():
    assert faults_of(lambda: validate({"optim": {"lr": 0}})).startswith("optim.lr=0: ")


OUT_OF_RANGE = {
    "student.num_layers": [0, -1, 1.5],
    "student.init_layers": [[-1], [0, 1.5], 3],
    "student.dropout": [-0.1, 1.0, 1.5],
    "data.seq_len": [7, 0, -512],
    "data.language_exponent": [-0.1, 1.01],
    "data.fraction": [0.0, 1.01, -1],
    "data.workers": [-1, 0.5],
    "masking.rate": [0.0, 0.51, -0.15],
    "masking.mask_share": [-0.1, 1.1],
    "masking.random_share": [-0.1, 1.1],
    "masking.smoothing": [-0.1],
    "loss.kl": [-0.1],
    "loss.mlm": [-0.1],
    "loss.clm": [-0.1],
    "loss.cos": [-0.1],
    "loss.mse": [-0.1],
    "loss.relation": [-0.1],
    "loss.relation_layer": [0, 1.5],
    "loss.relation_heads": [0, 1.5],
    "loss.kl_until": [0.0, 1.1],
    "loss.temperature": [0.0, -2],
    "optim.global_batch": [0, -8, 1.5],
    "optim.micro_batch": [0, -8, 1.5],
    "optim.lr": [0.0, -1e-4],
    "optim.warmup": [-0.01],
    "optim.betas": [[-0.1, 0.9], [0.9, 1.0], [0.9], [0.9, 0.9, 0.9], 0.9],
    "optim.eps": [0.0, -1e-8],
    "optim.weight_decay": [-0.01],
    "optim.clip": [-1],
    "train.steps": [0, -1, 1.5],
    "train.log_every": [0, -1],
    "train.eval_every": [-1, 0.5],
    "train.eval_maskings": [1, 0],
    "train.save_every": [-1, 0.5],
    "train.keep_checkpoints": [0, -1],
    "train.stall_minutes": [0, -1.0],
    "train.seed": [-1, 2**63, 0.5],
}


def test_the_table_of_ranges_holds_every_number(shown_help):
    numbers = {name for name, (kind, *_) in shown_help.options.items() if re.match(r"\[?(int|float)", kind)}
    assert set(OUT_OF_RANGE) == numbers


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(name, recipe):
    no_numbers = [float("nan"), float("inf"), "many", True]
    for value in [*OUT_OF_RANGE[name], *no_numbers]:
        assert f"{name}" in faults_of(lambda value=value: validate(nested(name, value))), value
    for value in OUT_OF_RANGE[name]:
        words = [*recipe(), f"--{name}={json.dumps(value)}"]
        assert f"{name}" in faults_of(lambda words=words: parse_command_line(words)), value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("masking.rate", 0.5),
        ("student.dropout", 0.0),
        ("data.fraction", 1.0),
        ("data.language_exponent", 0.0),
        ("data.language_exponent", 1.0),
        ("data.workers", 0),
        ("masking.smoothing", 0.0),
        ("optim.clip", 0.0),
        ("optim.warmup", 0.0),
        ("optim.warmup", 1000),
        ("train.seed", 2**63 - 1),
        ("train.eval_every", 0),
        ("train.save_every", 0),
    ],
)
def test_a_number_at_the_edge_of_its_range_is_taken(name, value):
    assert setting(validate(nested(name, value)), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optim.name", "sgd"),
        ("optim.schedule", "step"),
        ("loss.kl_positions", "all"),
        ("teacher.allow_pickle", "perhaps"),
        ("teacher.model", True),
        ("data.train", 5),
        ("data.sample_sentences", "not a list"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, value):
    assert name in faults_of(lambda: validate(nested(name, value)))


STUDENT_ALONE = {
    "teacher": {"model": None},
    "student": {"init": "a_folder"},
    "loss": {"kl": 0, "cos": 0, "mse": 0, "mlm": 1},
}


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"loss": {"kl": 0, "mlm": 0, "cos": 0}}, ["loss", "every weight is 0"]),
        ({"loss": {"relation": 1}, "train": {"compile": True}}, ["loss.relation=1 and train.compile"]),
        (
            {"loss": {"relation": 1}, "train": {"activation_checkpointing": True}},
            ["loss.relation=1 and train.activation_checkpointing"],
        ),
        ({"loss": {"mlm": 0, "cos": 0, "kl_until": 0.5}}, ["loss.kl_until=0.5", "Give loss.mlm one"]),
        ({"loss": {"clm": 0.1}}, ["loss.mlm=0.2 and loss.clm=0.1", "Set one to 0"]),
        ({"loss": {"kl": 0, "mlm": 0, "cos": 0}}, ["every weight is 0"]),
        (merged(STUDENT_ALONE, {"loss": {"kl": 1}}), ["teacher.model", "loss.kl"]),
        (merged(STUDENT_ALONE, {"loss": {"cos": 1}}), ["teacher.model", "loss.cos"]),
        (merged(STUDENT_ALONE, {"loss": {"mse": 1}}), ["teacher.model", "loss.mse"]),
        (merged(STUDENT_ALONE, {"student": {"init": "teacher"}}), ["teacher.model", "student.init"]),
        (merged(STUDENT_ALONE, {"student": {"init": "random"}}), ["student.config", "data.tokenizer"]),
        (
            merged(STUDENT_ALONE, {"student": {"init": "random", "config": "c.json"}}),
            ["student.config", "data.tokenizer"],
        ),
        ({"masking": {"mask_share": 0.95}}, ["masking.mask_share=0.95", "masking.random_share=0.1"]),
        (
            {"data": {"language_exponent": 0.7, "train": ["all.txt"]}},
            ["data.language_exponent=0.7", "names one text, all.txt", "--data.language_exponent null"],
        ),
        (
            {"data": {"language_exponent": 1, "train": ["fr", "de", "fr"]}},
            ["data.train names fr twice", "Name each once"],
        ),
        ({"student": {"init_layers": [0, 2, 4], "num_layers": 2}}, ["student.init_layers", "student.num_layers=2"]),
    ],
)
def test_settings_that_contradict_each_other_are_named(tree, named):
    told = faults_of(lambda: validate(tree))
    assert "faults:" not in told
    for part in named:
        assert part in told


@pytest.mark.parametrize(
    "tree",
    [
        STUDENT_ALONE,
        merged(STUDENT_ALONE, {"student": {"init": "random", "config": "c.json"}, "data": {"tokenizer": "t"}}),
        {"masking": {"mask_share": 0.9, "random_share": 0.1}},
        {"masking": {"mask_share": 0.7, "random_share": 0.3}},
        {"student": {"init_layers": [0, 2, 4], "num_layers": 3}},
        {"student": {"init_layers": [0, 2, 4]}},
        {"data": {"language_exponent": 0.7, "train": ["fr", "de"]}},
        {"data": {"language_exponent": 0.7}},
        {"data": {"train": ["fr", "fr"]}},
        {"loss": {"kl": 0, "mlm": 0, "cos": 0, "mse": 1}},
    ],
)
def test_settings_that_agree_are_taken(tree):
    assert isinstance(validate(tree), Config)


def test_training_on_no_text_is_a_fault(recipe):
    for content in ("", "optim: {lr: 1}", "data: {train: []}", "data: {train:}"):
        assert "data.train" in faults_of(lambda content=content: parse_command_line(recipe(content)))


# derived


def test_accumulation_times_ranks_times_micro_batch_is_the_global_batch():
    assert accumulation_steps(OptimConfig(global_batch=4096, micro_batch=8), 4) == 128
    assert accumulation_steps(OptimConfig(global_batch=32, micro_batch=32), 1) == 1


def test_sizes_that_do_not_divide_name_the_nearest_that_do():
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        optim = OptimConfig(global_batch=draw.randint(1, 400), micro_batch=draw.randint(1, 20))
        ranks = draw.randint(1, 12)
        per_pass = ranks * optim.micro_batch
        if optim.global_batch % per_pass == 0:
            assert accumulation_steps(optim, ranks) * per_pass == optim.global_batch
            continue
        refused += 1
        told = faults_of(lambda optim=optim, ranks=ranks: accumulation_steps(optim, ranks))
        assert f"optim.global_batch={optim.global_batch}" in told
        assert f"optim.micro_batch={optim.micro_batch}" in told
        named = [int(size) for size in re.findall(r"\d+", told.split("--optim.global_batch")[1])]
        # those within one pass of what was asked, on either side, and no batch of 0
        near = [n for n in range(1, 1000) if n % per_pass == 0 and abs(n - optim.global_batch) < per_pass]
        assert named == near
        for size in named:
            assert accumulation_steps(dataclasses.replace(optim, global_batch=size), ranks) * per_pass == size
    assert refused > 100


def test_a_setting_of_several_types_names_them_once():
    told = faults_of(lambda: validate({"optim": {"micro_batch": "automatic"}}))
    assert told == "optim.micro_batch='automatic': needed int|auto"


def test_a_batch_that_does_not_divide_names_first_the_micro_batch_that_fits():
    """A run that goes on may change it, and not the global batch."""
    told = faults_of(lambda: accumulation_steps(OptimConfig(global_batch=24, micro_batch=8), 2))
    assert told.endswith("Use --optim.micro_batch 6; in a new run also --optim.global_batch 16 or 32.")
    draw = random.Random(1)
    fitted = 0
    for _ in range(300):
        optim = OptimConfig(global_batch=draw.randint(1, 400), micro_batch=draw.randint(1, 20))
        ranks = draw.randint(1, 12)
        if optim.global_batch % (ranks * optim.micro_batch) == 0:
            continue
        told = faults_of(lambda optim=optim, ranks=ranks: accumulation_steps(optim, ranks))
        fits = [size for size in range(1, optim.micro_batch) if optim.global_batch % (ranks * size) == 0]
        if not fits:
            assert "--optim.micro_batch" not in told
            assert "a run that goes on needs another number of ranks" in told
            continue
        fitted += 1
        assert f"Use --optim.micro_batch {fits[-1]};" in told
        again = dataclasses.replace(optim, micro_batch=fits[-1])
        assert accumulation_steps(again, ranks) * fits[-1] * ranks == optim.global_batch
    assert fitted > 20


def test_prepared_text_is_cached_where_asked_else_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder(DataConfig(cache="here")) == Path("here")
    assert cache_folder(DataConfig()) == Path("/somewhere/distilcb")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(DataConfig()) == Path.home() / ".cache" / "distilcb"


# resuming with other settings


@pytest.mark.parametrize("name", SETTINGS)
def test_a_changed_setting_is_a_difference_unless_it_is_neutral(name):
    changed = merged(DEFAULTS, nested(name, "something else"))
    found = differences(changed, Config())
    if name in RESULT_NEUTRAL:
        assert found == []
    else:
        assert found == [f"{name}: 'something else' -> {flatten(DEFAULTS)[name]!r}"]


def test_neutral_settings_exist_and_none_of_them_says_what_is_learned():
    assert set(SETTINGS) >= RESULT_NEUTRAL
    assert {name.split(".")[0] for name in RESULT_NEUTRAL} == {
        *("card", "data", "deepspeed", "optim", "teacher", "train"),
    }
    assert {name for name in RESULT_NEUTRAL if name.startswith("optim.")} == {"optim.micro_batch"}
    assert RESULT_NEUTRAL.isdisjoint({"train.steps", "train.seed", "data.fraction", "data.seq_len", "student.init"})
    # Of these the content is compared, wherever it lies.
    assert {"teacher.model", "data.train", "data.heldout"} <= RESULT_NEUTRAL


def test_a_configuration_does_not_differ_from_what_was_saved_of_it(recipe):
    config = parse_command_line([*recipe(), "--optim.eps", "1e-7", "--student.init_layers", "[0,1]"]).config
    saved = yaml.safe_load(yaml.safe_dump(to_plain(config) | {"provenance": {"host": "x"}}))
    assert differences(saved, config) == []


def test_a_run_from_before_a_setting_was_there_had_its_default():
    saved = to_plain(Config())
    del saved["loss"]["relation"]
    assert differences(saved, Config()) == []
    assert differences(saved, validate(nested("loss.relation", 0.5))) == ["loss.relation: 0.0 -> 0.5"]


# sections


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_can_be_changed_once_read(name):
    config = Config()
    *sections, last = name.split(".")
    holder = setting(config, ".".join(sections)) if sections else config
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(holder, last, getattr(holder, last))


def test_every_section_is_declared_in_the_configuration():
    declared = {
        value
        for value in vars(config_module).values()
        if dataclasses.is_dataclass(value) and value.__name__.endswith("Config")
    }
    used = {type(getattr(Config(), field.name)) for field in dataclasses.fields(Config)} | {Config}
    assert declared <= used
