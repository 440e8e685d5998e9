"""Exported folders: what they hold, that others can load them, and that a wrong one is refused."""

import copy
import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForMaskedLM

from distilcb.config import Config, OptimConfig, TeacherConfig
from distilcb.data.tokenizer import load_tokenizer
from distilcb.engine.checkpoint import Checkpoint
from distilcb.errors import CheckpointError
from distilcb.export import hugging_face
from distilcb.export.hugging_face import export_checkpoint, prove, save_recipe_of_model, with_tokenizer_ids
from distilcb.export.model_card import CardFacts, model_card
from distilcb.hub import public_name
from distilcb.models.families import family_of
from distilcb.train import export as train_export
from distilcb.train.run_folder import RunFolder

BOS, EOS, PAD = 5, 6, 1  # CamemBERT's, and so the shipped tokenizer's
FACTS = CardFacts(name="a student", teacher="camembert-base", steps=1500, tokens=98_304_000)


@pytest.fixture(scope="module")
def tokenizer(mini_teacher):
    return load_tokenizer(mini_teacher)


@pytest.fixture
def model(tiny_model, tokenizer):
    """A student of two layers for the shipped vocabulary, with the wrong ids that the published DistilCamemBERT has."""
    return tiny_model(layers=2, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2)


@pytest.fixture
def exported(model, tokenizer, tmp_path):
    """A folder as exports write it, without a checkpoint."""
    folder = tmp_path / "exported"
    save_recipe_of_model(folder, model, tokenizer)
    recipe = (folder / "config.json").read_text(encoding="utf-8")
    model.save_pretrained(folder)
    (folder / "config.json").write_text(recipe, encoding="utf-8")
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def test_the_configuration_gets_the_tokenizers_bos_and_eos(model, tokenizer):
    config = with_tokenizer_ids(model.config, tokenizer)
    assert (config.bos_token_id, config.eos_token_id) == (BOS, EOS) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert type(config) is type(model.config)


def test_ids_that_a_tokenizer_does_not_have_stay_the_models(model, tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    config = with_tokenizer_ids(model.config, bare)
    assert (config.bos_token_id, config.eos_token_id) == (0, EOS)


@torch.no_grad()
def test_keeping_the_recipe_of_a_model_leaves_the_model_as_it_was(tiny_model, tokenizer, tmp_path):
    """Only rank zero keeps it; RoBERTa counts positions from the pad id, so ranks would come to read differently."""
    model = tiny_model(layers=2, vocab_size=len(tokenizer), pad_token_id=0)
    family, config = family_of(model.config, where="test"), model.config.to_dict()
    ids = torch.tensor([[BOS, 40, 41, EOS]])
    before = family.encode(model, ids)
    save_recipe_of_model(tmp_path, model, tokenizer)
    assert model.config.to_dict() == config
    assert torch.equal(family.encode(model, ids), before)


@torch.no_grad()
def test_an_export_counts_positions_as_its_model_did_in_training(tiny_model, tokenizer, tmp_path):
    model, ids = tiny_model(layers=2, vocab_size=len(tokenizer), pad_token_id=0), torch.tensor([[BOS, 40, 41, EOS]])
    save_recipe_of_model(tmp_path, model, tokenizer)
    again = AutoModelForMaskedLM.from_config(AutoConfig.from_pretrained(tmp_path)).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_recipe_of_a_model_is_its_configuration_and_tokenizer_without_weights(model, tokenizer, tmp_path):
    save_recipe_of_model(tmp_path / "not" / "there", model, tokenizer)
    files = {path.name for path in (tmp_path / "not" / "there").iterdir()}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= files
    assert not any(name.endswith((".safetensors", ".bin")) for name in files)
    config = config_of(tmp_path / "not" / "there")
    assert (config["bos_token_id"], config["eos_token_id"], config["num_hidden_layers"]) == (BOS, EOS, 2)


@torch.no_grad()
def test_an_exported_folder_loads_as_a_masked_language_model_with_the_same_logits(exported, model):
    again = AutoModelForMaskedLM.from_pretrained(exported)
    ids = torch.tensor([[BOS, 40, 41, 8004, EOS]])
    assert type(again).__name__ == "CamembertForMaskedLM"
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_an_exported_folder_loads_as_an_encoder_with_the_same_hidden_states(exported, model):
    from transformers import CamembertModel

    ids = torch.tensor([[BOS, 40, 41, EOS]])
    again = CamembertModel.from_pretrained(exported, add_pooling_layer=False)
    assert torch.equal(again(ids).last_hidden_state, model.roberta(ids).last_hidden_state)


def test_an_exported_tokenizer_gives_the_same_ids_however_it_is_loaded(exported, tokenizer):
    from transformers import AutoTokenizer, CamembertTokenizer

    text = "L'été, à Noël : un <mask> — «ÇA» ?"
    for cls in (AutoTokenizer, CamembertTokenizer):
        again = cls.from_pretrained(exported)
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (BOS, EOS, PAD)
        assert again.mask_token_id == tokenizer.mask_token_id


@torch.no_grad()
def test_an_exported_folder_fills_masks_in_transformers_pipeline(exported, model, tokenizer):
    from transformers import pipeline

    sentence = "Le camembert est <mask>."
    answers = pipeline("fill-mask", model=str(exported), device="cpu", top_k=3)(sentence)
    ids = torch.tensor([tokenizer(sentence)["input_ids"]])
    logits = model(ids).logits[0, ids[0].tolist().index(tokenizer.mask_token_id)]
    assert [answer["token"] for answer in answers] == logits.topk(3).indices.tolist()


def test_a_whole_folder_is_proved_without_a_word(exported, model, capsys):
    prove(exported, model)
    assert capsys.readouterr().out == ""


def alter(folder, name, change):
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "roberta.embeddings.word_embeddings.weight",
        "roberta.encoder.layer.1.attention.self.query.weight",
        "lm_head.layer_norm.bias",
        "lm_head.bias",
    ],
)
@pytest.mark.parametrize("change", [lambda w: w + 1e-2 * torch.randn_like(w), lambda w: torch.full_like(w, torch.nan)])
def test_weights_that_were_altered_on_disk_are_found_out(exported, model, name, change):
    alter(exported, name, change)
    with pytest.raises(CheckpointError, match="its logits differ by"):
        prove(exported, model)


