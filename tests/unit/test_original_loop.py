"""benchmarks/original_loop.py: in fp16 it learns as in fp32, with a scaled loss."""

import importlib.util

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from distilcb.config import REPOSITORY


@pytest.fixture(scope="module")
def original():
    spec = importlib.util.spec_from_file_location("original_loop", REPOSITORY / "benchmarks" / "original_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("masked_only", [False, True])
def test_fp16_follows_fp32(original, tiny_model, masked_only):
    teacher, student = tiny_model(), tiny_model(layers=2, seed=1)
    loops = [
        original.OriginalLoop(teacher, student, device=torch.device("cpu"), dtype=dtype, masked_only=masked_only)
        for dtype in (torch.float32, torch.float16)
    ]
    batches = original.padded_batches([9, 10, 11, 12] * 4, size=4, vocab=101, seed=0)
    for _ in range(6):
        batch = next(batches)
        for loop in loops:
            torch.manual_seed(1)  # the masks
            loop.step([batch])
        assert loops[1].last == pytest.approx(loops[0].last, rel=2e-2)
    full, half, start = (
        parameters_to_vector(model.parameters()) for model in (loops[0].student, loops[1].student, student)
    )
    assert half.dtype == torch.float32
    assert (half - full).norm() < 0.2 * (full - start).norm()
    assert loops[1].scaler.get_scale() > 1
