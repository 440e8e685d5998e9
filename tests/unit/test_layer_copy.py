"""Which layers a student copies, and that it copies all of them."""

import itertools
import re

import pytest
import torch

from distilcb.config import StudentConfig
from distilcb.errors import ConfigError, ModelError
from distilcb.models.families import FAMILIES, family_of
from distilcb.models.layer_copy import copy_weights, spread_layers
from distilcb.models.student import build_student

DEPTHS = [(source, target) for source in range(1, 25) for target in range(1, 25)]


def test_twelve_layers_into_six_are_those_of_the_original_students():
    assert spread_layers(12, 6) == (0, 2, 4, 7, 9, 11)


def test_three_layers_into_six_repeat_some_in_order():
    assert spread_layers(3, 6) == (0, 0, 1, 1, 2, 2)


def test_every_spread_has_the_length_asked_for_and_stays_in_range():
    for source, target in DEPTHS:
        layers = spread_layers(source, target)
        assert len(layers) == target
        assert set(layers) <= set(range(source))


def test_every_spread_of_two_layers_or_more_begins_with_the_first_and_ends_with_the_last():
    for source, target in DEPTHS:
        if target > 1:
            layers = spread_layers(source, target)
            assert (layers[0], layers[-1]) == (0, source - 1)


def test_no_spread_goes_back_and_one_that_shrinks_repeats_nothing():
    for source, target in DEPTHS:
        pairs = list(itertools.pairwise(spread_layers(source, target)))
        assert all(before <= after for before, after in pairs)
        assert target > source or all(before < after for before, after in pairs)


def test_every_layer_of_a_spread_is_the_nearest_to_its_even_place():
    for source, target in DEPTHS:
        for i, layer in enumerate(spread_layers(source, target)):
            assert target == 1 or abs(layer - i * (source - 1) / (target - 1)) <= 0.5


def test_the_same_depth_is_the_identity():
    for depth in range(1, 25):
        assert spread_layers(depth, depth) == tuple(range(depth))


def copy_between(source, target, layers):
    families = [family_of(model.config, where="test") for model in (source, target)]
    copy_weights(source, families[0], target, families[1], layers)


def copied(tiny_model, layers, *, source_layers=4, architecture="camembert", **config):
    """A source, and a target of other random weights after the copy."""
    source = tiny_model(architecture, layers=source_layers, seed=1, **config)
    target = tiny_model(architecture, layers=len(layers), seed=2, **config)
    copy_between(source, target, layers)
    return source, target


@pytest.mark.parametrize("architecture", ["camembert", "roberta"])
@pytest.mark.parametrize("layers", [(0, 3), (3, 1, 0), (2, 2), (0, 1, 2, 3), (0, 0, 1, 1, 2, 3)])
def test_every_layer_equals_the_one_that_the_map_names(tiny_model, architecture, layers):
    source, target = copied(tiny_model, layers, architecture=architecture)
    for place, layer in enumerate(layers):
        wanted = source.roberta.encoder.layer[layer].state_dict()
        found = target.roberta.encoder.layer[place].state_dict()
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_the_whole_head_equal_the_sources(tiny_model, tied):
    source, target = copied(tiny_model, (0, 3), tie_word_embeddings=tied)
    wanted, found = source.state_dict(), target.state_dict()
    beside = [name for name in wanted if ".encoder.layer." not in name]
    for part in ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"):
        assert f"roberta.embeddings.{part}.weight" in beside
    for part in ("dense.weight", "dense.bias", "layer_norm.weight", "layer_norm.bias", "decoder.weight", "bias"):
        assert f"lm_head.{part}" in beside
    assert all(torch.equal(found[name], wanted[name]) for name in beside)


@pytest.mark.parametrize("architecture", ["camembert", "roberta"])
@torch.no_grad()
def test_a_student_of_the_same_depth_gives_the_teachers_logits_exactly(tiny_model, tiny_batch, architecture):
    source, target = copied(tiny_model, range(4), architecture=architecture)
    ids = tiny_batch().input_ids
    assert torch.equal(target(ids).logits, source(ids).logits)


def test_a_copy_of_a_half_precision_source_holds_its_values_in_fp32(tiny_model):
    source, target = tiny_model(layers=2, seed=1).half(), tiny_model(layers=2, seed=2)
    copy_between(source, target, (0, 1))
    wanted = source.state_dict()
    for name, value in target.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, wanted[name].float())


def test_training_the_copy_leaves_the_source_alone(tiny_model, parameters_of):
    source, target = copied(tiny_model, (1, 2))
    before = parameters_of(source)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in source.named_parameters())


def test_repeated_layers_are_copies_of_their_own(tiny_model):
    _, target = copied(tiny_model, (2, 2))
    first, second = target.roberta.encoder.layer
    with torch.no_grad():
        first.output.dense.weight.zero_()
    assert second.output.dense.weight.abs().sum() > 0


