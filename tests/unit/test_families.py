"""The parts of each architecture against the transformers model as a whole."""

import re
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig

from distilcb.config import REPOSITORY
from distilcb.errors import ConfigError, ModelError
from distilcb.models import families
from distilcb.models.families import FAMILIES, family_of
from distilcb.models.projections import outputs_of

architectures = pytest.mark.parametrize(
    "architecture", ["camembert", "roberta", "xlm-roberta", "bert", "distilbert", "gpt2"]
)


def logits_by_family(model, ids):
    family = family_of(model.config, where="test")
    hidden = family.encode(model, ids)
    features = family.head_features(model, hidden.reshape(-1, hidden.shape[-1]))
    return torch.nn.functional.linear(features, *family.decoder(model)).reshape(*ids.shape, -1)


def random_ids(model, length, blocks=3):
    """No padding among them, since blocks have none."""
    first = model.config.pad_token_id + 1
    generator = torch.Generator().manual_seed(0)
    return torch.randint(first, model.config.vocab_size, (blocks, length), generator=generator)


@architectures
@pytest.mark.parametrize("length", [1, 7, 40])
@torch.no_grad()
def test_encoder_head_and_decoder_give_the_models_own_logits_exactly(tiny_model, architecture, length):
    model = tiny_model(architecture)
    ids = random_ids(model, length)
    assert torch.equal(logits_by_family(model, ids), model(ids).logits)


@torch.no_grad()
def test_the_first_position_follows_the_pad_id_of_the_model(tiny_model):
    model = tiny_model(pad_token_id=3)
    ids = random_ids(model, 20)
    assert torch.equal(logits_by_family(model, ids), model(ids).logits)


@torch.no_grad()
def test_a_decoder_that_is_not_tied_to_the_embeddings_is_the_one_used(tiny_model):
    model = tiny_model(tie_word_embeddings=False)
    ids = random_ids(model, 20)
    weight, _ = family_of(model.config, where="test").decoder(model)
    assert not torch.equal(weight, model.get_input_embeddings().weight)
    assert torch.equal(logits_by_family(model, ids), model(ids).logits)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.name().removeprefix("aten::").partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@architectures
@torch.no_grad()
def test_attention_is_one_fused_operator_a_layer(tiny_model, architecture):
    """A mask, or a model that was not loaded for it, would take torch's plain products and a softmax instead."""
    model = tiny_model(architecture)
    family = family_of(model.config, where="test")
    with Operators() as ran:
        family.encode(model, random_ids(model, 16))
    assert ran.names["_scaled_dot_product_flash_attention_for_cpu"] == len(family.layers(model))
    assert not ran.names.keys() & {"bmm", "_softmax"}


