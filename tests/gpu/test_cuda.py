"""What only a CUDA device can show: fp16 under DeepSpeed's dynamic loss scaling, and the head's products there."""

import json
import subprocess
import sys

import pytest
import torch
import yaml

from distilcb.config import REPOSITORY
from distilcb.losses import reference
from distilcb.losses.head import HeadCoefficients, streamed_head

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, LABELLED, HIDDEN, VOCAB = 300, 60, 64, 5003


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 5e-3), (torch.bfloat16, 3e-2)])
def test_head_on_cuda_equals_float64_with_counts_of_two_million(dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(ROWS, HIDDEN, generator=generator).cuda().to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) / 4).cuda().to(dtype).requires_grad_()
    teacher = torch.randn(ROWS, HIDDEN, generator=generator).cuda().to(dtype)
    labels = torch.randint(0, VOCAB, (LABELLED,), generator=generator).cuda()
    coefficients = HeadCoefficients(kl=0.5 / 2_000_000, mlm=0.2 / 300_000)
    loss, _ = streamed_head(
        features,
        weight,
        None,
        labels=labels,
        coefficients=coefficients,
        temperature=2.0,
        teacher=(teacher, weight.detach(), None),
        chunk_rows=64,
    )
    scale = 2.0**16
    found = torch.autograd.grad(loss * scale, [features, weight])
    exact = [features.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    student = reference.logits(exact[0], exact[1], None)
    taught = reference.logits(teacher.double(), weight.detach().double(), None)
    wanted = torch.autograd.grad(
        coefficients.kl * reference.soft_target_kl(student, taught, temperature=2.0)
        + coefficients.mlm * reference.masked_lm(student[:LABELLED], labels),
        exact,
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert ((ours.double() / scale - theirs).norm() / theirs.norm()).item() < tolerance


@pytest.mark.launch
def test_fp16_run_overflows_recovers_and_follows_the_fp32_run(tmp_path):
    """The dynamic loss scale starts at 2^32 here, so the first steps must overflow and be skipped, not stop the run."""
    settings = json.loads((REPOSITORY / "ds_configs" / "zero2_fp16.json").read_text())
    settings["fp16"] |= {"initial_scale_power": 32, "hysteresis": 1}
    overflowing = tmp_path / "overflowing.json"
    overflowing.write_text(json.dumps(settings))
    fp16 = _train(tmp_path / "fp16", overflowing)
    fp32 = _train(tmp_path / "fp32", REPOSITORY / "ds_configs" / "zero2_cpu.json")
    skipped = sum(record["skipped_steps"] for record in fp16)
    assert 0 < skipped < len(fp16)
    assert fp16[-1]["loss_scale"] == 2.0 ** (32 - skipped)
    assert fp16[0]["loss"] == pytest.approx(fp32[0]["loss"], rel=1e-2)
    assert fp16[-1]["loss"] < fp16[0]["loss"]


def _train(run_dir, deepspeed_file):
    words = ["--run_dir", run_dir, "--deepspeed", deepspeed_file, "--train.steps", "40", "--train.log_every", "1"]
    command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), *map(str, words)]
    subprocess.run(command, check=True, timeout=600, cwd=REPOSITORY)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.launch
def test_an_automatic_micro_batch_fills_the_gpu_and_trains(tmp_path):
    """With most of the memory taken by somebody else a smaller one is found, and both fit."""
    found = []
    for taken_share in (0.0, 0.9):
        hog = torch.empty(int(taken_share * torch.cuda.mem_get_info()[0]), dtype=torch.uint8, device="cuda")
        words = ["--optim.micro_batch", "auto", "--optim.global_batch", "4096", "--train.steps", "2"]
        run_dir = tmp_path / f"taken_{taken_share}"
        command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--run_dir", str(run_dir), *words]
        subprocess.run(command, check=True, timeout=600, cwd=REPOSITORY)
        found.append(yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["micro_batch"])
        del hog
        torch.cuda.empty_cache()
    assert found[0] > found[1] >= 1