def test_a_layer_that_the_source_lacks_is_a_config_error_that_names_it(tiny_model):
    with pytest.raises(
        ConfigError, match=r"student\.init_layers=\[0, 4, 7\]: the source has layers 0 to 3, not \[4, 7\]"
    ):
        copied(tiny_model, (0, 4, 7))


def test_a_map_of_another_length_is_a_config_error_that_names_both(tiny_model):
    source, target = tiny_model(layers=4), tiny_model(layers=2)
    with pytest.raises(ConfigError, match=r"init_layers=\[0, 1, 3\] lists 3 layers, the student has 2"):
        copy_between(source, target, (0, 1, 3))


@pytest.mark.parametrize("other", [{"hidden_size": 16}, {"intermediate_size": 24}, {"vocab_size": 90}])
def test_models_of_other_sizes_are_a_model_error(tiny_model, other):
    source, target = tiny_model(layers=2), tiny_model(layers=2, **other)
    with pytest.raises(ModelError, match=r"differs from the source's: size mismatch for .*Only the depth may differ"):
        copy_between(source, target, (0, 1))


@torch.no_grad()
def test_a_distilbert_as_deep_as_its_bert_computes_the_same(tiny_model):
    """So every weight of it is in its place, the first segment's embedding among them."""
    source = tiny_model("bert", layers=3, type_vocab_size=2)
    student, family = build_student(
        StudentConfig(architecture="distilbert", init_layers=(0, 1, 2)), teacher=source, vocab_size=101, seed=0
    )
    assert type(student).__name__ == "DistilBertForMaskedLM"
    ids = torch.randint(5, 100, (3, 20))
    torch.testing.assert_close(student.eval()(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)
    assert torch.equal(family.decoder(student)[0], source.get_input_embeddings().weight)


def test_a_student_of_half_the_depth_has_the_layers_that_were_chosen(tiny_model):
    source = tiny_model("bert", layers=4)
    config = StudentConfig(architecture="distilbert", init_layers=(1, 3))
    student, family = build_student(config, teacher=source, vocab_size=101, seed=0)
    for own, layer in zip(family.layers(student), (1, 3), strict=True):
        theirs = source.bert.encoder.layer[layer]
        assert torch.equal(own.attention.out_lin.weight, theirs.attention.output.dense.weight)
        assert torch.equal(own.ffn.lin2.bias, theirs.output.dense.bias)


@pytest.mark.parametrize(
    ("teacher", "asked", "said"),
    [
        ("camembert", "distilbert", "a camembert teacher has no student of this kind"),
        ("bert", "camembert", "a bert teacher has no student of this kind"),
        ("bert", "distilbart", "student.architecture='distilbart' is none of camembert, roberta"),
    ],
)
def test_a_student_of_a_kind_that_the_teacher_cannot_have_is_told(tiny_model, teacher, asked, said):
    with pytest.raises(ConfigError, match=said):
        build_student(StudentConfig(architecture=asked), teacher=tiny_model(teacher), vocab_size=101, seed=0)


def test_layer_norms_that_distilbert_cannot_have_are_told(tiny_model):
    source = tiny_model("bert", layer_norm_eps=1e-5)
    with pytest.raises(ConfigError, match="DistilBERT's layer norms have epsilon 1e-12, the teacher's 1e-05"):
        build_student(StudentConfig(architecture="distilbert"), teacher=source, vocab_size=101, seed=0)


@pytest.mark.parametrize(
    ("teacher", "asked", "other", "said"),
    [
        ("camembert", "roberta", {"num_attention_heads": 2}, "num_attention_heads 4 -> 2"),
        ("bert", "distilbert", {"n_heads": 2}, "num_attention_heads 4 -> 2"),
        ("bert", "distilbert", {"activation": "relu"}, "activation gelu -> relu"),
        ("gpt2", "gpt2", {"activation_function": "relu"}, "activation_function gelu_new -> relu"),
        ("gpt2", "gpt2", {"layer_norm_epsilon": 1e-2}, "layer_norm_epsilon 1e-05 -> 0.01"),
    ],
)
def test_a_student_that_would_compute_something_else_is_refused(tiny_model, tmp_path, teacher, asked, other, said):
    source = tiny_model(teacher)
    config = FAMILIES[asked].config_like(source.config) if asked == "distilbert" else tiny_model(asked).config
    for name, value in other.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=re.escape(said)):
        build_student(StudentConfig(config=str(tmp_path)), teacher=source, vocab_size=101, seed=0)


def test_a_gpt2_that_counts_its_layers_has_no_student_of_another_depth(tiny_model):
    source = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ConfigError, match="divides its attention by the layer's number"):
        build_student(StudentConfig(), teacher=source, vocab_size=101, seed=0)
