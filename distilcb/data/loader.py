"""This rank's share of each global batch, made ahead of time; its only state is the number of the step."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distilcb.config import MaskingConfig
from distilcb.data.blocks import Blocks, BlockSource
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.tokenizer import Vocabulary
from distilcb.preemption import ignore_in_helper


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B blocks of L tokens, k of them masked in each.

    input_ids: (B, L) int64, masked.
    labels: (B*k,) int64, what stood at masked_rows.
    masked_rows: (B*k,) int64 indices into the B*L rows of the flattened batch.
    other_rows: (B*L - B*k,) int64, the rows that are not masked.
    """

    input_ids: Tensor
    labels: Tensor
    masked_rows: Tensor
    other_rows: Tensor

    def to(self, device: torch.device) -> "Batch":
        """A copy on the device, not waited for."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory (DataLoader calls it)."""
        return Batch(*(getattr(self, f.name).pin_memory() for f in fields(self)))


@dataclass(frozen=True)
class Cut:
    """How a global batch is cut: micro-batches of `micro_batch` sequences, dealt to ranks in turn."""

    global_batch: int
    micro_batch: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one optimizer step."""
        return self.global_batch // (self.micro_batch * self.world_size)

    def global_index(self, micro: int) -> int:
        """The number, within the global batch, of this rank's micro-batch `micro`."""
        return micro * self.world_size + self.rank

    def positions(self, step: int, micro: int) -> np.ndarray:
        """(micro_batch,) int64 positions of the run, counted over all steps, that this micro-batch shows."""
        start = step * self.global_batch + self.global_index(micro) * self.micro_batch
        return np.arange(start, start + self.micro_batch, dtype=np.int64)


class MicroBatches(Dataset):
    """Micro-batches by number: item i is micro-batch i % accumulation of step i // accumulation."""

    def __init__(self, blocks: BlockSource, order: Order, masking: Masking, cut: Cut) -> None:
        self.blocks, self.order, self.masking, self.cut = blocks, order, masking, cut

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.cut.accumulation)
        return self.at(self.cut.positions(step, micro))

    def at(self, positions: np.ndarray) -> Batch:
        """The samples at these positions of the run, as one batch."""
        rows = self.order.row(positions)
        return make_batch(self.masking, self.blocks.read(rows), rows, self.order.epoch(positions))


def make_batch(masking: Masking, blocks: np.ndarray, sample_ids: np.ndarray, epochs: np.ndarray) -> Batch:
    """Mask blocks (B, L) and lay out their rows; the mask of a sample depends on (seed, epoch, sample) alone."""
    masked = masking.apply(blocks, sample_ids, epochs)
    size, length = blocks.shape
    masked_rows = (masked.positions + (np.arange(size) * length)[:, None]).ravel()
    is_other = np.ones(size * length, dtype=bool)
    is_other[masked_rows] = False
    return Batch(
        torch.from_numpy(masked.input_ids),
        torch.from_numpy(masked.labels.ravel()),
        torch.from_numpy(masked_rows),
        torch.from_numpy(np.flatnonzero(is_other)),
    )


def training_batches(
    data: MicroBatches, *, first_step: int, last_step: int, workers: int, pin_memory: bool
) -> Iterator[Batch]:
    """This rank's micro-batches of steps first_step .. last_step - 1, in order, fetched ahead by `workers`."""
    accumulation = data.cut.accumulation
    loader: DataLoader[Batch] = DataLoader(
        data,
        batch_size=None,
        sampler=range(first_step * accumulation, last_step * accumulation),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_helper,
    )
    return iter(loader)


class HeldoutBatches:
    """The held-out blocks under fixed maskings, dealt to ranks in turn."""

    def __init__(self, blocks: BlockSource, masking: Masking, *, micro_batch: int, rank: int, world_size: int) -> None:
        self.blocks, self.masking, self.micro_batch = blocks, masking, micro_batch
        self._rows = np.arange(rank, len(blocks), world_size, dtype=np.int64)

    def masking_number(self, number: int) -> Iterator[Batch]:
        """This rank's share of the blocks under masking `number`, whose masks are always the same."""
        for start in range(0, self._rows.size, self.micro_batch):
            rows = self._rows[start : start + self.micro_batch]
            yield make_batch(self.masking, self.blocks.read(rows), rows, np.full_like(rows, number))


def fixed_heldout_batches(
    blocks: Blocks, vocabulary: Vocabulary, *, micro_batch: int, rank: int = 0, world_size: int = 1
) -> HeldoutBatches:
    """15 % of the tokens, all alike, from a fixed seed: the same words are asked whatever a run trains on."""
    seq_len = blocks.description.seq_len
    masking = Masking(MaskingConfig(smoothing=0.0), vocabulary, blocks.token_counts, seq_len=seq_len, seed=0)
    return HeldoutBatches(blocks, masking, micro_batch=micro_batch, rank=rank, world_size=world_size)
