"""What a run leaves for others: the student as a Hugging Face folder, and launch/export.py."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from refusal import assert_refused

from distilcb.config import DEFAULT_RECIPE

pytestmark = pytest.mark.launch

TEACHER = str(DEFAULT_RECIPE.parent / "mini" / "teacher")
SENTENCE = "La jeune <mask> se mit à pleurer."


@pytest.fixture(scope="module")
def trained(finished) -> Any:
    """The student as DeepSpeed saved it at the last step (in fp32, so these are the trained weights themselves)."""
    return student_of(finished / "checkpoints" / "step_00000006")


def student_of(checkpoint: Path) -> Any:
    from transformers import CamembertConfig, CamembertForMaskedLM

    model = CamembertForMaskedLM(CamembertConfig.from_pretrained(checkpoint.parent / "model"))
    saved = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    missing, unexpected = model.load_state_dict(
        {name.removeprefix("student."): weight for name, weight in saved.items()}, strict=False
    )
    assert set(missing) <= set(model._tied_weights_keys)
    assert unexpected == []
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(7, 8000, (2, 32), generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def test_the_exported_student_gives_the_trained_students_logits(finished, trained):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(finished / "student")
    assert type(model).__name__ == "CamembertForMaskedLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert model.config.num_hidden_layers == 6
    assert torch.equal(logits(model), logits(trained))


def test_the_exported_student_loads_as_an_encoder(finished, trained):
    from transformers import CamembertModel

    encoder = CamembertModel.from_pretrained(finished / "student", add_pooling_layer=False)
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, trained.roberta(ids).last_hidden_state)


def test_the_exported_folder_holds_the_teachers_tokenizer(finished):
    from transformers import AutoTokenizer, CamembertTokenizer

    teacher = AutoTokenizer.from_pretrained(DEFAULT_RECIPE.parent / "mini" / "teacher")
    student = CamembertTokenizer.from_pretrained(finished / "student")
    assert student(SENTENCE)["input_ids"] == teacher(SENTENCE)["input_ids"]
    config = json.loads((finished / "student" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (student.bos_token_id, student.eos_token_id) == (5, 6)


def test_the_exported_student_fills_masks_in_a_pipeline(finished):
    from transformers import pipeline

    answers = pipeline("fill-mask", model=str(finished / "student"), device="cpu")(SENTENCE)
    assert len(answers) == 5
    assert all(answer["token_str"] for answer in answers)


def test_the_exported_folder_can_be_read_by_others(finished):
    for path in [finished / "student", *(finished / "student").iterdir()]:
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_the_model_card_says_how_good_the_student_is(finished):
    card = (finished / "student" / "README.md").read_text()
    heldout = json.loads((finished / "summary.json").read_text())["heldout"]
    for figures in heldout.values():
        assert f"{figures['mlm_loss']:.3f}" in card
    assert "6 optimizer steps" in card
    assert "tokens of `train`." in card  # the shipped text's folder, wherever it lies here
    assert str(DEFAULT_RECIPE.parent) not in card
    assert card.startswith("---\nlanguage:\n- fr\nlibrary_name: transformers\nlicense: apache-2.0\n")


@pytest.fixture(scope="module")
def earlier(commands, finished, tmp_path_factory) -> Path:
    """The student after step 4, exported by command."""
    output = tmp_path_factory.mktemp("exported") / "student"
    ended = commands.python("export", finished, "--step", "4", "--output", output)
    assert ended.returncode == 0, ended.stderr
    assert str(output) in ended.stdout
    return output


def test_an_earlier_step_can_be_exported(finished, earlier):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(earlier)
    assert torch.equal(logits(model), logits(student_of(finished / "checkpoints" / "step_00000004")))
    last = AutoModelForMaskedLM.from_pretrained(finished / "student")
    assert not torch.equal(logits(model), logits(last))
    card = (earlier / "README.md").read_text()
    assert "4 optimizer steps" in card
    assert "## Held-out text" not in card  # the figures are of step 6


def test_an_output_that_is_there_is_refused_and_left_alone(commands, finished, earlier):
    before = {path: path.stat().st_mtime_ns for path in earlier.iterdir()}
    ended = commands.python("export", finished, "--output", earlier)
    assert ended.returncode == 2
    assert str(earlier) in ended.stderr
    assert "is there already" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert {path: path.stat().st_mtime_ns for path in earlier.iterdir()} == before


def test_a_step_without_checkpoint_is_refused_with_those_that_are_there(commands, finished, tmp_path):
    ended = commands.python("export", finished, "--step", "2", "--output", tmp_path / "student")
    assert ended.returncode == 2
    assert "Steps there: 4, 6" in ended.stderr
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_no_run_is_refused(commands, tmp_path):
    ended = commands.python("export", tmp_path, "--output", tmp_path / "student")
    assert ended.returncode == 2
    assert "no run folder" in ended.stderr


def test_the_student_before_its_first_step_is_exported_by_recipe(commands, tmp_path):
    from transformers import AutoModelForMaskedLM

    recipe, output = DEFAULT_RECIPE.parent / "mini.yaml", tmp_path / "student"
    words = ["--untrained", "--recipe", recipe, "--student.num_layers", "3", "--output", output]
    ended = commands.python("export", *words)
    assert ended.returncode == 0, ended.stderr
    model = AutoModelForMaskedLM.from_pretrained(output)
    teacher = AutoModelForMaskedLM.from_pretrained(DEFAULT_RECIPE.parent / "mini" / "teacher")
    assert model.config.num_hidden_layers == 3
    for own, layer in zip(model.roberta.encoder.layer, (0, 6, 11), strict=True):
        theirs = teacher.roberta.encoder.layer[layer]
        assert torch.equal(own.output.dense.weight, theirs.output.dense.weight)
    assert "before its training" in (output / "README.md").read_text()


def test_an_export_of_nothing_says_what_is_needed(commands, tmp_path):
    ended = commands.python("export", "--output", tmp_path / "student")
    assert ended.returncode == 2
    assert "needed a run folder" in ended.stderr


def test_a_student_is_exported_as_onnx_beside_its_weights(commands, finished, tmp_path):
    """And named again as a model, it gets int8 too, whose worth on held-out text stands beside the model's."""
    output = tmp_path / "student"
    ended = commands.python("export", finished, "--output", output, "--onnx")
    assert ended.returncode == 0, ended.stderr
    assert (output / "onnx" / "model.onnx").is_file()
    assert "student, onnx" in ended.stdout
    assert "onnx: of random tokens, logits differ from PyTorch's by at most" in ended.stdout
    again = commands.python("export", "--model", output, "--onnx", "--int8")
    assert again.returncode == 0, again.stderr
    assert "student, int8" in again.stdout
    sizes = [(output / "onnx" / name).stat().st_size for name in ("model.onnx", "model_int8.onnx")]
    assert sizes[1] < 0.5 * sizes[0]
    words = [output, "--teacher", TEACHER, "--int8", "--maskings", "2", "--output", tmp_path / "evaluation"]
    evaluated = commands.python("evaluate", *words)
    assert evaluated.returncode == 0, evaluated.stderr
    found = json.loads((tmp_path / "evaluation" / "results.json").read_text())
    assert found["settings"]["int8"] is True
    plain, small = (found["heldout"][f"{output}{kind}"] for kind in ("", ", int8"))
    assert f"{output}, int8" in evaluated.stdout
    assert 0 < abs(small["mlm_loss"] - plain["mlm_loss"]) < 0.05
    for band, of_words in plain["by_band"].items():
        assert 0 < abs(small["by_band"][band]["mlm_loss"] - of_words["mlm_loss"]) < 0.1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "needed a run folder"),
        (["RUN"], "needed --output"),
        (["RUN", "--output", "out", "--int8"], "--int8 is made of ONNX: add --onnx"),
        (["RUN", "--model", "RUN/student", "--onnx"], "run and model: give one of"),
        (["--model", "RUN/student"], "--model needs --onnx"),
        (["--model", "RUN/student", "--onnx", "--output", "out"], "leave --output and --step out"),
        (["--model", "RUN", "--onnx"], "no config.json there"),
    ],
)
def test_options_that_do_not_go_together_are_refused(commands, finished, tmp_path, words, told):
    ended = commands.python("export", *(word.replace("RUN", str(finished)) for word in words))
    assert_refused(ended, told)
    assert not (finished / "student" / "onnx").exists()
