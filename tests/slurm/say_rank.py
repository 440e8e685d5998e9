"""Meets the other ranks as training does, and prints on each who it is and a sum over all. --use_mpi asks mpi4py."""

import json
import platform
import sys

import torch

from distilcb import distributed


def main(words: list[str]) -> None:
    world = distributed.start(use_mpi="--use_mpi" in words)
    total = distributed.all_reduce_sum(torch.tensor([2.0**world.rank])).item()
    facts = {"source": world.source, "rank": world.rank, "size": world.size, "local_rank": world.local_rank}
    line = json.dumps(facts | {"host": platform.node(), "sum": total})
    print(f"\nRANK {line}", flush=True)
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    sys.exit(distributed.exit_code(main))
