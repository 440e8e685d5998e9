"""The published job at its real size: camembert-base as the hub has it, with random weights."""

import json
import math
import shutil

import pytest
import torch
from hub_layout import CONFIG, VOCABULARY, write_camembert_base
from transformers import AutoTokenizer

from distilcb.config import REPOSITORY
from distilcb.data.tokenizer import TextTokenizer
from distilcb.errors import ModelError
from distilcb.models.loading import load_language_model
from distilcb.models.student import build_student
from distilcb.recipe import load_recipe

pytestmark = pytest.mark.launch

RECIPE = REPOSITORY / "recipes" / "distilcamembert.yaml"
SENTENCE = "Le camembert est un fromage."


@pytest.fixture(scope="module")
def camembert_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "camembert-base"
    weights = write_camembert_base(folder)
    yield folder, weights
    shutil.rmtree(folder)  # 500 MB


@pytest.fixture(scope="module")
def teacher(camembert_base):
    return load_language_model(str(camembert_base[0]), dtype=torch.float32)


@pytest.fixture(scope="module")
def base_options(camembert_base, commands):
    """The published recipe on this teacher, in micro-batches that a small machine holds."""
    folder, _ = camembert_base
    options = ["--recipe", str(RECIPE), "--teacher.model", str(folder), "--data.workers", "0"]
    return [*options, "--data.cache", str(commands.cache)]


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_weight_of_a_hub_folder_is_read_whatever_its_name_was(camembert_base, teacher):
    _, weights = camembert_base
    read = teacher.state_dict()
    unread = set()
    for name, value in weights.items():
        today = name.replace(".gamma", ".weight").replace(".beta", ".bias")
        if today not in read:
            unread.add(name)
        else:
            assert torch.equal(read[today], value), name
    pooler = {"roberta.pooler.dense.weight", "roberta.pooler.dense.bias"}  # which masked words never see
    assert unread <= pooler | {"roberta.embeddings.position_ids"}
    assert torch.equal(teacher.lm_head.decoder.bias, weights["lm_head.bias"])


def test_teacher_and_student_have_the_published_sizes(teacher):
    config = load_recipe(RECIPE)
    student, _ = build_student(config.student, teacher=teacher, vocab_size=VOCABULARY, seed=0)
    assert round(parameters(teacher) / 1e6, 1) == 110.7
    assert round(parameters(student) / 1e6, 1) == 68.1


@pytest.mark.parametrize("with_tokenizer_json", [False, True])
def test_the_tokenizer_of_a_hub_folder_has_camemberts_ids(camembert_base, tmp_path, with_tokenizer_json):
    for name in ("config.json", "sentencepiece.bpe.model"):
        shutil.copy(camembert_base[0] / name, tmp_path)
    if with_tokenizer_json:
        AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert (tmp_path / "tokenizer.json").is_file()
    else:
        assert not (tmp_path / "tokenizer.json").exists()
    tokenizer = TextTokenizer(str(tmp_path))
    vocabulary = tokenizer.vocabulary
    assert (vocabulary.size, vocabulary.mask_id) == (VOCABULARY, VOCABULARY - 1)
    assert (vocabulary.bos_id, vocabulary.eos_id) == (5, 6)
    assert tokenizer.hugging_face.decode(tokenizer.encode([SENTENCE])[0]) == SENTENCE


def test_a_pickled_hub_folder_needs_leave(tmp_path):
    folder = tmp_path / "camembert-base"
    weights = write_camembert_base(folder, pickled=True)
    with pytest.raises(ModelError, match=r"--teacher\.allow_pickle true"):
        load_language_model(str(folder), dtype=torch.float32)
    model = load_language_model(str(folder), dtype=torch.float32, allow_pickle=True)
    norm = model.roberta.encoder.layer[3].output.LayerNorm
    assert torch.equal(norm.weight, weights["roberta.encoder.layer.3.output.LayerNorm.gamma"])
    shutil.rmtree(folder)


def test_a_dry_run_says_what_the_published_job_costs_here(commands, base_options, tmp_path):
    words = ["--dry_run", "--optim.micro_batch", "1", "--run_dir", tmp_path / "run"]
    ended = commands.python("train", *base_options, *words)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "run.dry_run.json").read_text())
    assert (report["seq_len"], report["global_batch"], report["accumulation"]) == (512, 4096, 4096)
    # A model that knows nothing spreads its guesses over the vocabulary; kl then has nothing to tell it either.
    assert report["loss_at_start"]["mlm"] == pytest.approx(math.log(VOCABULARY), abs=0.25)
    assert 0 <= report["loss_at_start"]["kl"] < 0.5
    memory = report["memory_bytes"]
    half = {"bf16": 2, "fp32": 4}[report["precision"]]
    assert memory["teacher"] == pytest.approx(110.7e6 * half, rel=1e-3)
    assert memory["master_weights"] == pytest.approx(68.1e6 * 4, rel=1e-3)
    assert memory["optimizer_states"] == pytest.approx(2 * 68.1e6 * 4, rel=1e-3)
    parts = sum(value for part, value in memory.items() if part != "peak")
    assert parts == memory["peak"]
    hours = report["seconds_per_step"] * 30_000 / 3600
    assert report["projected_hours"] == pytest.approx(hours)
    for shown in ("projected_hours", "memory_bytes: teacher", "loss_at_start: mlm"):
        assert shown in ended.stdout
    assert not (tmp_path / "run").exists()


def test_the_published_job_ends_in_a_model_with_the_published_configuration(commands, base_options, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--run_dir", run_dir, "--data.train", commands.text / "heldout", "--data.seq_len", "64"]
    cut = ["--optim.global_batch", "2", "--optim.micro_batch", "1", "--train.steps", "1", "--optim.warmup", "0"]
    ended = commands.python("train", *base_options, *words, *cut)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    config = json.loads((run_dir / "student" / "config.json").read_text())
    expected = {name: value for name, value in CONFIG.items() if name != "output_past"} | {"num_hidden_layers": 6}
    assert {name: config.get(name) for name in expected} == expected
    shutil.rmtree(run_dir)
