"""This rank's share of each global batch, made ahead of time; its only state is the number of the step."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from distilcb.config import MaskingConfig
from distilcb.data.blocks import BlockSource
from distilcb.data.masking import Masking
from distilcb.data.next_token import NextToken
from distilcb.data.order import SampleOrder
from distilcb.data.tokenizer import Vocabulary
from distilcb.preemption import ignore_in_helper


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B blocks of L tokens, k of them with a label in each: masked, or followed by another one.

    input_ids: (B, L) int64, masked.
    labels: (B*k,) int64, what is to be predicted at labelled_rows.
    labelled_rows: (B*k,) int64 indices into the B*L rows of the flattened batch.
    other_rows: (B*L - B*k,) int64, the rows without a label.
    label_factor: what a sum over labels is multiplied with, so that divided by the most labels that a global batch can
        have it is their mean: 1 where every block has k. A causal model's have one less for each document's end.
    """

    input_ids: Tensor
    labels: Tensor
    labelled_rows: Tensor
    other_rows: Tensor
    label_factor: float = field(default=1.0, kw_only=True)

    def to(self, device: torch.device) -> "Batch":
        """A copy on the device, not waited for."""
        return self._with(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory (DataLoader calls it)."""
        return self._with(Tensor.pin_memory)

    def __reduce__(self) -> tuple[Any, ...]:
        """From a worker as plain numbers: torch would pass on a descriptor of shared memory for each tensor."""
        return _batch_of, ([tensor.numpy() for tensor in self._tensors], self.label_factor)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.input_ids, self.labels, self.labelled_rows, self.other_rows

    def _with(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*map(change, self._tensors), label_factor=self.label_factor)


def _batch_of(arrays: list[np.ndarray], label_factor: float) -> Batch:
    return Batch(*map(torch.from_numpy, arrays), label_factor=label_factor)


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

    def __init__(self, blocks: BlockSource, order: SampleOrder, task: Masking | NextToken, cut: Cut) -> None:
        self.blocks, self.order, self.task, self.cut = blocks, order, task, cut
        self._factor_of_step: tuple[int, float] = (-1, 1.0)

    def __getitem__(self, index: int) -> Batch:
        step, micro = divmod(index, self.cut.accumulation)
        return self.at(self.cut.positions(step, micro))

    def at(self, positions: np.ndarray) -> Batch:
        """The samples at these positions of the run, all of one step, as one batch."""
        rows = self.order.row(positions)
        batch = make_batch(self.task, self.blocks.read(rows), rows, self.order.epoch(positions))
        return replace(batch, label_factor=self._label_factor(int(positions[0]) // self.cut.global_batch))

    def _label_factor(self, step: int) -> float:
        """See Batch. Every rank reads the whole global batch for it: no rank need ask another, and no figure depends on
        how the batch is cut."""
        if isinstance(self.task, Masking):
            return 1.0
        if self._factor_of_step[0] != step:
            size = self.cut.global_batch
            rows = self.order.row(np.arange(step * size, (step + 1) * size, dtype=np.int64))
            parts = np.array_split(rows, -(-size // _COUNTED_BLOCKS))
            labels = sum(int(self.task.has_label(self.blocks.read(part)).sum()) for part in parts)
            self._factor_of_step = (step, size * self.task.k / labels)
        return self._factor_of_step[1]


# Blocks that are read at a time to count their labels.
_COUNTED_BLOCKS = 1024


def make_batch(task: Masking | NextToken, blocks: np.ndarray, sample_ids: np.ndarray, epochs: np.ndarray) -> Batch:
    """Lay out blocks (B, L) and their labels; the mask of a sample depends on (seed, epoch, sample) alone."""
    input_ids, labelled, labels = task.lay_out(blocks, sample_ids, epochs)
    is_other = np.ones(blocks.size, dtype=bool)
    is_other[labelled] = False
    other = np.flatnonzero(is_other)
    return Batch(*map(torch.from_numpy, (input_ids, labels, labelled, other)))


# Batches that each worker has ready.
FETCHED_AHEAD = 4


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
        prefetch_factor=FETCHED_AHEAD if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_in_helper,
    )
    return iter(loader)


class HeldoutBatches:
    """The held-out blocks, dealt to ranks in turn: all of them under each of several maskings, or a share of them at a
    time where nothing is masked."""

    def __init__(
        self, blocks: BlockSource, task: Masking | NextToken, *, micro_batch: int, rank: int, world_size: int
    ) -> None:
        self.blocks, self.task, self.micro_batch = blocks, task, micro_batch
        self._rows = np.arange(rank, len(blocks), world_size, dtype=np.int64)

    def looking(self, number: int, *, of: int) -> Iterator[Batch]:
        """This rank's share of the blocks at look `number`, which is always the same: under masking `number`, or each
        `of`-th block."""
        mine = self._rows if isinstance(self.task, Masking) else self._rows[self._rows % of == number]
        for start in range(0, mine.size, self.micro_batch):
            rows = mine[start : start + self.micro_batch]
            yield make_batch(self.task, self.blocks.read(rows), rows, np.full_like(rows, number))


def fixed_heldout_batches(
    blocks: BlockSource, vocabulary: Vocabulary, *, micro_batch: int, rank: int = 0, world_size: int = 1
) -> HeldoutBatches:
    """15 % of the tokens, all alike, from a fixed seed: the same words are asked whatever a run trains on.

    Of a causal model's tokenizer every token.
    """
    task = task_of(MaskingConfig(smoothing=0.0), vocabulary, blocks, seed=0)
    return HeldoutBatches(blocks, task, micro_batch=micro_batch, rank=rank, world_size=world_size)


def task_of(masking: MaskingConfig, vocabulary: Vocabulary, blocks: BlockSource, *, seed: int) -> Masking | NextToken:
    """What is predicted in these blocks: masked words, or the next one where the tokenizer is a causal model's."""
    if vocabulary.is_causal:
        return NextToken(vocabulary, blocks.seq_len)
    return Masking(masking, vocabulary, blocks.token_counts, seq_len=blocks.seq_len, seed=seed)