@pytest.fixture
def recipe(model, tokenizer, tmp_path):
    save_recipe_of_model(tmp_path / "recipe", model, tokenizer)
    return tmp_path / "recipe"


@pytest.fixture
def export(model, recipe, tmp_path, monkeypatch):
    """Exports weights as if read from DeepSpeed's files; tests/end_to_end exports real ones."""

    def run(weights=None):
        given = dict(model.state_dict()) if weights is None else weights
        monkeypatch.setattr(hugging_face, "_fp32_weights", lambda _checkpoint: given)
        return export_checkpoint(tmp_path / "step_00000001", recipe, tmp_path / "output", FACTS)

    return run


def test_an_export_holds_weights_configuration_tokenizer_and_card(export):
    files = {path.name for path in export().iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "README.md"} <= files


@torch.no_grad()
def test_an_export_gives_the_models_logits_in_fp32(export, model):
    again = AutoModelForMaskedLM.from_pretrained(export())
    ids = torch.tensor([[BOS, 40, 41, EOS]])
    assert again.dtype == torch.float32
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_an_exported_configuration_has_the_tokenizers_ids(export):
    config = config_of(export())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (BOS, EOS, PAD)
    assert config["architectures"] == ["CamembertForMaskedLM"]
    assert config["dtype"] == "float32"


def test_others_may_read_an_export(export):
    """Folders made as temporary ones, and safetensors files, are their owner's alone unless told otherwise."""
    output = export()
    assert output.stat().st_mode & 0o777 == 0o755
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in output.iterdir())


@pytest.mark.parametrize("tied", ["lm_head.decoder.weight", "lm_head.decoder.bias"])
def test_a_tied_weight_may_be_missing(export, model, tied):
    weights = dict(model.state_dict())
    del weights[tied]
    output = export(weights)
    again = AutoModelForMaskedLM.from_pretrained(output).state_dict()
    assert torch.equal(again[tied], model.state_dict()[tied])


