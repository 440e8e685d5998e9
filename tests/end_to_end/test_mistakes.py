"""Mistakes, made at the real entry points: one message that says what to do, exit code 2, nothing lost."""

import json
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest
from hub_layout import write_sentencepiece
from refusal import assert_refused
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, T5Config

from distilcb.config import DEFAULT_RECIPE

pytestmark = pytest.mark.launch

TEACHER = DEFAULT_RECIPE.parent / "mini" / "teacher"
# Where no hub answers, so that a machine with network tests the same.
NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "/nonexistent/hub"}

SETTINGS = {
    "an option that is none": (["--optim.learning_rate", "1"], ["--optim.learning_rate", "optim has name", "lr"]),
    "a misspelt option": (["--train.setps", "1"], ["--train.setps", "did you mean --train.steps?"]),
    "an option of no section": (["--lr", "1"], ["unknown option --lr", "optim.lr"]),
    "a value that is none": (["--optim.lr", "fast"], ["optim.lr"]),
    "several at once": (["--optim.lr", "-1", "--data.seq_len", "2"], ["2 faults", "optim.lr", "data.seq_len"]),
    "a recipe that is not there": (["--recipe", "recipes/none.yaml"], ["recipes/none.yaml"]),
    "a recipe that is a folder": (["--recipe", "recipes"], ["recipes", "Give a YAML file"]),
    "layers without brackets": (["--student.init_layers", "0,12"], ["layers 0 to 11", "[12]"]),
    "a word of no option": (["--train.steps", "5", "stray words"], ["'stray words'", "in quotes"]),
    "a run folder for a model": (["--teacher.model", "{finished}"], ["is a run folder. Give", "student"]),
    "a file for a model": (["--teacher.model", "{finished}/summary.json"], ["is a file", "Needed: a folder"]),
    "a folder without a tokenizer": (["--data.tokenizer", "{finished}/tensorboard"], ["needed one of tokenizer.json"]),
    "a run folder below a file": (["--run_dir", "{finished}/DONE/run"], ["cannot be written", "--run_dir"]),
    "a cache below a file": (["--data.cache", "{finished}/DONE/cache"], ["cannot be written", "--data.cache"]),
    "text of another kind": (["--data.train", "{finished}/*.json"], ["has no readable file", ".jsonl"]),
    "a temperature of zero": (["--loss.temperature", "0"], ["loss.temperature=0", "greater than 0"]),
    "a temperature below zero": (["--loss.temperature", "-2"], ["loss.temperature=-2", "greater than 0"]),
    "a masking rate of everything": (["--masking.rate", "1.5"], ["masking.rate=1.5", "less than or equal to 0.5"]),
    "shares of masks over 1": (["--masking.mask_share", "0.95"], ["masking.mask_share=0.95", "over 1"]),
    "a dropout of 1": (["--student.dropout", "1"], ["student.dropout=1", "less than 1"]),
    "a fraction of no text": (["--data.fraction", "0"], ["data.fraction=0", "greater than 0"]),
    "a batch that cannot be cut": (["--optim.micro_batch", "3"], ["optim.micro_batch=3", "6 or 9"]),
    "a DeepSpeed file that is not there": (["--deepspeed", "zero9"], ["deepspeed=zero9", "zero2_fp16.json"]),
    "fp16 without a GPU": (["--deepspeed", "zero2_fp16"], ["fp16 needs a CUDA device"]),
    "a layer that the teacher lacks": (["--student.init_layers", "[0,12]"], ["layers 0 to 11", "[12]"]),
    "a layer map of another length": (
        ["--student.init_layers", "[0,5,11]", "--student.num_layers", "2"],
        ["student.init_layers lists 3 layers, student.num_layers=2"],
    ),
    "blocks longer than the positions": (["--data.seq_len", "512"], ["data.seq_len=512", "Use 256 or less"]),
    "text that is not there": (["--data.train", "no/such/text"], ["no/such/text", "does not exist"]),
    "a teacher that is not there": (["--teacher.model", "./no_teacher"], ["./no_teacher", "does not exist"]),
    "a tokenizer that is not there": (["--data.tokenizer", "./none"], ["tokenizer folder ./none does not exist"]),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_mistake_ends_with_one_message_and_leaves_no_run_folder(commands, finished, tmp_path, mistake):
    words, parts = SETTINGS[mistake]
    words = [word.format(finished=finished) for word in words]
    ended = commands.python("train", "--run_dir", tmp_path / "run", *commands.small, *words)
    assert_refused(ended, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"optim:\n  lr: 1\n lr: 2\n", "not readable as YAML"),
        (b"\x00\xff\xfe", "not readable as YAML"),
        (b"optim:\n  lr: 1\n  lr: 2\n", "written twice"),
        (b"optim:\n  learning_rate: 1\n", "optim has name"),
        (b"- optim\n", "needed sections"),
        ("optim: # réglages\n".encode("latin-1"), "Save it as UTF-8"),
        (b"train: 5\n", "train=5: needed settings below it"),
    ],
)
def test_an_unreadable_recipe_is_refused(commands, tmp_path, content, told):
    recipe = tmp_path / "mine.yaml"
    recipe.write_bytes(content)
    ended = commands.python("train", "--recipe", recipe, "--data.train", "x.txt", "--run_dir", tmp_path / "run")
    assert_refused(ended, told)


