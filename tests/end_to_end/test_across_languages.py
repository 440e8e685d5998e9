"""Names across languages end to end: benchmarks/zero_shot.py, quickly."""

import json
import subprocess
import sys

import pytest

from distilcb.config import REPOSITORY

DATA = REPOSITORY.parent / "shared" / "data"

pytestmark = [
    pytest.mark.launch,
    pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data, which holds text and names"),
]


def test_a_multilingual_student_is_made_and_measured_in_languages_it_was_not_fine_tuned_in(tmp_path):
    words = ["--text", DATA / "corpus", "--tasks", DATA / "tasks", "--runs", tmp_path, "--json", tmp_path / "f.json"]
    ended = subprocess.run(
        [sys.executable, "benchmarks/zero_shot.py", "--quick", *map(str, words)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    found = json.loads((tmp_path / "f.json").read_text())["tasks"]["ner_en"]
    assert list(found["models"]) == ["teacher", "distilled", "random_weights"]
    assert list(found["others"]) == ["ner_fr", "ner_de"]
    for other, there in found["others"].items():
        assert 0 < there["floor"]["entity_f1"] < found["floor"]["entity_f1"]  # words of English tell less of others
        assert all(len(each["others"][other]["seeds"]) == 1 for each in found["models"].values())
    assert "| ner_en → ner_de | entity f1 |" in ended.stdout
