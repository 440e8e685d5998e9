"""A folder of fine-tunings and the settings that its results are of."""

import pytest

from distilcb.errors import ConfigError
from distilcb.finetune.runs import check_settings

SETTINGS = {"content": "0a1b", "train_rows": 60, "models": {"runs/a": "2c3d"}, "recipe": {"lr": 5e-5}}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"recipe": {"lr": 1e-4}}, "(recipe.lr 5e-05 there, 0.0001 now)"),
        ({"content": "other", "train_rows": 80}, "(train_rows 60 there, 80 now)"),
        ({"content": "other"}, "(the rows or files of that name differ)"),
        ({"models": {"runs/a": "other"}}, "(the files of runs/a differ)"),
    ],
)
def test_results_of_other_settings_are_refused_without_hashes_that_say_nothing(tmp_path, change, told):
    path = tmp_path / "a_task" / "settings.json"
    check_settings(path, SETTINGS)
    check_settings(path, SETTINGS)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="a_task holds results of other settings") as refused:
        check_settings(path, SETTINGS | change)
    assert told in str(refused.value)
    assert "Name another --output." in str(refused.value)
    assert path.read_bytes() == before


def test_a_folder_from_before_precision_was_kept_goes_on(tmp_path):
    path = tmp_path / "a_task" / "settings.json"
    check_settings(path, {"content": "0a1b"})
    now = {"content": "0a1b", "precision": "fp32", "train_rows": None}
    check_settings(path, now)
    with pytest.raises(ConfigError, match="the rows or files of that name differ"):
        check_settings(path, now | {"content": "other"})


def test_a_folder_from_before_like_lengths_had_none(tmp_path):
    path = tmp_path / "a_task" / "settings.json"
    check_settings(path, {"recipe": {"lr": 1.0}})
    check_settings(path, {"recipe": {"lr": 1.0, "by_length": False}})
    with pytest.raises(ConfigError, match=r"recipe\.by_length False there, True now"):
        check_settings(path, {"recipe": {"lr": 1.0, "by_length": True}})


def test_what_was_begun_in_half_precision_does_not_go_on_in_full(tmp_path):
    path = tmp_path / "a_task" / "settings.json"
    check_settings(path, {"precision": "bf16"})
    with pytest.raises(ConfigError, match="precision 'bf16' there, 'fp32' now"):
        check_settings(path, {"precision": "fp32"})
