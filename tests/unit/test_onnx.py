"""Models as ONNX and in int8, beside PyTorch."""

import sys

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from distilcb.errors import ConfigError, ModelError
from distilcb.export import onnx
from distilcb.export.onnx import INT8, ONNX, OnnxModel, export_onnx
from distilcb.models.loading import load_any_model


@pytest.fixture
def folder(tiny_model, tmp_path):
    """Saves a tiny model: folder("bert")."""

    def make(architecture="camembert", **config):
        tiny_model(architecture, layers=2, **config).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return make


def batch(texts, tokens, seed):
    ids = torch.randint(10, 101, (texts, tokens), generator=torch.Generator().manual_seed(seed))
    seen = torch.ones_like(ids)
    seen[0, tokens // 2 :] = 0
    return ids, seen


@torch.no_grad()
def assert_same(made, where, model):
    """Of sizes that the export has not seen."""
    for texts, tokens in ((1, 3), (5, 23)):
        ids, seen = batch(texts, tokens, seed=tokens)
        expected = model(input_ids=ids, attention_mask=seen)[0]
        found = OnnxModel(where / made).run(ids, seen)[0]
        assert found.shape == expected.shape
        if expected.shape[:2] == ids.shape:
            found, expected = found[seen.bool()], expected[seen.bool()]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("architecture", ["camembert", "bert", "distilbert", "gpt2"])
def test_a_language_model_is_the_same_in_onnx_whatever_the_batch(folder, architecture):
    where = folder(architecture)
    found = export_onnx(where, int8=False)
    assert_same(ONNX, where, load_any_model(str(where)).eval())
    assert found["onnx"]["largest_error"] < 1e-3
    assert found["onnx"]["agreement"] == 1
    assert found["onnx"]["bytes"] == (where / ONNX).stat().st_size
    assert sorted(path.name for path in (where / "onnx").iterdir()) == ["model.onnx"]
    assert not list(where.glob(".onnx*"))


@pytest.mark.parametrize(
    "head", [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]
)
def test_a_fine_tuned_model_keeps_its_head(folder, head):
    where = folder()
    head.from_pretrained(where).eval().save_pretrained(where)
    export_onnx(where, int8=False)
    assert_same(ONNX, where, load_any_model(str(where)).eval())


def test_int8_is_smaller_and_near(folder):
    where = folder(hidden_size=128, intermediate_size=512)
    found = export_onnx(where, int8=True)
    small, plain = (where / INT8).stat().st_size, (where / ONNX).stat().st_size
    assert small < 0.4 * plain
    assert 0 < found["int8"]["error"] < 0.5
    assert found["int8"]["agreement"] > 0.7
    ids, seen = batch(2, 9, seed=1)
    with torch.no_grad():
        exact = load_any_model(str(where)).eval()(input_ids=ids, attention_mask=seen).logits[seen.bool()]
    near = OnnxModel(where / INT8).run(ids, seen)[0][seen.bool()]
    assert torch.corrcoef(torch.stack([near.flatten(), exact.flatten()]))[0, 1] > 0.98


def test_one_number_a_text_has_an_error_and_no_choice(folder):
    where = folder()
    AutoModelForSequenceClassification.from_pretrained(where, num_labels=1).save_pretrained(where)
    facts = export_onnx(where, int8=False)["onnx"]
    assert 0 < facts["error"] < 1e-3
    assert "agreement" not in facts


def test_an_int8_of_an_earlier_export_does_not_stay_beside_a_new_onnx(folder):
    where = folder()
    export_onnx(where, int8=True)
    assert (where / INT8).is_file()
    export_onnx(where, int8=False)
    assert sorted(path.name for path in (where / "onnx").iterdir()) == ["model.onnx"]


def test_onnx_that_computes_something_else_is_not_kept(folder, monkeypatch):
    where, write = folder(), onnx._write_plain

    def altered(model, path):
        with torch.no_grad():
            model.lm_head.bias[5] += 1
        write(model, path)
        with torch.no_grad():
            model.lm_head.bias[5] -= 1

    monkeypatch.setattr(onnx, "_write_plain", altered)
    with pytest.raises(ModelError, match="differ by 1 from"):
        export_onnx(where, int8=True)
    assert not list(where.rglob("*.onnx"))


def test_a_logit_that_is_no_number_is_not_kept_whichever_text_has_it(folder, monkeypatch):
    where, run = folder(), OnnxModel.run

    def lost_where_there_is_padding(self, ids, seen):
        return [each * (float("nan") if len(ids) > 1 else 1) for each in run(self, ids, seen)]

    monkeypatch.setattr(OnnxModel, "run", lost_where_there_is_padding)
    with pytest.raises(ModelError, match="differ by nan from"):
        export_onnx(where, int8=False)
    assert not list(where.rglob("*.onnx"))


def test_int8_that_is_another_model_is_told_and_one_without_numbers_refused(tmp_path, caplog):
    onnx._check_int8(tmp_path, {"error": 0.9})
    assert not caplog.messages
    onnx._check_int8(tmp_path, {"error": 1.234})
    assert "by up to 1.23 of their standard deviation: measure it on your task" in caplog.messages[0]
    with pytest.raises(ModelError, match="logits of its int8 are no numbers"):
        onnx._check_int8(tmp_path, {"error": float("nan")})


@torch.no_grad()
def test_a_model_of_several_segments_is_told_them_in_onnx_too(folder):
    where = folder("bert", type_vocab_size=2)
    AutoModelForSequenceClassification.from_pretrained(where).save_pretrained(where)
    export_onnx(where, int8=False)
    model, (ids, seen) = load_any_model(str(where)).eval(), batch(3, 11, seed=2)
    segments = torch.zeros_like(ids)
    segments[:, 5:] = 1
    pairs = OnnxModel(where / ONNX).run(ids, seen, segments)[0]
    torch.testing.assert_close(pairs, model(ids, seen, segments).logits, rtol=1e-3, atol=1e-4)
    first = OnnxModel(where / ONNX).run(ids, seen)[0]
    torch.testing.assert_close(first, model(ids, seen).logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(pairs, first, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named_with_the_extra_that_has_it(folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"--onnx needs {package}: pip install 'distilcb\[onnx\]'"):
        export_onnx(folder(), int8=False)


def test_a_file_that_is_no_onnx_is_told(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"half a model")
    with pytest.raises(ModelError, match="cannot be run"):
        OnnxModel(tmp_path / "model.onnx")


@pytest.mark.parametrize("named", [None, ["CamembertForEverything"], ["os"]])
def test_a_folder_whose_class_is_not_known_is_told(folder, named):
    where = folder()
    config = load_any_model(str(where)).config
    config.architectures = named
    config.save_pretrained(where)
    with pytest.raises(ModelError, match="Needed: 'architectures'"):
        load_any_model(str(where))


def test_a_folder_that_lacks_its_head_is_told(folder):
    where = folder()
    config = load_any_model(str(where)).config
    config.architectures = ["CamembertForSequenceClassification"]
    config.save_pretrained(where)
    with pytest.raises(ModelError, match=r"lacks .* weights of a CamembertForSequenceClassification, first classifier"):
        load_any_model(str(where))


def test_a_file_that_wants_other_inputs_is_told(folder):
    where = folder()
    export_onnx(where, int8=False)
    with pytest.raises(ModelError, match=r"model\.onnx cannot be run on 1 x 3 tokens \(.*export it again"):
        OnnxModel(where / ONNX).run(torch.ones(1, 3))
