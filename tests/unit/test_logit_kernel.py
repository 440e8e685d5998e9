"""The head's pass over logits, vectorised, in C++ and as a Triton kernel, against the plain terms in float64."""

import os
import subprocess
import sys

import pytest
import torch

from distilcb.losses import logit_cpu, logit_rows, reference
from distilcb.losses.logit_rows import LogitTerms, take_rows, take_rows_vectorised

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def kernel(monkeypatch):
    """take_rows_in_kernel; on a CPU in the interpreter, as tests/conftest.py asks for before Triton is loaded."""
    pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch and with .[dev]")
    import distilcb.losses.logit_kernel as module

    monkeypatch.setattr(module, "_BLOCK", 64)  # several blocks a row, the last not full
    return module.take_rows_in_kernel


@pytest.fixture
def in_cpp(with_native):
    """take_rows_in_cpp."""
    return logit_cpu.take_rows_in_cpp


ROWS, SOFT, VOCAB = 7, 5, 150


def logits(rows, seed, dtype=torch.float32, vocab=VOCAB, device=DEVICE):
    """As trained models spread them, in rows that lie further apart than they are long, each seed's otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocab + 10 + seed, generator=generator) + 5).to(device, dtype)[:, :vocab]


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


TERMS = [
    LogitTerms(kl=1.0, mlm=0.4, mse=0.0, temperature=2.0),
    LogitTerms(kl=1.0, mlm=0.0, mse=0.0, temperature=0.5),
    LogitTerms(kl=0.0, mlm=1.0, mse=0.0, temperature=1.0),
    LogitTerms(kl=0.2, mlm=0.0, mse=1.0, temperature=1.0),
    LogitTerms(kl=0.2, mlm=0.1, mse=1.0, temperature=4.0),
    LogitTerms(kl=0.0, mlm=0.1, mse=1.0, temperature=1.0),
]


@pytest.mark.parametrize("by", ["kernel", "vectorised"])
@pytest.mark.parametrize("scale", [None, 256.0])
@pytest.mark.parametrize("dtype", PRECISION)
@pytest.mark.parametrize("terms", TERMS)
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


@pytest.mark.parametrize("vocab", [1, 150, 5000])  # several blocks of 2,048 words, the last not full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", TERMS)
def test_a_pass_in_cpp_gives_the_sums_and_gradients_of_the_reference(in_cpp, terms, dtype, vocab):
    student, teacher = (logits(rows, rows, dtype, vocab, "cpu") for rows in (ROWS, SOFT))
    labels = torch.tensor([0, vocab - 1, vocab // 2])
    wanted, wanted_gradient = in_float64(student, teacher, labels, terms)
    found = in_cpp(student, teacher, labels, terms, True)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(
        student.double(), wanted_gradient, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )


def test_cpp_rounds_gradients_to_the_nearest(in_cpp):
    precise, rounded = (
        logits(ROWS, 1, torch.bfloat16, device="cpu").to(dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    teacher, labels = logits(SOFT, 2, torch.bfloat16, device="cpu"), torch.tensor([4, 0, 149])
    in_cpp(precise, teacher.float(), labels, TERMS[0], True)
    in_cpp(rounded, teacher, labels, TERMS[0], True)
    assert ((rounded.float() - precise).abs() <= 1.01 * 2**-8 * precise.abs() + 1e-7).all()
    assert (rounded != precise.bfloat16()).float().mean() < 0.01


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_in_cpp_adds_up_the_columns_of_what_it_writes(in_cpp, dtype, threads):
    student, teacher = (logits(rows, rows, dtype, 5000, "cpu") for rows in (ROWS, SOFT))
    columns, before = torch.full((5000,), 2.0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        in_cpp(student, teacher, torch.tensor([4, 0, 149]), TERMS[4], True, columns)
    finally:
        torch.set_num_threads(before)
    assert student.abs().max() > 0.01
    torch.testing.assert_close(columns.double(), 2 + student.double().sum(0), rtol=1e-6, atol=1e-5)


def test_far_apart_logits_have_an_exact_kl_in_cpp(in_cpp):
    student, teacher = logits(ROWS, 1, device="cpu") + 150, logits(SOFT, 2, device="cpu")
    terms, labels = LogitTerms(kl=1.0, mlm=0.0, mse=0.0, temperature=1.0), torch.empty(0, dtype=torch.int64)
    wanted, _ = in_float64(student, teacher, labels, terms)
    torch.testing.assert_close(in_cpp(student, teacher, labels, terms, True).double(), wanted, rtol=2e-6, atol=0)


def test_a_pass_in_cpp_does_not_depend_on_threads(in_cpp):
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            student, teacher = (
                logits(ROWS, 1, torch.bfloat16, device="cpu"),
                logits(SOFT, 2, torch.bfloat16, device="cpu"),
            )
            found.append((in_cpp(student, teacher, torch.tensor([4, 0, 149]), TERMS[0], True), student))
    finally:
        torch.set_num_threads(before)
    (sums, gradient), (other_sums, other_gradient) = found
    assert torch.equal(sums, other_sums)
    assert torch.equal(gradient, other_gradient)


def test_cpp_leaves_the_logits_alone_where_no_gradient_is_wanted_and_nothing_of_a_row_that_no_term_needs(in_cpp):
    student, teacher = logits(ROWS, 1, device="cpu"), logits(2, 2, device="cpu")
    before, terms = student.clone(), TERMS[0]
    labels = torch.tensor([4, 7, 9])
    sums = in_cpp(student, teacher, labels, terms, False)
    assert torch.equal(student, before)
    assert torch.equal(in_cpp(student, teacher, labels, terms, True), sums)
    assert student[:3].abs().sum(1).min() > 0.01
    assert student[3:].abs().max() == 0


def test_cpp_gives_zero_for_a_student_that_is_its_teacher(in_cpp):
    student, teacher = logits(ROWS, 1, device="cpu"), logits(ROWS, 1, device="cpu")
    terms = LogitTerms(kl=1.0, mlm=0.0, mse=1.0, temperature=2.0)
    assert in_cpp(student, teacher, torch.empty(0, dtype=torch.int64), terms, True).tolist() == [0, 0, 0]
    assert student.abs().max() == 0


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_not_lost_in_cpp(in_cpp, wrong):
    student, teacher = logits(2, 1, torch.bfloat16, device="cpu"), logits(2, 2, torch.bfloat16, device="cpu")
    student[1, 70] = wrong
    sums = in_cpp(student, teacher, torch.tensor([3, 3]), TERMS[0], True)
    assert not sums[:2].isfinite().any()
    assert student[0].isfinite().all()
    assert student[1].isnan().any()


def test_large_and_far_apart_logits_stay_in_range_in_cpp(in_cpp):
    student, teacher = torch.full((1, 3), -1e4), torch.full((1, 3), -1e4)
    student[0, 0], teacher[0, 1] = 1e4, 3e4
    sums = in_cpp(student, teacher, torch.tensor([2]), LogitTerms(kl=1.0, mlm=1.0, mse=0.0, temperature=1.0), True)
    assert sums.tolist() == [2e4, 2e4, 0]
    torch.testing.assert_close(student, torch.tensor([[2.0, -1.0, -1.0]]))


def test_a_label_outside_the_vocabulary_is_refused_in_cpp_and_nothing_is_written(in_cpp):
    student = logits(2, 1, device="cpu")
    before = student.clone()
    with pytest.raises(IndexError, match="1 of 2 labels"):
        in_cpp(student, None, torch.tensor([3, VOCAB]), LogitTerms(kl=0.0, mlm=1.0, mse=0.0, temperature=1.0), True)
    assert torch.equal(student, before)


HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("student", "teacher", "scale", "used"),
    [
        (logits(2, 1, HALF, device="cpu"), logits(2, 2, HALF, device="cpu"), None, True),
        (logits(2, 1, SINGLE, device="cpu"), logits(2, 2, SINGLE, device="cpu"), None, True),
        (logits(2, 1, SINGLE, device="cpu"), logits(2, 2, HALF, device="cpu"), None, False),
        (logits(2, 1, SINGLE, device="cpu"), logits(VOCAB, 2, SINGLE, vocab=2, device="cpu").t(), None, False),
        (logits(2, 1, torch.float16, device="cpu"), logits(2, 2, torch.float16, device="cpu"), None, False),
        (logits(2, 1, SINGLE, device="cpu"), logits(2, 2, SINGLE, device="cpu"), torch.tensor(8.0), False),
    ],
    ids=["bf16", "fp32", "mixed", "columns", "fp16", "scaled"],
)
def test_the_compiled_pass_is_taken_where_it_can_be(in_cpp, monkeypatch, student, teacher, scale, used):
    calls = []
    monkeypatch.setattr(logit_cpu, "take_rows_in_cpp", lambda *asked: calls.append(1) or in_cpp(*asked))
    student, plain, labels = student.clone(), student.clone(), torch.tensor([3])
    wanted = take_rows_vectorised(plain, teacher, labels, TERMS[0], scale, True)
    columns = torch.ones(student.shape[1])
    found = take_rows(student, teacher, labels, TERMS[0], scale=scale, columns=columns)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student, plain, rtol=2**-7, atol=1e-6)
    torch.testing.assert_close(columns, 1 + student.float().sum(0) / (1 if scale is None else scale))
    assert bool(calls) == used


@pytest.mark.parametrize("scale", [None, 256.0])
def test_columns_of_a_pass_in_parts_are_those_of_all_rows(without_native, monkeypatch, scale):
    monkeypatch.setattr(logit_rows, "_CACHED_BYTES", 2 * 4 * VOCAB)  # two rows a part
    student, teacher, columns = logits(ROWS, 1, device="cpu"), logits(SOFT, 2, device="cpu"), torch.ones(VOCAB)
    factor = None if scale is None else torch.tensor(scale)
    take_rows(student, teacher, torch.tensor([3]), TERMS[0], scale=factor, columns=columns)
    torch.testing.assert_close(columns, 1 + student.sum(0) / (scale or 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["with_native", "without_native"])
def test_columns_stay_as_they_are_where_no_gradient_is_wanted(request, way):
    request.getfixturevalue(way)
    columns, labels = torch.ones(VOCAB), torch.tensor([3])
    student, teacher = logits(ROWS, 1, device="cpu"), logits(SOFT, 2, device="cpu")
    take_rows(student, teacher, labels, TERMS[0], wants_gradient=False, columns=columns)
    assert torch.equal(columns, torch.ones(VOCAB))


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


@pytest.mark.parametrize(
    ("compiler", "named", "include", "told"),
    [
        (None, None, None, "no C compiler (gcc or clang)"),
        ("gcc", "icc", None, "no C compiler (icc)"),
        ("gcc", None, "nowhere", "no nowhere/Python.h"),
        ("gcc", None, None, ""),
        ("icc", "icc", None, ""),
    ],
)
def test_without_what_triton_compiles_with_torch_takes_the_pass_and_says_so(
    monkeypatch, caplog, tmp_path, compiler, named, include, told
):
    pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch and with .[dev]")
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    if named:
        monkeypatch.setenv("CC", named)
    monkeypatch.setattr(logit_rows.shutil, "which", lambda name: compiler if name == compiler else None)
    monkeypatch.setattr(logit_rows.sysconfig, "get_path", lambda *_: include or str(tmp_path))
    logit_rows._triton_is_here.cache_clear()
    try:
        assert logit_rows._triton_is_here() == (not told)
    finally:
        logit_rows._triton_is_here.cache_clear()
    assert told in caplog.text
    assert bool(caplog.text) == bool(told)


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
    pytest.importorskip("triton", reason="needs Triton, which comes with CUDA builds of torch and with .[dev]")
    environ = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environ["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    sizes = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [architecture for architecture, _ in sizes] == [70] * 4 + [80] * 4 + [90] * 4
    assert min(size for _, size in sizes) > 1000
