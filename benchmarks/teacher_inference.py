"""The teacher as a bare module against deepspeed.init_inference, on the same batches in turn.

python benchmarks/teacher_inference.py [--model DIR] [--length 128] [--batch 16] [--rounds 9]
"""

import argparse
import copy
import statistics
import time
from typing import Any

import torch

from distilcb import distributed
from distilcb.config import REPOSITORY
from distilcb.models.loading import load_language_model
from distilcb.models.teacher import Teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(REPOSITORY / "recipes" / "mini" / "teacher"))
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    distributed.start()
    device = distributed.device()
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    model = load_language_model(options.model, dtype=dtype).to(device)
    contenders = {"bare module": Teacher(model), "init_inference": Teacher(_with_deepspeed(model, dtype))}
    ids = torch.randint(7, model.config.vocab_size - 1, (options.batch, options.length), device=device)
    rows = torch.arange(ids.numel(), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds + 2):  # two to warm up
        for name, teacher in contenders.items():
            seconds[name].append(_time(teacher, ids, rows))
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    print(f"{options.batch} x {options.length} tokens, {dtype}, {device}, median of {options.rounds}")
    for name, median in medians.items():
        print(f"{name:16} {median * 1e3:8.1f} ms  {median / medians['bare module']:.3f}")
    distributed.stop()


def _with_deepspeed(model: Any, dtype: torch.dtype) -> Any:
    import deepspeed

    engine = deepspeed.init_inference(copy.deepcopy(model), dtype=dtype, replace_with_kernel_inject=False)
    return engine.module


def _time(teacher: Teacher, ids: torch.Tensor, rows: torch.Tensor) -> float:
    if ids.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    teacher(ids, rows, wants_hidden=True)
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
