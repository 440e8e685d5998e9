"""The teacher's pass at camembert-base's size: bare module, deepspeed.init_inference, and as training has it on a CPU.

python benchmarks/teacher_inference.py [--quick] [--json FILE] [--report FILE] [--rounds 9]
"""

import copy
import statistics
import sys
from functools import partial
from typing import Any

import torch
from side_by_side import in_turn, parser_of, table, tell
from step import MINI, REAL, teacher_of

from distilcb import distributed
from distilcb.models.cpu_layers import PackedLinear, use_cpu_inference
from distilcb.models.teacher import Teacher

BARE = "bare module"


def main(words: list[str]) -> None:
    parser = parser_of(__doc__ or "")
    parser.add_argument("--rounds", type=int, help="turns of each (default: 9, with --quick 2)")
    options = parser.parse_args(words)
    distributed.start()
    device, rounds = distributed.device(), options.rounds or (2 if options.quick else 9)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    model = teacher_of(MINI if options.quick else REAL).to(device, dtype)
    contenders = {BARE: Teacher(model), "init_inference": Teacher(_with_deepspeed(model, dtype))}
    if device.type == "cpu":
        packed = Teacher(copy.deepcopy(model))
        use_cpu_inference(packed.model, packed.family.layers(packed.model))
        if any(isinstance(each, PackedLinear) for each in packed.model.modules()):  # not every CPU can
            contenders["packed weights, plain attention"] = packed
    figures: dict[str, Any] = {}
    parts = [measure(contenders, model, length, rounds, figures) for length in (128, 512)]
    tell(
        "The teacher's pass",
        "\n\n".join(parts),
        figures,
        options,
        "python benchmarks/teacher_inference.py " + " ".join(words),
    )
    distributed.stop()


def measure(contenders: dict[str, Teacher], model: Any, length: int, rounds: int, figures: dict[str, Any]) -> str:
    """All of them in turn on sequences of one length, as Markdown; ratios are medians turn by turn."""
    ids = torch.randint(7, model.config.vocab_size - 1, (1024 // length, length), device=model.device)
    turns = {name: partial(teacher.hidden, ids) for name, teacher in contenders.items()}
    seconds, lines = in_turn(turns, rounds=rounds), []
    for name, each in seconds.items():
        ratio = statistics.median(one / bare for one, bare in zip(each, seconds[BARE], strict=True))
        figures[f"{length} tokens: {name}"] = {"seconds": statistics.median(each), "time_over_bare": ratio}
        lines.append((name, f"{statistics.median(each) * 1e3:.0f}", f"{ratio:.2f}"))
    what = f"{len(ids)} sequences of {length} tokens, {str(model.dtype).removeprefix('torch.')}, {rounds} turns"
    return f"## {what}\n\n" + table(["", "ms", "bare = 1"], lines)


def _with_deepspeed(model: Any, dtype: torch.dtype) -> Any:
    import deepspeed

    engine = deepspeed.init_inference(copy.deepcopy(model), dtype=dtype, replace_with_kernel_inject=False)
    return engine.module


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