def test_a_hub_name_without_network_is_told_how_to_use_a_folder(commands, tmp_path):
    words = ["--teacher.model", "almanach/camembert-base", "--run_dir", tmp_path / "run"]
    ended = commands.python("train", *commands.small, *words, environ=NO_NETWORK)
    assert_refused(ended, "almanach/camembert-base", "Without network", "give the local folder")


def test_a_data_set_of_the_hub_without_network_is_told_how_to_use_files(commands, tmp_path):
    words = ["--data.train", "hub:oscar-corpus/OSCAR-2301:fr", "--run_dir", tmp_path / "run"]
    offline = {"HF_HUB_OFFLINE": "1"}  # as on compute nodes; without it `datasets` tries for half a minute
    ended = commands.python("train", *commands.small, *words, environ=NO_NETWORK | offline)
    assert_refused(ended, "hub:oscar-corpus/OSCAR-2301:fr", "Without network", "give those files")


def test_an_architecture_that_is_not_supported_is_named_beside_those_that_are(commands, tmp_path):
    T5Config(num_layers=2).save_pretrained(tmp_path / "t5")
    ended = commands.python("train", *commands.small, "--teacher.model", tmp_path / "t5", "--run_dir", tmp_path / "r")
    assert_refused(ended, "'t5' is not supported", "camembert, roberta")


@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_an_objective_of_the_other_kind_is_refused(commands, tmp_path, kind):
    if kind == "encoder":
        words = ["--loss.mlm", "0", "--loss.clm", "0.2"]
        said = ["loss.clm=0.2: the student is an encoder (camembert)", "Give loss.mlm the weight"]
    else:
        folder = tmp_path / "gpt2"
        GPT2LMHeadModel(
            GPT2Config(vocab_size=8005, n_layer=2, n_embd=16, n_head=2, bos_token_id=5, eos_token_id=6)
        ).save_pretrained(folder)
        words = ["--teacher.model", folder, "--data.tokenizer", TEACHER]
        said = ["loss.mlm=0.2: the student is causal (gpt2)", "Give loss.clm the weight", "Leave data.tokenizer out"]
    ended = commands.python("train", *commands.small, *words, "--run_dir", tmp_path / "run")
    assert_refused(ended, *said)
    assert not (tmp_path / "run").exists()


def tokenizer_of(folder: Path, *, pieces: int) -> Path:
    """A CamemBERT tokenizer whose vocabulary has 5 more than `pieces`."""
    folder.mkdir()
    shutil.copy(TEACHER / "config.json", folder)
    write_sentencepiece(folder / "sentencepiece.bpe.model", pieces=pieces)
    return folder


