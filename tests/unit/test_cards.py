"""What an evaluation puts into a student's model card."""

import pytest
import yaml

from distilcb.errors import ConfigError, ModelError
from distilcb.eval.speed import Timed
from distilcb.export.model_card import CardFacts, model_card, with_sections
from distilcb.finetune.cards import card_of, fill_card
from distilcb.finetune.evaluation_report import summary_of_task
from distilcb.tasks.declarations import TASKS

CARD = "---\nlicense: mit\n---\n\n# a model\n\n## Held-out text\n\nold\n\n## Settings\n\n| a | b |\n"


def seeds(*values):
    return {seed: {"figures": {"accuracy": value, "macro_f1": value}} for seed, value in enumerate(values)}


@pytest.fixture
def made():
    """As tasks/results.json holds it."""
    results = {"teacher": seeds(80.0, 82.0), "student": seeds(70.0, 74.0)}
    found = summary_of_task(results, ("accuracy", "macro_f1"), {"accuracy": 50.0}, teacher="teacher")
    read = {
        "split": "test",
        "max_length": 128,
        "heldout": {"rows": 2010},
        "train": {"rows": 4992},
        "first_rows_only": False,
    }
    found["read"] = {"teacher": read, "student": read}
    recipe = {"epochs": 3.0, "batch": 8, "lr": 5e-5}
    return {"models": dict.fromkeys(results, ""), "recipe": recipe, "tasks": {"xnli_fr": found}}


@pytest.fixture
def folder(tiny_model, tmp_path):
    model = tiny_model(layers=1)
    model.save_pretrained(tmp_path / "student")
    facts = CardFacts("student", "camembert-base", 5, 100, settings={"loss.kl": 0.5})
    (tmp_path / "student" / "README.md").write_text(model_card(model.config, facts), encoding="utf-8")
    return str(tmp_path / "student")


def test_a_section_goes_before_the_settings_and_replaces_its_like():
    once = with_sections(CARD, {"Tasks": "| first |"})
    assert once.index("## Held-out text") < once.index("## Tasks\n\n| first |\n\n") < once.index("## Settings")
    again = with_sections(once, {"Tasks": "| second |"})
    assert "first" not in again
    assert again == with_sections(CARD, {"Tasks": "| second |"})
    last = with_sections(again, {"Settings": "none", "Held-out text": "new"})
    assert "## Settings\n\nnone\n" in last
    assert "old" not in last
    assert "## Tasks\n\n| second |\n" in last


def test_a_card_without_settings_gets_its_section_at_the_end():
    assert with_sections("# a model\n", {"Tasks": "one"}) == "# a model\n\n## Tasks\n\none\n"


def test_what_was_found_is_in_the_card_and_its_front_matter(folder, made):
    for _ in range(2):  # a second evaluation takes the place of the first
        card = fill_card(folder, "student", made=made, tasks={"xnli_fr": TASKS["xnli_fr"]}, speed=None)
    text = card.read_text(encoding="utf-8")
    assert text.count("## Fine-tuned on tasks") == 1
    assert "| xnli_fr | accuracy | 72.00 ± 2.83 | 81.00 ± 1.41 | 88.9% (" in text
    assert "published" not in text  # a tiny model is no DistilCamemBERT
    assert text.index("## Fine-tuned on tasks") < text.index("## Settings")
    assert "over 2 seeds" in text
    assert "xnli_fr: trained on 4,992 rows, measured on 2,010 of test." in text
    front = yaml.safe_load(text.split("---\n")[1])
    (result,) = front["model-index"][0]["results"]
    assert front["model-index"][0]["name"] == "student"  # as the card calls it
    assert result["task"]["type"] == "text-classification"
    assert result["metrics"][0] == {"type": "accuracy", "value": 72.0, "name": "accuracy, mean over seeds"}
    assert result["dataset"] == {"name": "xnli_fr", "type": "xnli_fr", "split": "test"}
    assert front["pipeline_tag"] == "fill-mask"


