"""Model folders, whole and damaged."""

import json

import pytest
import torch
from transformers import CamembertModel

from distilcb.errors import ModelError
from distilcb.models.loading import load_config, load_language_model

FP32 = torch.float32


@pytest.fixture
def folder(tiny_model, tmp_path):
    """A saved model of two layers in fp16."""
    tiny_model(layers=2).half().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def pickled(folder):
    """The same with pytorch_model.bin in the place of safetensors."""
    model = load_language_model(str(folder), dtype=torch.float16)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_fp16_file_loads_in_the_dtype_asked_for(folder, dtype):
    model = load_language_model(str(folder), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}


def test_weights_are_those_that_were_saved(tiny_model, folder):
    saved, loaded = tiny_model(layers=2).half().state_dict(), load_language_model(str(folder), dtype=FP32).state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], value.float()) for name, value in saved.items())


def test_a_missing_folder_is_a_model_error(tmp_path):
    for load in (lambda name: load_language_model(name, dtype=FP32), load_config):
        with pytest.raises(ModelError, match=r"model folder .*nowhere does not exist"):
            load(str(tmp_path / "nowhere"))


def test_an_empty_folder_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match=r"Needed: a folder with config\.json and model\.safetensors"):
        load_language_model(str(tmp_path), dtype=FP32)


@pytest.mark.parametrize("allow_pickle", [True, False])
def test_a_folder_without_weights_is_a_model_error(folder, allow_pickle):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"cannot be read.*Needed: model\.safetensors"):
        load_language_model(str(folder), dtype=FP32, allow_pickle=allow_pickle)


def test_an_encoder_without_its_head_is_a_model_error_that_names_a_missing_weight(tiny_model, tmp_path):
    CamembertModel(tiny_model(layers=2).config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"lacks \d+ weights, first lm_head\..*no vocabulary head"):
        load_language_model(str(tmp_path), dtype=FP32)


def test_a_model_that_lacks_one_layer_of_its_configuration_is_a_model_error(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"lacks \d+ weights, first roberta\.encoder\.layer\.2\."):
        load_language_model(str(folder), dtype=FP32)


def test_weights_of_other_sizes_than_the_configuration_are_a_model_error(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}), encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be read"):
        load_language_model(str(folder), dtype=FP32)


def test_a_pickle_is_refused_unless_allowed(pickled):
    with pytest.raises(ModelError, match=r"--teacher\.allow_pickle true"):
        load_language_model(str(pickled), dtype=FP32)
    model = load_language_model(str(pickled), dtype=FP32, allow_pickle=True)
    assert {parameter.dtype for parameter in model.parameters()} == {FP32}


def test_safetensors_are_read_even_where_a_pickle_is_allowed(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    model = load_language_model(str(folder), dtype=FP32, allow_pickle=True)
    assert {parameter.dtype for parameter in model.parameters()} == {FP32}


@pytest.mark.parametrize("content", [b"", b"no pickle at all"])
def test_a_damaged_pickle_is_a_model_error(pickled, content):
    (pickled / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="cannot be read"):
        load_language_model(str(pickled), dtype=FP32, allow_pickle=True)


class Intruder:
    def __reduce__(self):
        return (pytest.fail, ("code of a pickle ran",))


def test_a_pickle_that_would_run_code_is_a_model_error(pickled):
    torch.save({"roberta": Intruder()}, pickled / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be read"):
        load_language_model(str(pickled), dtype=FP32, allow_pickle=True)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:5], lambda data: b""])
def test_a_cut_safetensors_file_is_a_model_error(folder, damage):
    weights = folder / "model.safetensors"
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(ModelError, match="cannot be read"):
        load_language_model(str(folder), dtype=FP32)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no such thing"}'])
def test_a_config_that_names_no_known_model_is_a_model_error(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    for name in (folder, folder / "config.json"):
        with pytest.raises(ModelError, match="cannot be read"):
            load_config(str(name))


def test_a_model_of_an_unknown_kind_is_a_model_error(folder):
    (folder / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    with pytest.raises(ModelError, match="not supported"):
        load_language_model(str(folder), dtype=FP32)


def test_a_config_is_read_from_a_folder_and_from_a_file_of_any_name(folder):
    (folder / "config.json").rename(folder / "six_layers.txt")
    from_file = load_config(str(folder / "six_layers.txt"))
    (folder / "six_layers.txt").rename(folder / "config.json")
    from_folder = load_config(str(folder))
    assert from_file.num_hidden_layers == from_folder.num_hidden_layers == 2
    assert type(from_file) is type(from_folder)
