"""DeepSpeed files: what is refused, what auto chooses, and that DeepSpeed reads the result as we mean it."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from distilcb.config import Config, OptimConfig, flatten, to_plain
from distilcb.engine import deepspeed_config
from distilcb.engine.deepspeed_config import (
    ALLOWED,
    DS_CONFIGS,
    IN_RECIPE,
    build,
    choose_file,
    cpu_has_bf16,
    precision,
    read_file,
)
from distilcb.errors import ConfigError

FILES = sorted(DS_CONFIGS.rglob("*.json"))
ZERO = {"stage": 2}


@pytest.fixture
def file(tmp_path):
    def write(content):
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def faults_of(action):
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


@pytest.fixture
def as_deepspeed_reads(monkeypatch):
    """DeepSpeed's own reading of a dictionary, on as many ranks, without starting them."""
    from deepspeed.runtime import config

    def read(settings, *, world_size):
        monkeypatch.setattr(config.dist, "get_rank", lambda: 0)
        return config.DeepSpeedConfig(settings, SimpleNamespace(get_data_parallel_world_size=lambda: world_size))

    return read


def test_there_is_a_file_for_each_precision():
    assert {precision(read_file(path)) for path in FILES} == {"fp16", "bf16", "fp32"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_loads_and_shards_gradients_and_optimizer(path):
    settings = read_file(path)
    assert settings["zero_optimization"]["stage"] == 2
    for name in ("fp16", "bf16"):
        assert (name in path.stem) == (precision(settings) == name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_deepspeed_reads_what_the_recipe_says(as_deepspeed_reads, path, world_size):
    optim = OptimConfig(global_batch=240, micro_batch=5, clip=1.25)
    built = build(read_file(path), optim, world_size=world_size)
    read = as_deepspeed_reads(built, world_size=world_size)
    assert read.train_batch_size == 240
    assert read.train_micro_batch_size_per_gpu == 5
    assert read.gradient_accumulation_steps == 48 // world_size
    assert read.gradient_clipping == 1.25
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_optimization_stage == 2
    assert read.float16_config.enabled == (precision(built) == "fp16")
    assert read.bfloat16_config.enabled == (precision(built) == "bf16")


def test_every_pass_on_every_rank_adds_up_to_the_global_batch():
    for world_size in (1, 2, 6):
        built = build({}, OptimConfig(global_batch=96, micro_batch=4), world_size=world_size)
        passes = built["gradient_accumulation_steps"]
        assert built["train_batch_size"] == built["train_micro_batch_size_per_gpu"] * passes * world_size == 96


def test_no_clipping_in_the_recipe_is_none_in_deepspeed(as_deepspeed_reads):
    read = as_deepspeed_reads(build({}, OptimConfig(clip=0), world_size=1), world_size=1)
    assert read.gradient_clipping == 0


def test_a_file_may_say_in_what_gradients_are_summed_and_the_rest_stays():
    settings = {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": ZERO}
    built = build(settings, OptimConfig(), world_size=1)
    assert built["data_types"] == {"grad_accum_dtype": "bf16"}
    assert built["zero_optimization"] == ZERO
    assert settings == {"data_types": {"grad_accum_dtype": "bf16"}, "zero_optimization": ZERO}


def test_deepspeed_does_not_print_what_our_monitor_prints():
    built = build({}, OptimConfig(), world_size=1)
    assert built["steps_per_print"] > 1_000_000_000


@pytest.mark.parametrize("key", IN_RECIPE)
def test_a_key_that_belongs_to_the_recipe_is_refused_and_its_home_named(file, key):
    told = faults_of(lambda: read_file(file({key: 1})))
    assert f"'{key}'" in told
    homes = re.findall(r"\b(?:optim|train|loss)\.[a-z_]+", told)
    assert homes or key == "tensorboard"  # which is always on
    assert set(homes) <= set(flatten(to_plain(Config())))


def test_what_build_sets_cannot_come_from_a_file():
    set_by_build = set(build({}, OptimConfig(), world_size=1)) - {"data_types"}
    assert set_by_build - {"timers"} <= set(IN_RECIPE)
    assert "timers" not in ALLOWED
    assert set(IN_RECIPE).isdisjoint(ALLOWED)


@pytest.mark.parametrize("key", ALLOWED)
def test_a_misspelled_key_is_refused_and_the_right_one_named(file, key):
    misspelled = key[:-2] + key[-1]
    assert f"unknown key '{misspelled}': did you mean '{key}'?" in faults_of(lambda: read_file(file({misspelled: {}})))


def test_a_key_like_none_is_refused_with_a_list_of_the_known(file):
    told = faults_of(lambda: read_file(file({"amp": {"enabled": True}})))
    assert "'amp'" in told
    assert all(key in told for key in ALLOWED)


@pytest.mark.parametrize(
    "content", ['{"fp16": {}, "bf16": {}, "fp16": {}}', '{"fp16": {"enabled": false, "enabled": true}}']
)
def test_a_key_written_twice_is_refused_at_any_depth(file, content):
    assert "written twice" in faults_of(lambda: read_file(file(content)))


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_stages_whose_checkpoints_or_weights_do_not_serve_are_refused(file, stage):
    assert f"stage is {stage}, needed 2" in faults_of(lambda: read_file(file({"zero_optimization": {"stage": stage}})))


def test_a_file_that_names_no_stage_is_refused(file):
    assert "stage is 0, needed 2" in faults_of(lambda: read_file(file({})))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {}}}, "offload_optimizer is not supported"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "unknown key 'data_types.grad_acum_dtype'"),
        ({"fp16": {"enabled": "auto"}}, "fp16.enabled is 'auto', needed true or false"),
    ],
)
def test_what_deepspeed_would_take_in_silence_or_fail_on_later_is_refused(file, settings, told):
    assert told in faults_of(lambda: read_file(file(settings)))