def test_speeds_are_this_models_beside_its_teachers_wherever_they_lie(folder, made):
    facts = {"parameters": 2_500_000, "in_layers": 1, "bytes": {"model.safetensors": 10_000_000}}
    ours, other, onnx = "/scratch/me/runs/student", "/scratch/me/runs/other", "/scratch/me/runs/student, onnx"
    sizes = dict.fromkeys(["teacher", ours, other], facts)
    seconds = {"teacher": {"1 x 16": 0.02}, ours: {"1 x 16": 0.01}, onnx: {"1 x 16": 0.005}, other: {"1 x 16": 9.0}}
    speed = Timed(sizes, seconds, "teacher", (16, 512))
    for _ in range(2):
        text = fill_card(folder, ours, made=None, tasks={}, speed=speed).read_text(encoding="utf-8")
    section = text.split("## Size and speed")[1].split("## Settings")[0]
    assert "| its teacher | 2.5 M | 10.0 | 20.0, 1.00 |" in section
    assert "| this model | 2.5 M | 10.0 | 10.0, 2.00 |" in section
    assert "| this model, onnx |  | 0.0 | 5.0, 4.00 |" in section
    assert "Ratio: the time of its teacher over that of the row. Not timed: 512 tokens" in section
    assert "/scratch" not in text
    assert "other" not in section


def test_a_seed_that_diverged_is_told_in_the_card(folder, made):
    made["tasks"]["xnli_fr"]["models"]["student"]["diverged"] = [2]
    text = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    assert "Of xnli_fr seed 2 ended with a loss that was no number and counts nowhere." in text
    made["tasks"]["xnli_fr"]["models"]["student"]["one_label"] = [0, 1]
    text = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    assert "counts nowhere; seed 0, 1 gave every row the same label, and counts." in text
    made["tasks"]["xnli_fr"]["models"]["teacher"]["one_label"] = [1]
    text = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    assert "Its teacher: Of xnli_fr seed 1 gave every row the same label" in text


def test_a_model_that_lost_every_seed_keeps_what_its_card_has(folder, made):
    before = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    lost = {"teacher": seeds(80.0), "student": {0: {"diverged_at_step": 3}}}
    found = summary_of_task(lost, ("accuracy", "macro_f1"), {"accuracy": 50.0}, teacher="teacher")
    made["tasks"]["xnli_fr"] |= found
    assert fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8") == before


def test_of_different_numbers_of_seeds_the_least_and_the_most_are_told(folder, made):
    for number, name in enumerate(("allocine_fr", "pawsx_fr"), 3):
        results = {"teacher": seeds(80.0), "student": seeds(*[70.0] * number)}
        found = summary_of_task(results, ("accuracy", "macro_f1"), {"accuracy": 50.0}, teacher="teacher")
        made["tasks"][name] = found | {"read": made["tasks"]["xnli_fr"]["read"]}
    assert "over 2 to 4 seeds" in fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text()


def test_a_try_on_the_first_rows_says_so_and_is_not_told_to_the_hub(folder, made):
    made["tasks"]["xnli_fr"]["read"]["teacher"] |= {"train": {"rows": 60}, "first_rows_only": True}
    text = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    assert "xnli_fr: trained on 60 rows (the first ones only), measured on 2,010 of test." in text
    assert "| xnli_fr | accuracy | 72.00" in text
    assert "72.0" not in text.split("---\n")[1]
    assert "model-index" not in text


def test_a_student_of_distilcamemberts_size_has_the_published_row_beside_its_own(folder, made, tiny_model):
    config = tiny_model(layers=1).config
    config.num_hidden_layers, config.hidden_size = 6, 768
    config.save_pretrained(folder)
    text = fill_card(folder, "student", made=made, tasks=TASKS, speed=None).read_text(encoding="utf-8")
    assert "| 50.00 | 68 | 72.00 ± 2.83 (macro f1) |" in text
    assert "Size and speed" not in text


def test_a_folder_without_a_card_is_told_before_anything_is_measured(tmp_path):
    with pytest.raises(ConfigError, match=r"--card: .*README.md is not there"):
        card_of(str(tmp_path))


def test_front_matter_that_is_none_is_told_and_the_card_left_alone(folder, made):
    card = card_of(folder)
    card.write_text("---\nlicense: [mit\n---\n\n# a model\n", encoding="utf-8")
    before = card.read_bytes()
    with pytest.raises(ModelError, match="cannot be filled"):
        fill_card(folder, "student", made=made, tasks=TASKS, speed=None)
    assert card.read_bytes() == before
