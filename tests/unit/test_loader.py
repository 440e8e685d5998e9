"""A rank's share of a global batch: the same samples with the same masks, however the batch is cut."""

import multiprocessing.reduction
import pickle

import numpy as np
import pytest
import torch

from distilcb.config import REPOSITORY, MaskingConfig
from distilcb.data.blocks import Blocks
from distilcb.data.loader import Cut, HeldoutBatches, MicroBatches, make_batch, training_batches
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.prepare import prepare
from distilcb.data.tokenizer import TextTokenizer, Vocabulary

MASK, SEQ_LEN, ROWS = 99, 16, 100
TENSORS = ("input_ids", "labels", "labelled_rows", "other_rows")
VOCABULARY = Vocabulary(
    size=100,
    bos_id=0,
    eos_id=1,
    mask_id=MASK,
    special_ids=np.array([0, 1, 2, MASK]),
    word_start=np.ones(100, dtype=bool),
    fingerprint="a hundred tokens",
)


class NumberedBlocks:
    """Blocks in memory; the first inner tokens spell the row's number."""

    def __init__(self, rows=ROWS):
        self.tokens = np.random.default_rng(0).integers(3, 99, (rows, SEQ_LEN))
        self.tokens[:, 0], self.tokens[:, -1] = 0, 1
        self.token_counts = np.bincount(self.tokens.ravel(), minlength=100)

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        return self.tokens[rows]


BLOCKS = NumberedBlocks()


def masker(seed=0, **settings):
    return Masking(MaskingConfig(rate=0.2, **settings), VOCABULARY, BLOCKS.token_counts, seq_len=SEQ_LEN, seed=seed)


def micro_batches(cut, *, seed=0, fraction=1.0):
    return MicroBatches(BLOCKS, Order(ROWS, seed=seed, fraction=fraction), masker(seed), cut)


def step_of_all_ranks(step, *, global_batch, micro_batch, world_size, **settings):
    """(input_ids, labels, original tokens) of a step's samples, in the order of the global batch."""
    accumulation = global_batch // (micro_batch * world_size)
    shares = [micro_batches(Cut(global_batch, micro_batch, rank, world_size), **settings) for rank in range(world_size)]
    batches = [shares[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world_size)]
    originals = [restore(batch) for batch in batches]
    return (
        torch.cat([batch.input_ids for batch in batches]),
        torch.cat([batch.labels.view(micro_batch, -1) for batch in batches]),
        torch.cat(originals),
    )


def restore(batch):
    """The blocks of a batch before they were masked."""
    tokens = batch.input_ids.clone().view(-1)
    tokens[batch.labelled_rows] = batch.labels
    return tokens.view_as(batch.input_ids)


def assert_same(first, second):
    for name in TENSORS:
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.label_factor == second.label_factor


# How a global batch is cut


def test_micro_batches_are_dealt_to_ranks_in_turn():
    cuts = [Cut(global_batch=12, micro_batch=2, rank=rank, world_size=3) for rank in range(3)]
    assert [cut.accumulation for cut in cuts] == [2, 2, 2]
    assert [[cut.global_index(micro) for micro in range(2)] for cut in cuts] == [[0, 3], [1, 4], [2, 5]]
    assert cuts[1].positions(0, 0).tolist() == [2, 3]
    assert cuts[1].positions(0, 1).tolist() == [8, 9]
    assert cuts[2].positions(5, 1).tolist() == [70, 71]


SHAPES = [(1, 1), (24, 1), (1, 24), (2, 3), (3, 2), (4, 6), (12, 2), (8, 1)]


