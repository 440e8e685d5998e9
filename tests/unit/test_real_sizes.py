"""Students at their real sizes: parameters to the last one, on the meta device, which holds none of them."""

import pytest
import torch
from transformers import AutoConfig

from distilcb.config import REPOSITORY
from distilcb.models.families import FAMILIES, family_of
from distilcb.recipe import load_recipe

GPT2 = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024}
BERT = {"model_type": "bert", "max_position_embeddings": 512}
ROBERTA = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "pad_token_id": 1}
# Facts of the teachers' config.json, and parameters of the students with their head and without it, by hand: six layers
# of 7,087,872, embeddings, dense and layer norm of the head, and a bias a word. Published: 66 M, 65 M, 134 M, 82 M and
# 68 M.
STUDENTS = {
    "distilbert-uncased": (BERT | {"vocab_size": 30_522}, 66_985_530, 66_362_880),
    "distilbert-cased": (BERT | {"vocab_size": 28_996}, 65_812_036, 65_190_912),
    "distilbert-german": (BERT | {"vocab_size": 31_102}, 67_431_550, 66_808_320),
    "distilmbert": (BERT | {"vocab_size": 119_547}, 135_445_755, 134_734_080),
    "distilroberta": (ROBERTA | {"model_type": "roberta", "vocab_size": 50_265}, 82_170_201, 81_527_808),
    "distilxlmr": (ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250_002}, 235_767_954, 234_925_824),
    "distilgpt2": (GPT2, 81_912_576, 81_912_576),  # the decoder is the embeddings
    "distilcamembert": (ROBERTA | {"model_type": "camembert", "vocab_size": 32_005}, 68_128_261, 67_504_128),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_has_as_many_parameters_as_the_published_one(name):
    facts, whole, body = STUDENTS[name]
    teacher = AutoConfig.for_model(**facts)
    student = load_recipe(REPOSITORY / "recipes" / f"{name}.yaml").student
    config = family_of(teacher, where="teacher").with_layers(teacher, student.num_layers)
    if student.architecture:
        config = FAMILIES[student.architecture].config_like(config)
    with torch.device("meta"):
        model = family_of(config, where="student").model_class().from_config(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == whole
    assert sum(parameter.numel() for parameter in model.base_model.parameters()) == body
