"""The head's pass over logits, vectorised and as a Triton kernel, against the plain terms in float64."""

import os
import subprocess
import sys

import pytest
import torch

from distilcb.losses import reference
from distilcb.losses.logit_rows import LogitTerms, take_rows_vectorised

triton = pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch and with .[dev]")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(monkeypatch):
    """take_rows_in_kernel; on a CPU in the interpreter, as tests/conftest.py asks for before Triton is loaded."""
    import distilcb.losses.logit_kernel as module

    monkeypatch.setattr(module, "_BLOCK", 64)  # several blocks a row, the last not full
    return module.take_rows_in_kernel


ROWS, SOFT, VOCAB = 7, 5, 150


def logits(rows, seed, dtype=torch.float32):
    """As trained models spread them, in rows that lie further apart than they are long."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, VOCAB + 10, generator=generator) + 5).to(DEVICE, dtype)[:, :VOCAB]


def in_float64(student, teacher, labels, terms):
    """Sums and gradient by the plain reference."""
    student, teacher = student.double().requires_grad_(), teacher.double()
    soft = student[: len(teacher)]
    sums = [
        reference.soft_target_kl(soft, teacher, temperature=terms.temperature) if terms.kl else 0 * student.sum(),
        reference.masked_lm(student[: len(labels)], labels) if terms.mlm else 0 * student.sum(),
        reference.logit_mse(soft, teacher) if terms.mse else 0 * student.sum(),
    ]
    loss = terms.kl * sums[0] + terms.mlm * sums[1] + terms.mse * sums[2]
    return torch.stack(sums).detach(), torch.autograd.grad(loss, student)[0]


# bf16: the interpreter cuts off where a GPU rounds.
PRECISION = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("by", ["kernel", "vectorised"])
@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize(
    "terms",
    [
        LogitTerms(kl=1.0, mlm=0.4, mse=0.0, temperature=2.0),
        LogitTerms(kl=1.0, mlm=0.0, mse=0.0, temperature=0.5),
        LogitTerms(kl=0.0, mlm=1.0, mse=0.0, temperature=1.0),
        LogitTerms(kl=0.2, mlm=0.0, mse=1.0, temperature=1.0),
        LogitTerms(kl=0.2, mlm=0.1, mse=1.0, temperature=4.0),
    ],
)
def test_a_pass_gives_the_sums_and_gradients_of_the_reference(kernel, terms, dtype, scale, by):
    student, teacher = logits(ROWS, 1, dtype), logits(SOFT, 2, dtype)
    labels = torch.tensor([0, VOCAB - 1, 64], device=DEVICE)
    wanted, wanted_gradient = in_float64(student, teacher, labels, terms)
    factor = None if scale is None else torch.tensor(scale, device=DEVICE)
    if by == "kernel":
        found = kernel(student, teacher, labels, terms, factor, True)
    else:
        found = take_rows_vectorised(student, teacher, labels, terms, factor, True)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    wanted_gradient *= scale or 1
    torch.testing.assert_close(
        student.double(),
        wanted_gradient,
        rtol=PRECISION[dtype],
        atol=(1e-7 if dtype != torch.float32 else 1e-6) * (scale or 1),
    )
    assert wanted_gradient.abs().max() > 0.01 * (scale or 1)


def test_kernel_leaves_the_logits_alone_where_no_gradient_is_wanted(kernel):
    terms = LogitTerms(kl=1.0, mlm=1.0, mse=0.0, temperature=2.0)
    student, teacher, labels = logits(ROWS, 1), logits(ROWS, 2), torch.tensor([4], device=DEVICE)
    before = student.clone()
    found = kernel(student, teacher, labels, terms, None, False)
    assert torch.equal(student, before)
    torch.testing.assert_close(
        found, take_rows_vectorised(before, teacher, labels, terms, None, False), rtol=2e-6, atol=1e-5
    )


def test_kernel_gives_zero_for_a_student_that_is_its_teacher(kernel):
    student = logits(ROWS, 1)
    terms = LogitTerms(kl=1.0, mlm=0.0, mse=0.0, temperature=2.0)
    sums = kernel(student, logits(ROWS, 1), torch.empty(0, dtype=torch.int64, device=DEVICE), terms, None, True)
    assert sums.tolist() == [0, 0, 0]
    assert student.abs().max() == 0


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from distilcb.losses.logit_kernel import _rows

flags = {"HAS_KL": True, "HAS_MSE": True, "HAS_SCALE": True, "WANTS_GRADIENT": True, "BLOCK": 4096}
whole = {name: "i32" for name in ("vocab", "student_stride", "teacher_stride", "rows", "soft_rows", "hard_rows")}
real = {name: "fp32" for name in ("inverse_temperature", "kl_factor", "mlm_factor", "mse_factor")}
for architecture, half in ((70, "fp16"), (80, "bf16"), (90, "fp16")):
    pointers = {"student": f"*{half}", "teacher": f"*{half}", "labels": "*i64", "scale": "*fp32", "sums": "*fp32"}
    signature = pointers | whole | real | {name: "constexpr" for name in flags}
    for without in ((), ("HAS_KL", "HAS_SCALE"), ("HAS_MSE", "WANTS_GRADIENT"), ("HAS_KL", "HAS_MSE")):
        source = ASTSource(fn=_rows, signature=signature, constexprs=flags | dict.fromkeys(without, False))
        made = compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": 8})
        print(architecture, len(made.asm["cubin"]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Triton's own assembler")
def test_the_kernel_compiles_for_volta_ampere_and_hopper_without_a_gpu(tmp_path):
    """What the interpreter does not look at: types that a compiler must settle."""
    environ = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sizes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [architecture for architecture, _ in sizes] == [70] * 4 + [80] * 4 + [90] * 4
    assert min(size for _, size in sizes) > 1000