@pytest.mark.parametrize(("micro_batch", "world_size"), SHAPES)
def test_every_position_of_every_step_is_shown_once(micro_batch, world_size):
    cuts = [Cut(24, micro_batch, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 1000):
        shown = [cut.positions(step, micro) for cut in cuts for micro in range(cut.accumulation)]
        assert sorted(np.concatenate(shown).tolist()) == list(range(step * 24, step * 24 + 24))


def test_positions_stay_exact_far_into_a_long_run():
    cut = Cut(4096, 8, 3, 64)
    assert cut.positions(10**12, 0)[0] == 4096 * 10**12 + 24


@pytest.mark.parametrize("step", [0, 3, 4, 30])  # step 4 holds the end of the first epoch
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_the_samples_and_masks_of_a_step_do_not_depend_on_ranks_and_micro_batches(step, fraction):
    whole = step_of_all_ranks(step, global_batch=24, micro_batch=24, world_size=1, fraction=fraction)
    for micro_batch, world_size in SHAPES:
        cut = step_of_all_ranks(
            step, global_batch=24, micro_batch=micro_batch, world_size=world_size, fraction=fraction
        )
        for one, other in zip(whole, cut, strict=True):
            assert torch.equal(one, other)


def test_the_samples_of_a_run_do_not_depend_on_the_global_batch():
    def first_samples(global_batch):
        steps = [
            step_of_all_ranks(step, global_batch=global_batch, micro_batch=4, world_size=2)
            for step in range(120 // global_batch)
        ]
        return torch.cat([input_ids for input_ids, _, _ in steps])

    assert torch.equal(first_samples(8), first_samples(24))
    assert torch.equal(first_samples(8), first_samples(40))


def test_an_epoch_shows_every_block_once_and_the_next_one_with_other_masks():
    epochs = [
        [step_of_all_ranks(step, global_batch=20, micro_batch=5, world_size=2) for step in steps]
        for steps in (range(5), range(5, 10))
    ]
    lists = []
    for steps in epochs:
        originals = torch.cat([original for _, _, original in steps]).tolist()
        masked = torch.cat([input_ids for input_ids, _, _ in steps]).tolist()
        assert sorted(originals) == sorted(BLOCKS.tokens.tolist())
        lists.append({tuple(original): tuple(ids) for original, ids in zip(originals, masked, strict=True)})
    same = sum(lists[0][block] == lists[1][block] for block in lists[0])
    assert same < 10  # 3 of 14 tokens: one mask in 364 is drawn again


def test_the_seed_changes_samples_and_masks():
    first, second = (step_of_all_ranks(0, global_batch=24, micro_batch=4, world_size=2, seed=seed) for seed in (0, 1))
    assert sorted(first[2].tolist()) != sorted(second[2].tolist())


# What a batch holds


@pytest.mark.parametrize("whole_word", [False, True])
def test_masked_and_other_rows_together_are_all_rows_and_labels_stand_at_the_masked_ones(whole_word):
    masking, rows = masker(whole_word=whole_word), np.array([7, 3, 50, 7, 99])
    batch = make_batch(masking, BLOCKS.read(rows), rows, np.array([0, 0, 1, 2, 3]))
    assert batch.input_ids.shape == (5, SEQ_LEN)
    assert batch.labels.shape == batch.labelled_rows.shape == (5 * masking.k,)
    assert batch.other_rows.shape == (5 * (SEQ_LEN - masking.k),)
    together = torch.cat([batch.labelled_rows, batch.other_rows])
    assert torch.equal(together.sort().values, torch.arange(5 * SEQ_LEN))
    flat = torch.from_numpy(BLOCKS.tokens[rows]).reshape(-1)
    assert torch.equal(batch.labels, flat[batch.labelled_rows])
    assert torch.equal(batch.input_ids.view(-1)[batch.other_rows], flat[batch.other_rows])
    assert torch.equal(batch.labelled_rows // SEQ_LEN, torch.arange(5).repeat_interleave(masking.k))
    assert {getattr(batch, name).dtype for name in TENSORS} == {torch.int64}
    assert batch.label_factor == 1.0


def test_special_tokens_are_among_the_other_rows():
    rows = np.arange(ROWS)
    batch = make_batch(masker(), BLOCKS.read(rows), rows, np.zeros_like(rows))
    is_special = torch.isin(restore(batch).view(-1), torch.tensor([0, 1]))
    assert is_special[batch.other_rows].sum() == is_special.sum() == 2 * ROWS


def test_making_a_batch_does_not_change_the_store():
    before = BLOCKS.tokens.copy()
    make_batch(masker(), BLOCKS.tokens, np.arange(ROWS), np.zeros(ROWS, dtype=np.int64))
    assert np.array_equal(BLOCKS.tokens, before)


def test_a_batch_is_copied_whole_to_a_device():
    batch = micro_batches(Cut(8, 8, 0, 1))[0]
    assert_same(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).other_rows.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_pinned_batch_arrives_on_the_device_as_it_was():
    batch = micro_batches(Cut(8, 8, 0, 1))[0]
    pinned = batch.pin_memory()
    assert pinned.input_ids.is_pinned()
    moved = pinned.to(torch.device("cuda"))
    torch.cuda.synchronize()
    assert_same(moved.to(torch.device("cpu")), batch)


# Batches made ahead of time


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Blocks on disk, the masker for them and their order."""
    tokenizer = TextTokenizer(str(REPOSITORY / "recipes/mini/teacher"))
    folder = tmp_path_factory.mktemp("loader") / "blocks"
    prepare([str(REPOSITORY / "recipes/mini/text/heldout")], tokenizer=tokenizer, output=folder, seq_len=32)
    blocks = Blocks(folder)
    masking = Masking(MaskingConfig(), tokenizer.vocabulary, blocks.token_counts, seq_len=32, seed=1)
    return blocks, masking, Order(len(blocks), seed=1)


def load(data, first_step, last_step, workers=0):
    return list(training_batches(data, first_step=first_step, last_step=last_step, workers=workers, pin_memory=False))


def test_batches_come_in_order_from_a_first_step_on():
    cut = Cut(global_batch=12, micro_batch=2, rank=1, world_size=3)
    data = micro_batches(cut)
    batches = load(data, 3, 6)
    assert len(batches) == 3 * cut.accumulation
    for number, batch in enumerate(batches):
        step, micro = 3 + number // 2, number % 2
        rows = Order(ROWS, seed=0).row(cut.positions(step, micro))
        assert torch.equal(restore(batch), torch.from_numpy(BLOCKS.tokens[rows]))
        assert_same(batch, data[3 * cut.accumulation + number])


def test_a_resumed_loader_gives_what_an_uninterrupted_one_would():
    data = micro_batches(Cut(global_batch=10, micro_batch=5, rank=0, world_size=1))
    whole = load(data, 0, 25)  # two and a half epochs
    for first_step in (1, 9, 10, 17):
        resumed = load(data, first_step, 25)
        for one, other in zip(resumed, whole[2 * first_step :], strict=True):
            assert_same(one, other)


def test_a_run_that_is_done_has_no_batches_left():
    assert load(micro_batches(Cut(10, 5, 0, 1)), 7, 7) == []


def test_worker_processes_change_nothing(prepared):
    blocks, masking, order = prepared
    data = MicroBatches(blocks, order, masking, Cut(global_batch=8, micro_batch=2, rank=1, world_size=2))
    alone, helped = load(data, 2, 12), load(data, 2, 12, workers=2)
    for one, other in zip(alone, helped, strict=True):
        assert_same(one, other)


def test_a_batch_from_a_worker_comes_through_the_pipe_with_no_shared_memory():
    batch = micro_batches(Cut(global_batch=4, micro_batch=4, rank=0, world_size=1))[0]
    sent = bytes(multiprocessing.reduction.ForkingPickler.dumps(batch))
    assert len(sent) > batch.input_ids.numel() * 8  # the numbers themselves, no descriptor of them
    assert_same(pickle.loads(sent), batch)


def test_micro_batches_can_be_sent_to_a_process_that_is_not_a_fork(prepared):
    blocks, masking, order = prepared
    data = MicroBatches(blocks, order, masking, Cut(global_batch=8, micro_batch=2, rank=1, world_size=2))
    sent = pickle.dumps(data)
    assert len(sent) < 2_000_000  # the blocks stay on disk
    assert_same(pickle.loads(sent)[5], data[5])


def test_batches_from_disk_hold_the_blocks_of_the_order(prepared):
    blocks, masking, order = prepared
    cut = Cut(global_batch=6, micro_batch=3, rank=0, world_size=1)
    for number, batch in enumerate(load(MicroBatches(blocks, order, masking, cut), 0, 4)):
        rows = order.row(np.arange(number * 3, number * 3 + 3))
        assert np.array_equal(restore(batch).numpy(), blocks.read(rows))


# Held-out text


def heldout(number, *, micro_batch, world_size, rows=ROWS):
    """Row by row, what all ranks together see of the held-out blocks under one masking."""
    seen = {}
    for rank in range(world_size):
        batches = HeldoutBatches(
            NumberedBlocks(rows), masker(), micro_batch=micro_batch, rank=rank, world_size=world_size
        )
        for batch in batches.looking(number, of=8):
            assert len(batch.input_ids) <= micro_batch
            for original, ids in zip(restore(batch).tolist(), batch.input_ids.tolist(), strict=True):
                assert tuple(original) not in seen
                seen[tuple(original)] = ids
    return seen


@pytest.mark.parametrize(("micro_batch", "world_size"), [(7, 1), (100, 1), (8, 3), (1, 7), (64, 16)])
def test_held_out_blocks_are_seen_once_under_the_same_masks_however_they_are_cut(micro_batch, world_size):
    seen = heldout(0, micro_batch=micro_batch, world_size=world_size)
    assert sorted(seen) == sorted(map(tuple, BLOCKS.tokens.tolist()))
    assert seen == heldout(0, micro_batch=ROWS, world_size=1)


def test_more_ranks_than_held_out_blocks_are_no_fault():
    assert len(heldout(0, micro_batch=4, world_size=8, rows=3)) == 3


def test_a_masking_is_always_the_same_and_another_number_another():
    first, again, other = (heldout(number, micro_batch=8, world_size=2) for number in (3, 3, 4))
    assert first == again
    assert sum(first[block] == other[block] for block in first) < 10
