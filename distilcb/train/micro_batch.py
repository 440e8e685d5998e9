"""optim.micro_batch: auto, made a number: the most sequences a pass that every rank's device holds.

On CUDA sizes are tried: the real models take a forward and a backward pass on random words, beside as much memory as
DeepSpeed will keep for itself, with plain layers also where train.compile is asked for. A size that runs out of memory
on one rank is out for all. The number goes into config.yaml, so that a run that goes on keeps it.
"""

from __future__ import annotations

import bisect
import copy
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distilcb.command_line import CommandLine
from distilcb.config import MOST_TOKENS, Config, even_sizes
from distilcb.data.blocks import RandomBlocks
from distilcb.data.loader import make_batch, task_of
from distilcb.distributed import all_reduce_sum
from distilcb.engine.deepspeed_config import DTYPES, bucket_numbers
from distilcb.engine.lessons import lessons
from distilcb.engine.step_module import StepModule
from distilcb.errors import ConfigError
from distilcb.losses.triplet import TERMS, Coefficients

if TYPE_CHECKING:
    from distilcb.train.build import Place
    from distilcb.train.models import Models

log = logging.getLogger(__name__)

# Left free for what fragments, NCCL and the libraries take.
_HEADROOM = 0.08


def settle_micro_batch(command: CommandLine, place: Place, models: Models, kept: int | None) -> CommandLine:
    """`command` with a number for optim.micro_batch; every rank must call it.

    Args:
        kept: what the run that goes on has used; taken again where it still cuts the batch evenly.

    Raises:
        ConfigError: not even one sequence fits.
    """
    config = command.config
    if config.optim.micro_batch != "auto":
        return command
    sizes = even_sizes(config, place.world.size, device_type=place.device.type)
    if kept in sizes:
        size, why = kept, "as the run began"
    elif place.device.type == "cuda":
        probe = _Probe(config, place, models)
        size, why = largest_that_fits(sizes, lambda size: _everywhere(probe.fits(size), place)), "the most that fits"
        if not size:
            raise ConfigError(
                f"optim.micro_batch: auto: not even {sizes[0]} sequence(s) of {config.data.seq_len} tokens fit beside "
                "the models. Use a smaller data.seq_len, more ranks (ZeRO shards what the optimizer keeps) or a larger "
                "GPU; or see who else uses this one."
            )
    else:
        size, why = sizes[-1], f"up to {MOST_TOKENS['cpu']:,} tokens a pass on a CPU"
    log.info("optim.micro_batch: %d (auto: %s)", size, why)
    return replace(command, config=replace(config, optim=replace(config.optim, micro_batch=size)))


def largest_that_fits(sizes: Sequence[int], fits: Callable[[int], bool]) -> int:
    """The largest of these ascending sizes that fits, where all below one that fits do; 0: none."""
    count = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[count - 1] if count else 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device refused memory, to torch itself or to a library under it, such as a handle of cuBLAS."""
    told = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in told or "alloc_failed" in told


def refused_memory(config: Config) -> ConfigError:
    """What a run is told whose passes are larger than the device's memory. config: with a number of sequences."""
    size = config.optim.sequences_a_pass
    less = f"--optim.micro_batch {size // 2}" if size > 1 else "a smaller data.seq_len, or a larger GPU"
    return ConfigError(
        f"optim.micro_batch={size} sequences of {config.data.seq_len} tokens: the GPU's memory does not hold them, or "
        f"somebody else uses it. Try {less}; --optim.micro_batch auto finds the most that fits."
    )


def _everywhere(fits: bool, place: Place) -> bool:
    """Whether it fits on every rank."""
    refused = all_reduce_sum(torch.tensor([float(not fits)], device=place.device))
    return not refused.item()


class _Probe:
    """Passes of the real models on random words."""

    def __init__(self, config: Config, place: Place, models: Models) -> None:
        self.config, self.place, self.models = config, place, models
        vocabulary, seq_len = models.tokenizer.vocabulary, config.data.seq_len
        self.blocks = RandomBlocks(vocabulary, seq_len=seq_len, blocks=MOST_TOKENS["cuda"])
        self.task = task_of(config.masking, vocabulary, self.blocks, seed=0)

    def fits(self, size: int) -> bool:
        """Whether a pass of `size` sequences fits here; leaves the device as it was."""
        try:
            self._pass(size)
            torch.cuda.synchronize()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            gc.collect()  # an exception's frames hold tensors
            torch.cuda.empty_cache()
        return True

    @torch.compiler.set_stance("force_eager")  # each size would be compiled
    def _pass(self, size: int) -> None:
        device, dtype = self.place.device, DTYPES[self.place.precision]
        module = StepModule(copy.deepcopy(self.models.student), self.models.family, self.config.loss).to(device, dtype)
        _kept = torch.empty(self._bytes_of_deepspeed(module), dtype=torch.uint8, device=device)
        rows = np.arange(size, dtype=np.int64)
        batch = make_batch(self.task, self.blocks.read(rows), rows, np.zeros_like(rows)).to(device)
        loss = self.config.loss
        (taught,) = lessons(self.models.teacher, [loss], batch)
        scalar, _sums = module(batch, taught, Coefficients(**{term: getattr(loss, term) for term in TERMS}))
        scalar.backward()

    def _bytes_of_deepspeed(self, module: torch.nn.Module) -> int:
        """What ZeRO 2 keeps on each rank beside weights and half-precision gradients, and the headroom."""
        count = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
        width = torch.finfo(DTYPES[self.place.precision]).bits // 8
        # fp32: master weights, two moments, and the sum of gradients over micro-batches.
        shards = 16 * count // self.place.world.size
        zero: dict[str, Any] = self.place.settings.get("zero_optimization", {})
        buckets = width * bucket_numbers(self.place.settings)
        buckets += width * min(count, int(zero.get("allgather_bucket_size", 5e8)))
        total = torch.cuda.get_device_properties(self.place.device).total_memory
        return shards + buckets + int(_HEADROOM * total)
