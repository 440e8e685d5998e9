"""One rank: python rank.py TEST_FILE FUNCTION FOLDER. Started by the fixture run_on_ranks, which see."""

import importlib.util
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

from distilcb.distributed import exit_code, stop
from distilcb.machine import use_own_tools

MEETING, ARGUMENTS, RESULT = "meeting", "arguments.pt", "result_{rank}.pt"


def main(words: list[str]) -> None:
    """Meet the other ranks over a file, call the function, keep what it returns."""
    use_own_tools()  # before DeepSpeed loads its operators: with another ninja it would compile them again
    import deepspeed
    import torch

    test_file, function, folder = Path(words[0]), words[1], Path(words[2])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / MEETING}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(minutes=2),
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    arguments = torch.load(folder / ARGUMENTS, weights_only=False)
    result = getattr(_load(test_file), function)(**arguments)
    torch.save(result, folder / RESULT.format(rank=rank))
    stop()


def _load(path: Path) -> Any:
    """A test module by its path: its name depends on how pytest was started."""
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(exit_code(main))
