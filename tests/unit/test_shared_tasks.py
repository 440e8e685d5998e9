"""The declared tasks beside the real rows, where they are there."""

import pytest
from transformers import AutoTokenizer

from distilcb.config import REPOSITORY
from distilcb.tasks.answers import answer_places
from distilcb.tasks.declarations import TASKS
from distilcb.tasks.encoding import encode
from distilcb.tasks.rows import TaskRows

FOLDER = REPOSITORY.parent / "shared" / "data" / "tasks"

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs ../shared/data, which holds the tasks")


def folder_of(name):
    return next((path for path in (FOLDER / name, FOLDER / "glue_en" / name) if path.is_dir()), None)


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_reads_its_rows(task):
    folder = folder_of(task.name)
    if folder is None:
        pytest.skip(f"needs ../shared/data/tasks/{task.name}")
    rows = TaskRows(str(folder))
    for split in ("train", rows.heldout_split()):
        found = rows.read(task, split, limit=1500)
        assert len(found) > 90
        assert set(found[0]) == set(task.needed_fields)


def test_the_answers_of_piaf_are_found_again_in_their_windows(mini_teacher):
    task = TASKS["piaf_qa"]
    rows = TaskRows(str(FOLDER / "piaf_qa")).read(task, "dev", limit=200)
    tokenizer = AutoTokenizer.from_pretrained(mini_teacher)
    encoded = encode(rows, task, tokenizer, max_length=160, stride=64)
    assert encoded.figures["sequences"] > 250
    assert encoded.figures["answers_in_no_window"] < 3
    exact = total = 0
    for window in encoded.windows:
        row = rows[window.row]
        place = answer_places(window, row["answers"])
        if place:
            given = row["context"][window.spans[place[0], 0] : window.spans[place[1], 1]].strip()
            assert row["answers"]["text"][0].strip() in given
            exact += given == row["answers"]["text"][0].strip()
            total += 1
    assert exact / total > 0.97  # a token may hold more than the answer's last sign