def test_a_tokenizer_with_more_words_than_the_teacher_is_refused(commands, tmp_path):
    folder = tokenizer_of(tmp_path / "larger", pieces=9_000)
    ended = commands.python("train", *commands.small, "--data.tokenizer", folder, "--run_dir", tmp_path / "run")
    assert_refused(ended, "9005 tokens", "vocab_size 8005", "Leave data.tokenizer out")


def test_a_tokenizer_that_numbers_the_teachers_words_otherwise_is_refused(commands, tmp_path):
    folder = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.save_pretrained(folder)
    facts = json.loads((folder / "tokenizer.json").read_text())
    pieces = facts["model"]["vocab"]
    pieces[100], pieces[200] = pieces[200], pieces[100]
    (folder / "tokenizer.json").write_text(json.dumps(facts))
    ended = commands.python("train", *commands.small, "--data.tokenizer", folder, "--run_dir", tmp_path / "run")
    assert_refused(ended, "is not the tokenizer of teacher")


def test_blocks_made_with_another_tokenizer_are_refused(commands, tmp_path):
    tokenizer = tokenizer_of(tmp_path / "larger", pieces=9_000)
    words = ["--input", commands.text / "heldout", "--tokenizer", tokenizer, "--output", tmp_path / "blocks"]
    prepared = commands.python("prepare", *words, "--seq_len", "32")
    assert prepared.returncode == 0, prepared.stderr
    ended = commands.python(
        "train", *commands.small, "--data.train", tmp_path / "blocks", "--run_dir", tmp_path / "run"
    )
    assert_refused(ended, "prepared with another tokenizer", "Prepare the text again")


@pytest.mark.parametrize("content", ["", "\n\n \n", "Trop court.\n"])
def test_an_empty_corpus_is_refused(commands, tmp_path, content):
    text = tmp_path / "text.txt"
    text.write_text(content)
    ended = commands.python("train", *commands.small, "--data.train", text, "--run_dir", tmp_path / "run")
    assert_refused(ended, str(text), "fill no block of 32 tokens")


def test_without_a_compiler_the_way_round_is_told(commands, tmp_path):
    environ = {"PATH": str(Path(sys.executable).parent), "TORCH_EXTENSIONS_DIR": str(tmp_path / "none_compiled")}
    words = [*commands.small, "--run_dir", tmp_path / "run"]
    ended = commands.python("train", *words, environ=environ)
    assert_refused(ended, "fused Adam cannot be compiled or loaded", "g++", "--optim.name adamw_torch")
    other = ["--optim.name", "adamw_torch", "--train.steps", "2", "--fresh"]
    ended = commands.python("train", *words, *other, environ=environ)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run" / "DONE").is_file()


@pytest.mark.parametrize("command", ["prepare", "export"])
def test_an_output_that_cannot_be_written_is_told(commands, finished, command):
    output = finished / "DONE" / "output"
    words = {
        "prepare": ["--input", commands.text / "heldout", "--tokenizer", TEACHER, "--seq_len", "32"],
        "export": [finished],
    }
    assert_refused(commands.python(command, *words[command], "--output", output), str(output), "cannot be written")


def test_the_student_of_a_run_is_not_taken_for_the_run(commands, finished, tmp_path):
    ended = commands.python("export", finished / "student", "--output", tmp_path / "model")
    assert_refused(ended, "Give the run folder, not the student in it")


def test_text_in_another_encoding_is_told_and_survived(commands, tmp_path):
    text = tmp_path / "latin.txt"
    text.write_bytes("Été comme hiver, la forêt s'étend jusqu'à la rivière.\n".encode("latin-1") * 40)
    words = ["--input", text, "--tokenizer", TEACHER, "--output", tmp_path / "blocks", "--seq_len", "32"]
    ended = commands.python("prepare", *words)
    assert ended.returncode == 0, ended.stderr
    assert "40 of 40 documents are not UTF-8" in ended.stderr
    assert "iconv" in ended.stderr


