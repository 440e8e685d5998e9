"""Tiny models and batches, built in code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launcher_environments import clean_environ

from distilcb import native
from distilcb.config import DEFAULT_RECIPE
from distilcb.data.loader import Batch
from distilcb.models.families import family_of

VOCAB, HIDDEN, LONGEST, PAD, MASK = 101, 32, 40, 1, 4


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Threads that share a product of this size wait for each other longer than it takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model():
    """Builds a language model in fp32, in eval mode, for 40 tokens at most: tiny_model("roberta", layers=3)."""
    return build_tiny_model


@pytest.fixture
def tiny_batch():
    """Builds a micro-batch of random tokens: tiny_batch(blocks=2, length=16, masked=4, seed=1)."""
    return build_tiny_batch


@pytest.fixture(scope="session")
def native_folder(tmp_path_factory) -> Path:
    """A folder of operators with our C++ as it stands."""
    folder = tmp_path_factory.mktemp("operators")
    environ = os.environ | {"TORCH_EXTENSIONS_DIR": str(folder)}
    environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environ["PATH"]])
    compile_it = "from distilcb import native; native.compile_here()"
    done = subprocess.run(
        [sys.executable, "-c", compile_it], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def with_native(monkeypatch, native_folder):
    """Our C++, taken wherever it can be."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(native_folder))
    native.library.cache_clear()
    assert native.library() is not None
    yield
    native.library.cache_clear()


@pytest.fixture
def without_native(monkeypatch, tmp_path):
    """Our C++, not compiled."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "no_operators"))
    native.library.cache_clear()
    assert native.library() is None
    yield
    native.library.cache_clear()


@pytest.fixture
def environ_of_nobody(monkeypatch):
    """os.environ without a trace of a launcher; what a test sets goes away after it."""
    for name in clean_environ().keys() ^ os.environ.keys():
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.fixture(scope="session")
def mini_teacher() -> str:
    """The folder of the teacher that the repository ships."""
    return str(DEFAULT_RECIPE.parent / "mini" / "teacher")


@pytest.fixture
def parameters_of():
    """Copies of a model's parameters by name."""
    return lambda model: {name: value.detach().clone() for name, value in model.named_parameters()}


def build_tiny_model(architecture="camembert", *, layers=4, seed=0, **config):
    from transformers import AutoConfig

    settings = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": LONGEST + PAD + 1,
        "type_vocab_size": 1,
        "pad_token_id": PAD,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoConfig.for_model(architecture, **(settings | config))
        model = family_of(made, where="test").model_class().from_config(made)
        # Fresh biases are all 0 and layer norms all 1: models that swapped or forgot some would look alike.
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.float().eval()


def build_tiny_batch(*, blocks=2, length=16, masked=4, seed=0, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(MASK + 1, vocab, (blocks, length), generator=generator)
    columns = torch.stack([torch.randperm(length, generator=generator)[:masked].sort().values for _ in range(blocks)])
    rows = (columns + torch.arange(blocks)[:, None] * length).flatten()
    labels = ids.flatten()[rows]
    ids.view(-1)[rows] = MASK
    is_other = torch.ones(blocks * length, dtype=torch.bool)
    is_other[rows] = False
    return Batch(ids, labels, rows, is_other.nonzero()[:, 0])