@pytest.mark.parametrize("architecture", ["camembert", "roberta", "xlm-roberta", "bert", "distilbert"])
@torch.no_grad()
def test_queries_keys_and_values_make_what_attention_hands_on(tiny_model, architecture):
    model = tiny_model(architecture)
    family, heads = family_of(model.config, where="test"), model.config.num_attention_heads
    attention = family.layers(model)[2].attention
    handed_on = []
    after = attention.out_lin if architecture == "distilbert" else attention.output.dense
    after.register_forward_pre_hook(lambda _module, inputs: handed_on.append(inputs[0]))
    with outputs_of(dict(enumerate(family.projections(model, 2)))) as found:
        family.encode(model, random_ids(model, 16))
    query, key, value = (found[kind].unflatten(-1, (heads, -1)).transpose(1, 2) for kind in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(plain, handed_on[0])
    assert all(not module._forward_hooks for module in family.projections(model, 2))


def test_a_gpt2_makes_them_in_one_product_and_says_so(tiny_model):
    model = tiny_model("gpt2")
    with pytest.raises(ConfigError, match=r"loss\.relation: no layer of a gpt2 makes them apart"):
        family_of(model.config, where="test").projections(model, 0)


@architectures
@pytest.mark.parametrize("pad_token_id", [0, 1, 3])
@torch.no_grad()
def test_the_longest_block_is_what_the_model_accepts_and_one_more_token_is_not(tiny_model, architecture, pad_token_id):
    model = tiny_model(architecture, pad_token_id=pad_token_id)
    family = family_of(model.config, where="test")
    longest = family.max_seq_len(model.config)
    for run in (lambda ids: family.encode(model, ids), model):
        run(random_ids(model, longest))
        with pytest.raises((IndexError, RuntimeError)):
            run(random_ids(model, longest + 1))


def test_all_of_them_read_512_tokens_at_their_real_size():
    for name, positions in {
        "camembert": 514,
        "roberta": 514,
        "xlm-roberta": 514,
        "bert": 512,
        "distilbert": 512,
    }.items():
        config = AutoConfig.for_model(name, max_position_embeddings=positions, pad_token_id=1)
        assert FAMILIES[name].max_seq_len(config) == 512


@architectures
def test_layers_and_what_is_beside_them_hold_every_parameter_once(tiny_model, architecture):
    model = tiny_model(architecture, layers=3)
    family = family_of(model.config, where="test")
    parts = [*family.layers(model), *family.beside_layers(model)]
    found = {id(parameter) for part in parts for parameter in part.parameters()}
    assert len(family.layers(model)) == 3
    assert found == {id(parameter) for parameter in model.parameters()}


def test_another_architecture_is_refused_with_the_names_of_those_supported():
    with pytest.raises(ModelError, match=r"teacher: model_type 't5' is not supported.*camembert, roberta"):
        family_of(AutoConfig.for_model("t5"), where="teacher")


def test_a_configuration_without_a_model_type_is_refused():
    with pytest.raises(ModelError, match="model_type 'None' is not supported"):
        family_of(object(), where="teacher")


@architectures
def test_another_depth_leaves_the_configuration_it_was_made_from_alone(tiny_model, architecture):
    config = tiny_model(architecture, layers=4).config
    shallower = family_of(config, where="test").with_layers(config, 2)
    assert (shallower.num_hidden_layers, config.num_hidden_layers) == (2, 4)
    assert type(shallower) is type(config)
    depth = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    assert shallower.to_dict() == config.to_dict() | {depth: 2}


def test_dropout_that_is_set_reaches_hidden_states_and_attention():
    config = AutoConfig.for_model("camembert")
    FAMILIES["camembert"].set_dropout(config, 0.3)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.3, 0.3)


@pytest.mark.parametrize(("hidden", "attention", "largest"), [(0.0, 0.0, 0.0), (0.1, 0.0, 0.1), (0.1, 0.2, 0.2)])
def test_dropout_is_the_larger_of_the_two(hidden, attention, largest):
    config = AutoConfig.for_model("roberta", hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
    assert FAMILIES["roberta"].dropout(config) == largest


@architectures
def test_a_model_with_dropout_0_is_the_same_in_training_mode(tiny_model, architecture):
    config = tiny_model(architecture).config
    family_of(config, where="test").set_dropout(config, 0.0)
    assert family_of(config, where="test").dropout(config) == 0
    model = family_of(config, where="test").model_class().from_config(config).eval()
    ids = random_ids(model, 20)
    in_eval_mode = logits_by_family(model, ids)
    assert torch.equal(logits_by_family(model.train(), ids), in_eval_mode)


@torch.no_grad()
def test_the_family_that_the_documentation_adds_works(tiny_model, monkeypatch):
    text = (REPOSITORY / "docs" / "families.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES | {})
    exec(code, vars(families) | {"FAMILIES": families.FAMILIES})
    model = tiny_model("ernie", layers=3)
    ids = random_ids(model, 20)
    assert torch.equal(logits_by_family(model, ids), model(ids).logits)
    family = family_of(model.config, where="test")
    parts = [*family.layers(model), *family.beside_layers(model)]
    assert {id(p) for part in parts for p in part.parameters()} == {id(p) for p in model.parameters()}
