"""Our own C++, compiled ahead of time."""

import os
import subprocess
import sys

import torch

from distilcb import native
from distilcb.models import dropout

USE_IT = """
from distilcb import native
assert native.library() is None
native.compile_here()
assert native.library() is None
native.library.cache_clear()
print(native.library().distilcb_sign_16_bits.__name__)
"""


def test_it_lies_where_it_is_looked_for(native_folder, with_native):
    assert [path.name for path in native_folder.rglob("*.so")] == [f"{native.OPERATOR}.so"]


def test_a_process_looks_once(tmp_path):
    """A run that another compiles beside computes all its steps one way."""
    environ = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-c", USE_IT], env=environ, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "distilcb_sign_16_bits"


def test_every_source_and_header_is_part_of_its_name(monkeypatch, tmp_path):
    names = {native.OPERATOR}
    for files in ("_SOURCES", "_HEADERS"):
        assert len(getattr(native, files)) > 0
        changed = tmp_path / files
        changed.write_bytes(getattr(native, files)[0].read_bytes() + b"//")
        with monkeypatch.context() as patch:
            patch.setattr(native, files, [changed, *getattr(native, files)[1:]])
            names.add(native._name())
    assert len(names) == 3


def test_a_library_that_cannot_be_loaded_is_told_and_torch_taken(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / native.OPERATOR / f"{native.OPERATOR}.so"
    file.parent.mkdir()
    file.write_bytes(b"half a library")
    native.library.cache_clear()
    torch.manual_seed(1)
    signs = dropout.sign_dropped(torch.ones(4000), 0.5)
    native.library.cache_clear()
    assert 0.4 < (signs < 0).double().mean() < 0.6
    assert str(file) in caplog.text
