"""What only a CUDA device can show: fp16, the head and fused Adam there, memory, and going on after a kill."""

import json
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml
from transformers import CamembertConfig, CamembertForMaskedLM

from distilcb.config import REPOSITORY, OptimConfig
from distilcb.engine.optimizer import build_optimizer
from distilcb.losses import reference
from distilcb.losses.head import HeadCoefficients, streamed_head
from distilcb.machine import find_compiler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS, LABELLED, HIDDEN, VOCAB = 300, 60, 64, 5003
# DeepSpeed compiles its fused Adam with nvcc; where there is none, torch's own takes its place, as in gpu_all.sh.
ADAM = [] if find_compiler() else ["--optim.name", "adamw_torch"]


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


@pytest.mark.parametrize("mse", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_head_never_waits_for_the_device(dtype, mse):
    features = torch.randn(ROWS, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCAB, (LABELLED,), device="cuda")

    def passes():
        coefficients = HeadCoefficients(kl=0.5, mlm=0.2, mse=mse)
        asked = {"labels": labels, "coefficients": coefficients, "temperature": 2.0, "chunk_rows": 64}
        loss, _ = streamed_head(features, weight, None, teacher=(features.detach(), weight.detach(), None), **asked)
        loss.backward()

    passes()  # kernels are compiled and loaded, which may wait
    waited = None
    torch.cuda.set_sync_debug_mode("error")
    try:
        passes()
    except RuntimeError as error:
        waited = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waited is None


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


@pytest.mark.launch
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
    """To fp16's rounding: a GPU's kernels may add up in another order each time."""
    settings = REPOSITORY / "ds_configs" / "zero2_fp16.json"
    whole = _train(tmp_path / "whole", settings)
    command = _command(tmp_path / "killed", settings, "--train.save_every", "5")
    with subprocess.Popen(command, cwd=REPOSITORY) as process:
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline and len(_losses(tmp_path / "killed")) < 12:
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "killed" / "DONE").exists()
    resumed = _train(tmp_path / "killed", settings, "--train.save_every", "5")
    assert [each["step"] for each in resumed] == [each["step"] for each in whole]
    assert [each["loss"] for each in resumed] == pytest.approx([each["loss"] for each in whole], rel=2e-2)


def _train(run_dir, deepspeed_file, *words):
    subprocess.run(_command(run_dir, deepspeed_file, *words), check=True, timeout=600, cwd=REPOSITORY)
    return _losses(run_dir)


def _command(run_dir, deepspeed_file, *words):
    words = ["--run_dir", run_dir, "--deepspeed", deepspeed_file, "--train.log_every", "1", *ADAM, *words]
    return [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--train.steps", "40", *map(str, words)]


def _losses(run_dir):
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [record for record in map(json.loads, filter(lambda line: line.endswith("\n"), lines)) if "loss" in record]


def test_deepspeeds_fused_adam_takes_torchs_steps():
    if find_compiler() is None:
        pytest.skip("needs nvcc, to compile DeepSpeed's fused Adam")
    stepped = []
    for name in ("adamw", "adamw_torch"):
        torch.manual_seed(0)
        module = torch.nn.Linear(300, 200).cuda()
        optimizer = build_optimizer(module, OptimConfig(name=name, weight_decay=0.01))
        for _ in range(5):
            for weight in module.parameters():
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        stepped.append(module.weight.detach())
    torch.testing.assert_close(*stepped, rtol=1e-5, atol=1e-7)


@pytest.mark.launch
def test_the_plan_tells_the_memory_of_a_step_within_15_per_cent(tmp_path):
    """At camembert-base's size, on random weights."""
    sizes = {"vocab_size": 32_005, "max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}
    CamembertForMaskedLM(CamembertConfig(**sizes)).save_pretrained(tmp_path / "teacher")
    for path in (REPOSITORY / "recipes" / "mini" / "teacher").iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, tmp_path / "teacher")
    recipe = ["--recipe", REPOSITORY / "recipes" / "distilcamembert.yaml", "--teacher.model", tmp_path / "teacher"]
    words = [*recipe, *ADAM, "--deepspeed", "zero2_fp16", "--optim.global_batch", "64", "--optim.micro_batch", "16"]
    plan = ["plan", *words, "--gpus", "1", "--gpu", "h100", "--json", tmp_path / "plan.json"]
    for program, *rest in (["train", *words, "--dry_run", "--run_dir", tmp_path / "run"], plan):
        command = [sys.executable, str(REPOSITORY / "launch" / f"{program}.py"), *map(str, rest)]
        subprocess.run(command, check=True, timeout=600, cwd=REPOSITORY)
    measured = json.loads((tmp_path / "run.dry_run.json").read_text())["memory_bytes"]["peak"]
    planned = json.loads((tmp_path / "plan.json").read_text())["memory_bytes"]["total"]
    assert planned == pytest.approx(measured, rel=0.15)


@pytest.mark.launch
def test_an_automatic_micro_batch_fills_the_gpu_and_trains(tmp_path):
    """With most of the memory taken by somebody else a smaller one is found, and both fit."""
    found = []
    free, whole = torch.cuda.mem_get_info()
    # What the probe keeps clear, a context, and about half of the 1.8 GB that the largest pass takes (plan/prediction).
    left = 0.08 * whole + 1.6e9
    for taken in (0, max(0, int(free - left))):
        hog = torch.empty(taken, dtype=torch.uint8, device="cuda")
        words = ["--optim.micro_batch", "auto", "--optim.global_batch", "4096", "--train.steps", "2", *ADAM]
        run_dir = tmp_path / f"taken_{taken}"
        command = [sys.executable, str(REPOSITORY / "launch" / "train.py"), "--run_dir", str(run_dir), *words]
        subprocess.run(command, check=True, timeout=600, cwd=REPOSITORY)
        found.append(yaml.safe_load((run_dir / "config.yaml").read_text())["optim"]["micro_batch"])
        del hog
        torch.cuda.empty_cache()
    assert found[0] > found[1] >= 1