def test_two_precisions_at_once_are_refused(file):
    both = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}, "bf16": {"enabled": True}}
    assert "choose one" in faults_of(lambda: read_file(file(both)))
    both["fp16"]["enabled"] = False
    assert precision(read_file(file(both))) == "bf16"


def test_faults_of_a_file_are_reported_together(file):
    settings = {"optimizer": {}, "bf_16": {}, "zero_optimization": {"stage": 3}}
    settings |= {"fp16": {"enabled": True}, "bf16": {"enabled": True}}
    told = faults_of(lambda: read_file(file(settings)))
    assert str(file(settings)) in told
    for part in ("'optimizer'", "'bf_16'", "stage 3", "choose one"):
        assert part in told


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"fp16": true}', '{"zero_optimization": 2}'])
def test_a_file_that_holds_no_settings_is_a_users_fault(file, content):
    assert "ds.json" in faults_of(lambda: read_file(file(content)))


def test_a_file_that_is_not_there_is_a_users_fault(tmp_path):
    assert "absent.json" in faults_of(lambda: read_file(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("cuda", "cpu_bf16", "wanted"),
    [(True, True, "fp16"), (True, False, "fp16"), (False, True, "bf16"), (False, False, "fp32")],
)
def test_auto_takes_what_the_machine_can_and_says_why(cuda, cpu_bf16, wanted):
    path, why = choose_file("auto", cuda=cuda, cpu_has_bf16=cpu_bf16)
    assert precision(read_file(path)) == wanted
    assert why.startswith(wanted)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_shipped_file_is_found_by_name_with_or_without_its_ending(path):
    for name in (path.name, path.stem, str(path)):
        assert choose_file(name, cuda=False, cpu_has_bf16=False)[0] == path


def test_a_file_of_the_users_own_is_found_by_its_path(file, monkeypatch):
    own = file({})
    assert choose_file(str(own), cuda=True, cpu_has_bf16=True)[0] == own
    monkeypatch.chdir(own.parent)
    assert choose_file("ds.json", cuda=True, cpu_has_bf16=True)[0].resolve() == own


def test_a_name_of_no_file_lists_those_that_are_there():
    told = faults_of(lambda: choose_file("zero9", cuda=False, cpu_has_bf16=False))
    assert "zero9" in told
    assert all(path.name in told for path in FILES)


@pytest.mark.parametrize(
    ("flags", "has"),
    [("fpu avx512_bf16", True), ("amx_bf16 amx_tile", True), ("asimd bf16", True), ("fpu avx512f", False)],
)
def test_bf16_is_looked_for_among_the_cpus_flags(monkeypatch, flags, has):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: f"processor : 0\nflags : {flags}\n")
    assert cpu_has_bf16() is has


def test_a_machine_that_does_not_tell_its_flags_has_no_bf16(monkeypatch):
    def refuse(*_, **__):
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", refuse)
    assert cpu_has_bf16() is False


@pytest.mark.parametrize(
    "settings",
    [{"zero_optimization": {"stage": 2, "reduce_bucketsize": 1}}, {"fp16": {"enabled": True, "loss_scal": 1}}],
)
def test_unknown_names_inside_a_section_are_refused(settings):
    with pytest.raises(ConfigError, match=r"reduce_bucketsize|loss_scal"):
        deepspeed_config.check_sections(settings)


def test_sections_of_every_shipped_file_are_known_to_deepspeed():
    files = sorted(deepspeed_config.DS_CONFIGS.glob("*.json"))
    assert len(files) >= 3
    for path in files:
        deepspeed_config.check_sections(deepspeed_config.read_file(path))