def test_an_interrupted_run_says_how_to_go_on_without_a_traceback(commands, tmp_path):
    run_dir = tmp_path / "run"
    words = [*commands.small, "--train.steps", "500"]
    ended = commands.train_until_killed(run_dir, *words, after_step=3, by=signal.SIGINT)
    assert ended.returncode == 130
    assert "interrupted: what was saved stays" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (run_dir / "checkpoints" / "latest").is_file()


def test_a_finished_run_named_with_another_teacher_says_that_it_is_not_compared(commands, finished):
    words = ["--run_dir", finished, *commands.small, "--teacher.model", "another/teacher"]
    ended = commands.python("train", *words)
    assert ended.returncode == 0
    assert "nothing to do" in ended.stderr
    assert "not compared: teacher.model" in ended.stderr


def test_a_port_in_use_is_told_once(commands, tmp_path):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = commands.deepspeed(2, "train", *commands.small, "--run_dir", tmp_path / "run", port=port)
    assert ended.returncode == 2
    said = ended.stdout + ended.stderr
    assert said.count("LaunchError: port") == 1
    assert "Traceback (most recent call last)" not in said


def test_a_mistake_on_two_ranks_is_told_once(commands, tmp_path):
    ended = commands.deepspeed(2, "train", "--run_dir", tmp_path / "run", *commands.small, "--optim.lr", "-1")
    assert ended.returncode == 2
    assert (ended.stdout + ended.stderr).count("ConfigError") == 1
    assert "Traceback (most recent call last)" not in ended.stderr


def test_a_full_disk_ends_a_run_that_goes_on_once_there_is_space(commands, finished, metrics, tmp_path):
    run_dir = tmp_path / "run"
    commands.train_until_killed(run_dir, *commands.small, after_step=3)
    ended = commands.python_with_small_files(4_000, "train", "--run_dir", run_dir, *commands.small)
    assert_refused(ended, "step_00000004 cannot be written", "free some space")
    assert [path.name for path in (run_dir / "checkpoints").glob("step_*")] == ["step_00000002"]
    ended = commands.python("train", "--run_dir", run_dir, *commands.small)
    assert ended.returncode == 0, ended.stderr
    assert metrics(run_dir)[-1] == metrics(finished)[-1]


def test_a_loss_that_is_not_finite_ends_all_ranks_and_keeps_the_checkpoint(commands, tmp_path):
    """A learning rate that throws the weights out of fp32's range at the first step."""
    run_dir = tmp_path / "run"
    words = [*commands.small, "--optim.lr", "1e30", "--optim.warmup", "0", "--train.save_every", "1"]
    ended = commands.deepspeed(2, "train", "--run_dir", run_dir, *words)
    assert ended.returncode not in (0, 2)
    said = ended.stdout + ended.stderr
    assert said.count("TrainingError: step 2: loss term kl, mlm, cos is not finite on rank 0.") == 1
    assert "Traceback (most recent call last)" not in said
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000001\n"
    assert not (run_dir / "DONE").exists()


def test_a_second_start_in_the_folder_of_a_running_one_is_refused_and_spoils_nothing(commands, tmp_path, metrics):
    run_dir = tmp_path / "run"
    words = ["--run_dir", run_dir, *commands.small, "--train.steps", "60"]
    with commands.training(*words, until_step=2) as first:
        assert_refused(commands.python("train", *words), "trains there", str(first.pid))
        assert_refused(commands.python("train", *words, "--fresh"), "trains there")
        said = first.communicate(timeout=200)
    assert first.returncode == 0, said
    assert [line["step"] for line in metrics(run_dir) if "loss" in line] == list(range(1, 61))
    assert not (run_dir / ".lock").exists()


def test_a_folder_of_other_files_is_not_taken_for_a_run(commands, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    ended = commands.python("train", "--run_dir", tmp_path, *commands.small)
    assert_refused(ended, str(tmp_path), "--run_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
