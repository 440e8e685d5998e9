"""launch/evaluate.py --tasks as users start it, on tasks of a few rows and models of one and two layers."""

import json

import pytest
import seqeval.metrics
from refusal import assert_refused
from sklearn.metrics import accuracy_score, f1_score
from small_tasks import review, save_tiny, sentence, write

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of a teacher of two layers and a student of one."""
    folder = tmp_path_factory.mktemp("models")
    return save_tiny(folder / "big", 2), save_tiny(folder / "small", 1)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of tasks, one of them a folder deeper."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "deeper").mkdir()
    write(folder / "ner_fr", sentence, train=48)
    write(folder / "deeper" / "allocine_fr", review, train=48)
    write(folder / "ner_de", lambda number: sentence(number + 3), train=8, test=6)
    return folder


@pytest.fixture(scope="module")
def evaluated(commands, models, data, tmp_path_factory):
    """Two models on two tasks, two seeds: words, folder, how it ended."""
    teacher, student = models
    output = tmp_path_factory.mktemp("evaluated") / "output"
    words = [student, "--teacher", teacher, "--tasks", "ner_fr", "allocine_fr", "--data", data, "--seeds", 0, 1]
    words += ["--zero_shot", "ner_fr:ner_de", "--epochs", 5, "--lr", 3e-3, "--output", output, "--card"]
    return words, output, commands.python("evaluate", *words)


def results(output):
    return json.loads((output / "tasks" / "results.json").read_text(encoding="utf-8"))


def predictions(output, task, model, *, seed=0, name="predictions.jsonl"):
    file = output / "tasks" / task / model / f"seed_{seed}" / name
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def folder_of(model):
    return str(model).replace("/", "_").strip("_.")


def test_every_model_is_trained_on_every_task_with_every_seed(evaluated, models):
    _, output, ended = evaluated
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = results(output)["tasks"]
    assert list(found) == ["ner_fr", "allocine_fr"]
    for task in found.values():
        assert list(task["models"]) == ["teacher", str(models[1])]
        assert all(sorted(each["seeds"]) == ["0", "1"] for each in task["models"].values())
        assert task["models"][str(models[1])]["retained"]["share"] > 0
    assert found["ner_fr"]["models"]["teacher"]["mean"]["entity_f1"] > 90
    assert found["ner_fr"]["models"]["teacher"]["others"]["ner_de"]["mean"]["entity_f1"] > 90
    assert found["allocine_fr"]["floor"]["accuracy"] == 100  # words alone tell these films apart
    assert found["ner_fr"]["others"]["ner_de"]["floor"]["entity_f1"] > 0
    read = found["ner_fr"]["others"]["ner_de"]["read"][str(models[1])]
    assert (read["split"], read["heldout"]["rows"]) == ("test", 6)
    assert "<svg" in (output / "tasks" / "results.html").read_text(encoding="utf-8")
    page = (output / "tasks" / "results.md").read_text(encoding="utf-8")
    for part in ("ner_fr: entity f1", "allocine_fr: accuracy", "ner_fr → ner_de", "without pre-training"):
        assert part in page
        assert part in ended.stdout


def test_the_students_card_has_the_table_and_the_teachers_is_left_alone(evaluated, models):
    teacher, student = models
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "## Fine-tuned on tasks\n\n|  | metric | this model | its teacher | retained |" in card
    assert "| ner_fr | entity f1 |" in card
    assert "| ner_fr → ner_de | entity f1 |" in card
    assert "ner_fr → ner_de: measured on 6 of test." in card
    assert "One → other: learnt from the rows of the first" in card
    assert "model-index:" in card
    assert "Fine-tuned on tasks" not in (teacher / "README.md").read_text(encoding="utf-8")


def test_scores_are_those_of_the_predictions_that_are_kept(evaluated, models):
    """Computed again by other means."""
    _, output, _ = evaluated
    found, student = results(output)["tasks"], folder_of(models[1])
    films = predictions(output, "allocine_fr", student)
    right, given = ([line[name] for line in films] for name in ("right", "predicted"))
    figures = found["allocine_fr"]["models"][str(models[1])]["seeds"]["0"]
    assert figures["accuracy"] == pytest.approx(100 * accuracy_score(right, given))
    assert figures["macro_f1"] == pytest.approx(100 * f1_score(right, given, average="macro"))
    names = predictions(output, "ner_fr", student)
    right, given = ([line[name] for line in names] for name in ("right", "predicted"))
    figures = found["ner_fr"]["models"][str(models[1])]["seeds"]["0"]
    assert figures["entity_f1"] == pytest.approx(100 * seqeval.metrics.f1_score(right, given))
    spread = [
        (tag.rpartition("-")[2], said.rpartition("-")[2])
        for line in names
        for tag, said, count in zip(line["right"], line["predicted"], line["tokens"], strict=True)
        for _ in range(count)
    ]
    by_subword = f1_score(*zip(*spread, strict=True), average="weighted")
    assert figures["subword_f1"] == pytest.approx(100 * by_subword)
    elsewhere = predictions(output, "ner_fr", student, name="predictions_ner_de.jsonl")
    right, given = ([line[name] for line in elsewhere] for name in ("right", "predicted"))
    other = json.loads((output / "tasks" / "ner_fr" / student / "seed_0" / "result.json").read_text(encoding="utf-8"))
    assert set(other["made_with"]["versions"]) >= {"distilcb", "torch", "transformers", "seqeval"}
    assert other["others"]["ner_de"]["entity_f1"] == pytest.approx(100 * seqeval.metrics.f1_score(right, given))


def test_what_counts_as_right_is_what_the_rows_say(evaluated, models, data):
    _, output, _ = evaluated
    student = folder_of(models[1])
    for folder, task, name, target in (
        ("deeper/allocine_fr", "allocine_fr", "predictions.jsonl", "label"),
        ("ner_fr", "ner_fr", "predictions.jsonl", "tags"),
        ("ner_de", "ner_fr", "predictions_ner_de.jsonl", "tags"),
    ):
        rows = (data / folder / "test.jsonl").read_text(encoding="utf-8").splitlines()
        right = [line["right"] for line in predictions(output, task, student, name=name)]
        labels = {0: "negative", 1: "positive"}
        said = [json.loads(row)[target] for row in rows]
        assert right == [labels[each] if target == "label" else each for each in said]


def test_started_again_it_trains_only_what_is_missing(commands, evaluated, models):
    words, output, _ = evaluated
    before = results(output)
    missing = output / "tasks" / "allocine_fr" / "teacher" / "seed_1"
    for file in missing.iterdir():
        file.unlink()
    kept = output / "tasks" / "ner_fr" / "floor.json"  # as versions wrote it that made no floor of zero-shot
    facts = json.loads(kept.read_text())
    assert facts.pop("others")
    kept.write_text(json.dumps(facts))
    ended = commands.python("evaluate", *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "allocine_fr, teacher, seed 1: step" in ended.stderr
    assert ended.stderr.count(": step") == ended.stderr.count("allocine_fr, teacher, seed 1: step")
    assert results(output)["tasks"] == before["tasks"]


def test_a_further_model_and_task_join_what_is_there(commands, evaluated, models, data, tmp_path):
    words, output, _ = evaluated
    other = save_tiny(tmp_path / "other", 1)
    again = [other if word == models[1] else word for word in words]
    again[again.index("allocine_fr")] = f"ner_de={data / 'ner_de'}"
    ended = commands.python("evaluate", *again)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "ner_fr, teacher" not in ended.stderr  # finished before
    found = results(output)["tasks"]
    assert set(found["ner_fr"]["models"]) == {"teacher", str(other)}
    assert set(found) == {"ner_fr", "ner_de"}


def test_other_settings_or_another_model_of_that_name_are_refused(commands, evaluated, models):
    words, output, _ = evaluated
    assert_refused(commands.python("evaluate", *words, "--lr", 1e-4), "recipe.lr 0.003 there, 0.0001 now")
    kept = json.loads((output / "tasks" / "ner_fr" / "teacher" / "settings.json").read_text())
    (output / "tasks" / "ner_fr" / "teacher" / "settings.json").write_text(json.dumps({"content": "another"}))
    assert_refused(
        commands.python("evaluate", *words), "the rows or files of that name differ", "Name another --output"
    )
    (output / "tasks" / "ner_fr" / "teacher" / "settings.json").write_text(json.dumps(kept))


def test_a_model_whose_every_seed_diverged_is_told_after_the_others_are_done(commands, models, data, tmp_path):
    words = [models[1], "--tasks", "allocine_fr", "--data", data, "--seeds", 0, "--lr", 1e30, "--output", tmp_path]
    ended = commands.python("evaluate", *words, "--speed", "--lengths", 16)
    assert ended.returncode == 1
    assert f"no seed of {models[1]} on allocine_fr kept a finite loss" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ended with a loss that was no number" in (tmp_path / "tasks" / "results.md").read_text()
    assert "16 tokens: ms, ratio" in (tmp_path / "speed.md").read_text()
    assert "ended with a loss that was no number" in (tmp_path / "tasks" / "results.html").read_text()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--tasks", "ner_xx"], ["--tasks ner_xx: needed one of"]),
        (["--tasks", "xnli_fr"], ["no folder xnli_fr in", "xnli_fr=FOLDER"]),
        (["--tasks", "ner_fr=/nowhere"], ["--tasks ner_fr=/nowhere: no such folder"]),
        (["--tasks", "ner_fr", "ner_fr"], ["one stands there twice"]),
        (["--tasks", "ner_fr", "--zero_shot", "ner_fr:allocine_fr"], ["They must be the same"]),
        (["--tasks", "ner_fr", "--zero_shot", "ner_de:ner_fr"], ["ner_de is not among --tasks ner_fr"]),
        (["--tasks", "ner_fr", "--zero_shot", "ner_de"], ["needed NAME:NAME"]),
        (["--tasks", "ner_fr", "--maskings", "4"], ["--maskings is of held-out text"]),
        (["--seeds", "1"], ["--seeds is of labelled tasks"]),
        (["--tasks", "ner_fr", "--seeds", "1", "1"], ["--seeds 1 1: one stands there twice"]),
    ],
)
def test_a_mistake_ends_with_one_message(commands, models, data, tmp_path, words, parts):
    ended = commands.python("evaluate", models[1], "--data", data, "--output", tmp_path / "output", *words)
    if "--tasks" not in words:
        parts = [*parts, "--data is of labelled tasks"]
    assert_refused(ended, *parts)
    assert not list(tmp_path.rglob("result.json"))


def test_rows_without_labels_are_refused_before_anything_is_trained(commands, models, data, tmp_path):
    folder = write(tmp_path / "ner_fr", lambda number: {"tokens": ["Paris"]})
    words = [models[1], "--tasks", "allocine_fr", f"ner_fr={folder}", "--data", data, "--output", tmp_path / "output"]
    assert_refused(commands.python("evaluate", *words), "line 1", "tags")
    assert not list(tmp_path.rglob("result.json"))