def test_a_missing_weight_is_an_error_that_names_it_and_leaves_nothing(export, model, tmp_path):
    weights = dict(model.state_dict())
    del weights["roberta.encoder.layer.1.output.dense.weight"]
    with pytest.raises(CheckpointError, match=r"missing \['roberta\.encoder\.layer\.1\.output\.dense\.weight'\]"):
        export(weights)
    assert [path.name for path in tmp_path.iterdir()] == ["recipe"]


def test_a_weight_that_the_model_does_not_have_is_an_error_that_names_it(export, model):
    with pytest.raises(CheckpointError, match=r"not known \['teacher\.weight'\]"):
        export(dict(model.state_dict()) | {"teacher.weight": torch.zeros(1)})


def test_an_export_replaces_the_one_before_it(export):
    (export() / "stray").touch()
    assert not (export() / "stray").exists()


def test_an_export_that_fails_leaves_the_one_before_it(export, tmp_path, monkeypatch):
    output = export()
    before = (output / "model.safetensors").read_bytes()

    def refuse(_folder, _model):
        raise CheckpointError("no")

    monkeypatch.setattr(hugging_face, "prove", refuse)
    with pytest.raises(CheckpointError):
        export()
    assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "recipe"]


def test_a_folder_that_is_no_checkpoint_is_a_checkpoint_error(model, tokenizer, tmp_path):
    save_recipe_of_model(tmp_path / "recipe", model, tokenizer)
    with pytest.raises(CheckpointError, match="cannot be read as a DeepSpeed checkpoint"):
        export_checkpoint(tmp_path / "step_00000001", tmp_path / "recipe", tmp_path / "output", FACTS)


TABLE = "| held-out text | loss |\n| --- | ---: |\n| student, end | 2.346 |"


def card(model, **changes):
    return model_card(model.config, CardFacts(**(vars(FACTS) | changes)))


def front_matter(text):
    first, front, rest = text.split("---\n", 2)
    assert first == ""
    assert rest.strip()
    return yaml.safe_load(front)


@pytest.mark.parametrize("teacher", ["camembert-base", None])
def test_a_cards_front_matter_is_yaml_that_says_what_the_model_is_for(model, teacher):
    front = front_matter(card(model, teacher=teacher, tags=("fr", "a: tag with a colon")))
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "fill-mask")
    assert front["tags"] == ["distillation" if teacher else "masked-lm", "fr", "a: tag with a colon"]


def test_a_cards_front_matter_has_what_the_hub_asks_for(model):
    facts = {"language": ("fr",), "license": "mit", "datasets": ("oscar",), "base_model": "camembert-base"}
    front = front_matter(card(model, **facts, widget=("Un <mask> noir.",)))
    assert (front["language"], front["license"], front["datasets"]) == (["fr"], "mit", ["oscar"])
    assert (front["base_model"], front["widget"]) == ("camembert-base", [{"text": "Un <mask> noir."}])
    assert front_matter(card(model)).keys() == {"library_name", "pipeline_tag", "tags"}


def test_a_causal_models_widget_is_what_stands_before_the_mask(model):
    text = model_card(model.config, CardFacts(**(vars(FACTS) | {"widget": ("Un chat <mask>.",)})), None)
    assert front_matter(text)["widget"] == [{"text": "Un chat"}]


def test_a_card_names_the_teacher_and_the_size_of_student_and_training(model):
    text = card(model)
    for fact in ("# a student\n", "`camembert-base`", "2 layers", "hidden size 32", "8,005", "1,500", "98,304,000"):
        assert fact in text
    told = card(model, text=("fr_train.txt.xz", "hub:oscar:fr:train"))
    assert "98,304,000 tokens of `fr_train.txt.xz`, `hub:oscar:fr:train`." in told
    assert "of `fr" not in card(model, text=("fr_train.txt.xz",), steps=0)


def test_a_student_without_a_teacher_is_not_called_distilled(model):
    assert "istil" not in card(model, teacher=None).replace("distilcb", "")


def test_a_card_shows_the_table_it_is_given_and_no_empty_section(model):
    assert f"\n## Held-out text\n\n{TABLE}\n\n" in card(model, table=TABLE)
    assert "Held-out" not in card(model)


