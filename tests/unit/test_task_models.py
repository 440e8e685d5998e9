"""Models with a task's head: what is loaded, and what is refused."""

import json
import logging
import shutil

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
)

from distilcb.errors import ConfigError, ModelError
from distilcb.finetune.models import check_same_tokenizer, load_for_task, longest_sequence, tokenizer_for
from distilcb.finetune.training import read_by
from distilcb.tasks.declarations import TASKS

NAMES = TASKS["ner_fr"]


@pytest.fixture(scope="module")
def tiny(mini_teacher, tmp_path_factory):
    """A student's folder: one layer, no task's head."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    shutil.copytree(mini_teacher, folder)
    config = AutoConfig.from_pretrained(folder, num_hidden_layers=1)
    AutoModelForMaskedLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def causal(tmp_path):
    folder = tmp_path / "causal"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20)).save_pretrained(folder)
    return str(folder)


def save_tagger(folder, tiny, **config):
    made = AutoConfig.from_pretrained(tiny, **config)
    AutoModelForTokenClassification.from_config(made).save_pretrained(folder)
    return str(folder)


def test_a_students_head_has_the_tasks_labels_and_its_body_the_students_weights(tiny):
    model = load_for_task(tiny, NAMES, fine_tuned=False)
    assert [model.config.id2label[number] for number in range(9)] == list(NAMES.labels)
    assert model.classifier.out_features == 9
    source = AutoModelForMaskedLM.from_pretrained(tiny)
    assert torch.equal(
        model.roberta.embeddings.word_embeddings.weight, source.roberta.embeddings.word_embeddings.weight
    )


def test_a_seed_gives_a_head(tiny):
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_for_task(tiny, NAMES, fine_tuned=False).classifier.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


@pytest.mark.parametrize("name", ["piaf_qa", "stsb_fr"])
def test_a_task_without_labels_has_a_head_of_its_own(tiny, name):
    model = load_for_task(tiny, TASKS[name], fine_tuned=False)
    assert model.config.num_labels == {"piaf_qa": 2, "stsb_fr": 1}[name]


def test_a_model_without_a_tasks_head_is_no_teacher(tiny):
    with pytest.raises(ModelError, match=r"lacks 2 weights, first qa_outputs.bias: it has not been fine-tuned"):
        load_for_task(tiny, TASKS["piaf_qa"], fine_tuned=True)


def test_a_teachers_labels_must_be_the_tasks_in_their_order(tiny, tmp_path):
    turned = dict(enumerate(reversed(NAMES.labels)))
    other = save_tagger(tmp_path / "other", tiny, id2label=turned, label2id={v: k for k, v in turned.items()})
    with pytest.raises(ModelError, match=r"has the labels I-MISC, B-MISC.*the same in the same order"):
        load_for_task(other, NAMES, fine_tuned=True)
    with pytest.raises(ModelError, match="has the labels LABEL_0, LABEL_1, LABEL_2"):
        load_for_task(save_tagger(tmp_path / "few", tiny, num_labels=3), NAMES, fine_tuned=True)


def test_a_teacher_that_does_not_name_its_labels_is_taken_with_a_warning(tiny, tmp_path, caplog):
    unnamed = save_tagger(tmp_path / "unnamed", tiny, num_labels=9)
    with caplog.at_level(logging.WARNING, logger="distilcb"):
        load_for_task(unnamed, NAMES, fine_tuned=True)
    assert "does not name its labels" in caplog.text


def test_a_causal_model_is_refused_for_a_task_and_an_encoder_for_next_words(tiny, causal):
    with pytest.raises(ModelError, match=r"gpt2\) predicts the next word: a task needs an encoder"):
        load_for_task(causal, NAMES, fine_tuned=False)
    with pytest.raises(ModelError, match=r"is an encoder: --task causal needs a causal model"):
        load_for_task(tiny, None, fine_tuned=False)


def test_damaged_weights_are_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "damaged")
    path = tmp_path / "damaged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelError, match="cannot be read for task ner_fr"):
        load_for_task(str(tmp_path / "damaged"), NAMES, fine_tuned=False)


def test_another_tokenizer_is_refused(tiny, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    path = other / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"▁de"', '"▁dezzz"'), encoding="utf-8")
    check_same_tokenizer(tiny, tiny)
    with pytest.raises(ConfigError, match="has another tokenizer than student"):
        check_same_tokenizer(tiny, str(other))


def test_a_tokenizer_for_a_task_knows_characters(tiny):
    assert tokenizer_for(tiny, NAMES).is_fast


@pytest.mark.parametrize("kind", ["RobertaTokenizer", "PreTrainedTokenizerFast"])
def test_words_to_tag_are_read_as_in_a_text_or_refused(tmp_path, kind):
    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(["Marie habite a Lyon un chat"] * 9, 300, special_tokens=special, show_progress=False)
    facts = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in facts["merges"]]
    RobertaTokenizer(vocab=facts["vocab"], merges=merges).save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
    if kind == "RobertaTokenizer":
        ids = tokenizer_for(str(tmp_path), NAMES)(["Marie", "Lyon"], is_split_into_words=True)["input_ids"]
        assert ids == AutoTokenizer.from_pretrained(tmp_path)(" Marie Lyon")["input_ids"]
    else:
        with pytest.raises(ModelError, match="takes a word by itself for another than in a text"):
            tokenizer_for(str(tmp_path), NAMES)


def test_sequences_are_as_long_as_every_model_has_positions_for(tiny):
    assert longest_sequence([tiny], 1000) == 256
    assert longest_sequence([tiny, tiny], 100) == 100


@pytest.mark.parametrize(
    ("architecture", "several"), [("bert", {"type_vocab_size": 2}), ("distilbert", {}), ("camembert", {})]
)
def test_only_a_model_of_several_segments_is_told_them(architecture, several):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "dim": 8}
    if architecture == "distilbert":
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 8, "vocab_size": 20}
    elif architecture == "camembert":
        several = {"type_vocab_size": 1}
    model = AutoModelForQuestionAnswering.from_config(AutoConfig.for_model(architecture, **sizes, **several))
    batch = {name: torch.ones(1, 4, dtype=torch.long) for name in ("input_ids", "attention_mask", "token_type_ids")}
    read = read_by(model, batch | {"labels": torch.ones(1)})
    assert ("token_type_ids" in read) == (architecture == "bert")
    assert {"input_ids", "attention_mask"} <= set(read)
    model(**read)
