"""slurm/evaluate.sbatch on a real Slurm."""

import json

import pytest
from slurm_jobs import ONE_RANK_A_NODE

from distilcb.config import DEFAULT_RECIPE

TEACHER = str(DEFAULT_RECIPE.parent / "mini" / "teacher")


def test_the_tasks_of_a_job_evaluate_models_together(lab):
    output = lab.shared / "evaluation"
    words = (TEACHER, "--teacher", TEACHER, "--maskings", "2", "--output", output)
    job = lab.submit(*words, options=ONE_RANK_A_NODE, script="evaluate.sbatch")
    assert job.ended()["JobState"] == "COMPLETED", job.said()
    found = json.loads((output / "results.json").read_text())
    assert found["settings"]["ranks"] == 2
    assert found["heldout"][TEACHER]["kl"] == pytest.approx(0, abs=1e-6)
    assert 0.3 < found["heldout"][TEACHER]["mlm_accuracy"] < 0.7


def test_a_model_that_is_not_there_fails_the_job_with_one_message(lab):
    words = ("runs/nowhere", "--output", lab.shared / "nothing")
    job = lab.submit(*words, options=ONE_RANK_A_NODE, script="evaluate.sbatch")
    facts = job.ended()
    assert (facts["JobState"], facts["ExitCode"]) == ("FAILED", "2:0"), job.said()
    assert job.said().count("ModelError: ") == 1