def test_a_card_says_what_the_model_is_not_for(model):
    assert "## Limits\n\nIt reads 40 tokens at most. It knows the text that it and its teacher saw" in card(model)
    assert "its teacher" not in card(model, teacher=None)


def test_a_card_lists_every_setting_as_json(model):
    text = card(model, settings={"loss.kl": 0.5, "student.init_layers": [0, 1], "student.dropout": None})
    for line in ("| loss.kl | `0.5` |", "| student.init_layers | `[0, 1]` |", "| student.dropout | `null` |"):
        assert f"\n{line}\n" in text
    assert "Settings" not in card(model)


def test_the_python_lines_of_a_card_run(exported, model):
    """As written, but for the folder's name."""
    code = card(model).split("```python\n")[1].split("```")[0].replace("PATH_OF_THIS_FOLDER", str(exported))
    names: dict = {}
    exec(compile(code, "card", "exec"), names)
    assert names["fill"].model.config.num_hidden_layers == model.config.num_hidden_layers


@pytest.fixture
def run_folder(tmp_path):
    """A run folder with a configuration and nothing done."""
    folder = RunFolder(tmp_path / "a_run")
    folder.path.mkdir()
    folder.config.write_text("optim:\n  global_batch: 8\n", encoding="utf-8")
    return folder


def test_a_file_is_no_run_folder(run_folder):
    with pytest.raises(CheckpointError, match=r"config\.yaml is a file\. Give the folder of a run"):
        train_export.export_run(run_folder.config, step=None, output=run_folder.path / "output")


def test_a_folder_without_config_is_no_run_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no run folder: it has no config\.yaml\.$"):
        train_export.export_run(tmp_path, step=None, output=tmp_path / "output")


def test_the_runs_within_a_folder_are_named_and_a_folder_that_is_not_there_is_called_so(run_folder, tmp_path):
    with pytest.raises(CheckpointError, match=rf"no config\.yaml\. Give one of those in it: {run_folder.path}\.$"):
        train_export.export_run(tmp_path, step=None, output=tmp_path / "output")
    with pytest.raises(CheckpointError, match=r"runs/shrt does not exist\. Give the folder of a run"):
        train_export.export_run(tmp_path / "runs" / "shrt", step=None, output=tmp_path / "output")


def test_an_output_that_is_there_is_refused(run_folder, tmp_path):
    (tmp_path / "output").mkdir()
    with pytest.raises(CheckpointError, match="output is there already"):
        train_export.export_run(run_folder.path, step=None, output=tmp_path / "output")


@pytest.mark.parametrize("step", [None, 7])
def test_a_run_without_checkpoints_is_a_checkpoint_error_that_says_so(run_folder, tmp_path, step):
    with pytest.raises(CheckpointError, match="Steps there: none"):
        train_export.export_run(run_folder.path, step=step, output=tmp_path / "output")


def test_a_card_is_given_the_runs_name_teacher_tokens_and_the_settings_that_matter(run_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(train_export, "export_checkpoint", lambda *arguments: given.append(arguments))
    config = Config(teacher=TeacherConfig(model="a-teacher"), optim=OptimConfig(global_batch=8))
    checkpoint = Checkpoint(run_folder.checkpoints / "step_00000003", 3, 1)
    train_export.write_student(run_folder, checkpoint, config, {}, tmp_path / "output")
    ((path, model_folder, output, facts),) = given
    assert (path, model_folder, output) == (checkpoint.path, run_folder.model, tmp_path / "output")
    assert (facts.name, facts.teacher, facts.steps, facts.tokens) == ("a_run", "a-teacher", 3, 3 * 8 * 512)
    assert facts.table == ""
    assert facts.settings["optim.global_batch"] == 8
    assert {name.split(".")[0] for name in facts.settings} == {"loss", "masking", "optim", "student"}


def test_cards_name_no_folder_of_this_machine(tmp_path):
    (tmp_path / "text").mkdir()
    names = [str(tmp_path / "text"), f"hub:{tmp_path}/text:x:train", "/not/here/corpus.txt", "hub:/not/here:x", "a/b"]
    assert [public_name(name) for name in names] == ["text", "text", "corpus.txt", "here", "a/b"]
    assert public_name("hub:oscar:fr:train") == "hub:oscar:fr:train"
