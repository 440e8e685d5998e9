"""launch/perplexity.py as users start it."""

import gzip
import json
import math

import pytest
import torch
from refusal import assert_refused
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

from distilcb.config import DEFAULT_RECIPE

pytestmark = pytest.mark.launch

MINI = DEFAULT_RECIPE.parent / "mini"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some of the shipped held-out text, as it is; compressed."""
    found = sorted((MINI / "text" / "heldout").glob("*.txt"))[0].read_text(encoding="utf-8")[:1500]
    path = tmp_path_factory.mktemp("text") / "text.txt.gz"
    path.write_bytes(gzip.compress(found.encode()))
    return path


@pytest.fixture(scope="module")
def model(text, tmp_path_factory):
    """A small GPT-2 with random weights and 32 positions, and its own byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("gpt2")
    bpe = ByteLevelBPETokenizer()
    words = [gzip.decompress(text.read_bytes()).decode()]
    bpe.train_from_iterator(words, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    GPT2TokenizerFast.from_pretrained(folder).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, initializer_range=0.3)).save_pretrained(folder)
    return folder


def test_one_and_two_ranks_give_what_transformers_gives_window_by_window(commands, model, text, tmp_path):
    words = [model, "--text", text, "--window", "16", "--stride", "4"]
    one = commands.python("perplexity", *words, "--json", tmp_path / "one.json")
    two = commands.deepspeed(2, "perplexity", *words, "--json", tmp_path / "two.json")
    for ended in (one, two):
        assert ended.returncode == 0, ended.stdout + ended.stderr
    ids = AutoTokenizer.from_pretrained(model)(gzip.decompress(text.read_bytes()).decode())["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    total = 0.0
    for place in range(1, len(ids)):
        stop = 16 if place < 16 else min(len(ids), 16 + 4 * ((place - 16) // 4 + 1))
        with torch.no_grad():
            logits = plain(torch.tensor([ids[max(0, stop - 16) : place]])).logits[0, -1]
        total -= logits.log_softmax(-1)[ids[place]].item()
    for name in ("one", "two"):
        (found,) = json.loads((tmp_path / f"{name}.json").read_text()).values()
        assert found["tokens"] == len(ids) - 1
        assert found["perplexity_a_token"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-4)
    assert two.stdout.count("bits a character") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--window", "33"], "--window 33: MODEL has positions for 32 tokens. Use 32 or less."),
        (["--window", "16", "--stride", "16"], "--stride 16: needed 1 to 15, less than the window of 16 tokens."),
        (["--stride", "0"], "came 0, needed a whole number, 1 or more"),
    ],
)
def test_windows_that_do_not_fit_are_refused(commands, model, text, words, said):
    assert_refused(commands.python("perplexity", model, "--text", text, *words), said.replace("MODEL", str(model)))


def test_an_encoder_is_refused(commands, text):
    ended = commands.python("perplexity", MINI / "teacher", "--text", text)
    assert_refused(ended, "is an encoder (camembert), which predicts masked words", "launch/evaluate.py")


def test_text_that_is_not_there_damaged_or_no_text_is_refused(commands, model, text, tmp_path):
    (tmp_path / "cut.txt.gz").write_bytes(text.read_bytes()[:-40])
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "short.txt").write_text("")
    for name, said in (("none.txt", "does not exist"), ("cut.txt.gz", "cut.txt.gz"), ("latin.txt", "is not UTF-8")):
        assert_refused(commands.python("perplexity", model, "--text", tmp_path / name), said)
    ended = commands.python("perplexity", model, "--text", tmp_path / "short.txt")
    assert_refused(ended, "the text has 0 token(s)", "needed 2 or more")
