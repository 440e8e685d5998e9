"""Several languages in one run: shares kept exactly, each language used up before it comes again, nothing by lot."""

import itertools
import pickle

import numpy as np
import pytest
import torch

from distilcb.config import MaskingConfig
from distilcb.data import languages
from distilcb.data.languages import (
    LanguageBlocks,
    LanguageOrder,
    check_languages,
    order_of,
    quotas_of,
    shares_of,
)
from distilcb.data.loader import Cut, MicroBatches, training_batches
from distilcb.data.masking import Masking
from distilcb.data.order import Order
from distilcb.data.tokenizer import Vocabulary
from distilcb.errors import DataError

SIZES = [400, 30, 7]
EXPONENTS = [0.0, 0.3, 0.7, 1.0]
TENSORS = ("input_ids", "labels", "labelled_rows", "other_rows")
WORDS, SEQ_LEN, MASK = 60, 12, 59
VOCABULARY = Vocabulary(WORDS, 0, 1, MASK, np.array([0, 1, MASK]), np.ones(WORDS, dtype=bool), "sixty words")


class Language:
    """Blocks in memory, of words that its number moves up; each block is another one."""

    seq_len = SEQ_LEN

    def __init__(self, number, blocks):
        random = np.random.default_rng(number)
        self.tokens = 2 + 15 * number + random.integers(0, 25, (blocks, SEQ_LEN)).astype(np.int64)
        self.tokens[:, 0], self.tokens[:, -1] = 0, 1
        self.token_counts = np.bincount(self.tokens.ravel(), minlength=WORDS)
        self.content = f"language {number}"

    def __len__(self):
        return len(self.tokens)

    def read(self, rows):
        return self.tokens[rows]


def blocks_of(exponent, sizes=SIZES):
    return LanguageBlocks([Language(number, size) for number, size in enumerate(sizes)], exponent=exponent)


def order(exponent, sizes=SIZES, *, seed=3, fraction=1.0):
    return LanguageOrder(sizes, exponent=exponent, seed=seed, fraction=fraction)


def shown_of_each(rows, sizes=SIZES):
    """How many of these rows belong to each language."""
    return np.bincount(np.searchsorted(np.cumsum(sizes), rows, side="right"), minlength=len(sizes)).tolist()


# Shares


def test_shares_are_powers_of_the_sizes():
    assert shares_of([16, 1], 0.5) == pytest.approx([0.8, 0.2])
    assert shares_of([16, 4, 1], 0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert shares_of(SIZES, 1.0) == pytest.approx([size / 437 for size in SIZES])
    assert shares_of(SIZES, 0.0) == pytest.approx([1 / 3] * 3)


def test_a_thousand_times_the_text_is_shown_a_hundred_times_as_often_at_multilingual_berts_exponent():
    english, icelandic = shares_of([1_000_000, 1000], 0.7)
    assert english / icelandic == pytest.approx(10**2.1)  # "only sampled 100x more", as its authors round it


@pytest.mark.parametrize("places", [437, 10_000, 1 << 20])
@pytest.mark.parametrize("exponent", EXPONENTS)
def test_quotas_are_whole_and_within_one_of_their_share(exponent, places):
    shares = shares_of(SIZES, exponent)
    quotas = quotas_of(shares, places)
    assert sum(quotas) == places
    for quota, share in zip(quotas, shares, strict=True):
        assert abs(quota - share * places) < 1


def test_a_language_of_less_than_a_place_has_one_and_the_largest_pays():
    assert quotas_of([0.9999, 0.00005, 0.00005], 100) == (98, 1, 1)
    assert quotas_of([1 / 3] * 3, 10) == (4, 3, 3)
    assert quotas_of([0.25, 0.75], 2) == (1, 1)


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_every_deal_shows_exactly_the_quotas(exponent, monkeypatch):
    monkeypatch.setattr(languages, "LONGEST_DEAL", 50)
    found = order(exponent)
    for deal in (0, 1, 19):
        rows = found.row(np.arange(50 * deal, 50 * deal + 50))
        assert shown_of_each(rows) == list(found.quotas) == list(quotas_of(shares_of(SIZES, exponent), 50))


def test_with_exponent_one_an_epoch_shows_every_block_once():
    found = order(1.0)
    for epoch in (0, 1, 8):
        positions = np.arange(epoch * 437, (epoch + 1) * 437)
        assert np.array_equal(np.sort(found.row(positions)), np.arange(437))
        assert set(found.epoch(positions).tolist()) == {epoch}


def test_with_exponent_zero_languages_are_alike():
    sizes = [400, 40, 10]
    assert shown_of_each(order(0.0, sizes).row(np.arange(450 * 3)), sizes) == [450] * 3


@pytest.mark.parametrize("exponent", EXPONENTS)
@pytest.mark.parametrize("deal", [50, 1 << 20])
def test_no_block_comes_again_before_its_language_is_used_up(exponent, deal, monkeypatch):
    monkeypatch.setattr(languages, "LONGEST_DEAL", deal)
    found = order(exponent)
    positions = np.arange(4000)
    rows, epochs = found.row(positions), found.epoch(positions)
    for first, size in zip(itertools.accumulate([0, *SIZES[:-1]]), SIZES, strict=True):
        mine = (rows >= first) & (rows < first + size)
        passes = [rows[mine][start : start + size] for start in range(0, mine.sum(), size)]
        assert np.array_equal(epochs[mine], np.arange(mine.sum()) // size)
        for each in passes:
            assert np.unique(each).size == each.size
        if len(passes) > 2 and size > 20:
            assert (passes[0] == passes[1]).sum() < 8  # of two orders by lot one place agrees


def test_a_small_language_is_gone_through_more_often_than_a_large_one():
    found = order(0.7)
    positions = np.arange(4000)
    language, epochs = found.language(positions), found.epoch(positions)
    passes = [int(epochs[language == number].max()) for number in range(3)]
    expected = [4000 * share / size for share, size in zip(shares_of(SIZES, 0.7), SIZES, strict=True)]
    assert passes == pytest.approx(expected, abs=1)
    assert passes[0] < passes[1] < passes[2]


def test_languages_are_mixed_as_by_lot():
    """The number of one language in short stretches varies as in draws without replacement."""
    sizes = [6000, 4000]
    found = order(1.0, sizes, seed=1)
    in_stretch = (found.language(np.arange(10_000)) == 1).reshape(100, 100).sum(1)
    variance = 100 * 0.4 * 0.6 * (1 - 100 / 10_000)
    assert in_stretch.mean() == 40
    assert in_stretch.var() == pytest.approx(variance, rel=0.6)  # 4 standard deviations of a variance of 100 draws
    following = found.language(np.arange(10_000))
    assert abs(np.corrcoef(following[:-1], following[1:])[0, 1]) < 0.04


def test_deals_and_seeds_and_languages_differ(monkeypatch):
    monkeypatch.setattr(languages, "LONGEST_DEAL", 1000)
    found = order(1.0, [5000, 5000])
    first, second = (found.language(np.arange(1000 * deal, 1000 * deal + 1000)) for deal in (0, 1))
    assert (first == second).mean() == pytest.approx(0.5, abs=0.08)
    assert (order(1.0, [5000, 5000], seed=4).language(np.arange(1000)) == first).mean() == pytest.approx(0.5, abs=0.08)
    one, other = (
        found.row(np.arange(10_000))[found.language(np.arange(10_000)) == number] - 5000 * number for number in (0, 1)
    )
    assert (one == other).sum() < 10


@pytest.mark.parametrize("fraction", [1.0, 0.4])
def test_rows_do_not_depend_on_how_positions_are_cut(fraction, monkeypatch):
    monkeypatch.setattr(languages, "LONGEST_DEAL", 64)
    found = order(0.7, fraction=fraction)
    positions = np.arange(700)
    whole, epochs = found.row(positions), found.epoch(positions)
    for chunk in (1, 7, 64, 300):
        starts = range(0, positions.size, chunk)
        assert np.array_equal(np.concatenate([found.row(positions[s : s + chunk]) for s in starts]), whole)
    lot = np.random.default_rng(0).permutation(positions)
    assert np.array_equal(found.row(lot), whole[lot])
    assert np.array_equal(found.epoch(lot), epochs[lot])
    assert np.array_equal(found.row(positions.reshape(70, 10)), whole.reshape(70, 10))
    assert np.array_equal(positions, np.arange(700))


def test_a_fraction_is_taken_of_every_language():
    rows = order(0.7, fraction=0.1).row(np.arange(5000))
    assert [np.unique(rows[(rows >= a) & (rows < b)]).size for a, b in ((0, 400), (400, 430), (430, 437))] == [40, 3, 1]
    assert order(0.7, fraction=0.1).size == 44
    more = order(0.7, fraction=0.5).row(np.arange(5000))
    assert set(rows.tolist()) < set(more.tolist())


def test_far_into_a_long_run_positions_stay_exact():
    sizes = [3_000_000, 500_000, 70_000]
    found = order(0.7, sizes)
    assert sum(found.quotas) == languages.LONGEST_DEAL
    start = 10**12
    rows = found.row(np.arange(start, start + 5000))
    shares = shares_of(sizes, 0.7)
    for count, share in zip(shown_of_each(rows, sizes), shares, strict=True):
        assert count == pytest.approx(5000 * share, abs=5 * (5000 * share) ** 0.5)


# The store


def test_the_store_has_the_languages_one_after_another():
    found = blocks_of(0.7)
    assert len(found) == 437
    together = np.concatenate([part.tokens for part in found.parts])
    rows = np.random.default_rng(0).integers(0, 437, 300)
    assert np.array_equal(found.read(rows), together[rows])
    assert found.read(rows[:0]).shape == (0, SEQ_LEN)
    assert found.content == ["language 0", "language 1", "language 2"]


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_token_counts_are_those_of_the_blocks_that_are_shown(exponent):
    store = blocks_of(exponent)
    # So many whole passes that every language was shown in proportion.
    shown = store.read(order_of(store, seed=0, fraction=1.0).row(np.arange(437 * 200)))
    counted = np.bincount(shown.ravel(), minlength=WORDS) / 200
    assert store.token_counts == pytest.approx(counted, rel=0.02, abs=1)
    if exponent == 1.0:
        assert np.array_equal(store.token_counts, sum(part.token_counts for part in store.parts))


def test_one_text_keeps_its_own_order():
    found = order_of(Language(0, 50), seed=7, fraction=0.5)
    assert isinstance(found, Order)
    assert np.array_equal(found.row(np.arange(100)), Order(50, seed=7, fraction=0.5).row(np.arange(100)))


# Batches


def micro_batches(cut, *, exponent=0.7, seed=2):
    store = blocks_of(exponent)
    masking = Masking(MaskingConfig(rate=0.3), VOCABULARY, store.token_counts, seq_len=SEQ_LEN, seed=seed)
    return MicroBatches(store, order_of(store, seed=seed, fraction=1.0), masking, cut)


def restored(batch):
    """The blocks before they were masked."""
    tokens = batch.input_ids.clone().view(-1)
    tokens[batch.labelled_rows] = batch.labels
    return tokens.view_as(batch.input_ids)


@pytest.mark.parametrize(("micro_batch", "world_size"), [(1, 1), (24, 1), (1, 24), (2, 3), (4, 6)])
@pytest.mark.parametrize("step", [0, 18, 40])
def test_samples_and_masks_do_not_depend_on_ranks_and_micro_batches(step, micro_batch, world_size):
    whole = micro_batches(Cut(24, 24, 0, 1))[step]
    shares = [micro_batches(Cut(24, micro_batch, rank, world_size)) for rank in range(world_size)]
    accumulation = 24 // (micro_batch * world_size)
    parts = [shares[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world_size)]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_a_run_resumed_at_any_step_sees_the_same_samples():
    data = micro_batches(Cut(global_batch=20, micro_batch=5, rank=1, world_size=2))
    whole = list(training_batches(data, first_step=0, last_step=30, workers=0, pin_memory=False))
    for first_step in range(30):
        again = micro_batches(data.cut)
        resumed = training_batches(again, first_step=first_step, last_step=30, workers=0, pin_memory=False)
        for one, other in zip(resumed, whole[2 * first_step :], strict=True):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def test_worker_processes_change_nothing_and_little_is_sent_to_them():
    data = micro_batches(Cut(global_batch=20, micro_batch=5, rank=0, world_size=1))
    alone, helped = (
        list(training_batches(data, first_step=3, last_step=9, workers=workers, pin_memory=False)) for workers in (0, 2)
    )
    assert len(pickle.dumps(data.order)) < 10_000
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


def test_a_block_that_comes_again_within_an_epoch_has_another_mask():
    """One language of 7 blocks is gone through some 9 times in an epoch of all; masks go by its own passes."""
    data = micro_batches(Cut(global_batch=437, micro_batch=437, rank=0, world_size=1), exponent=0.3)
    batch = data[0]
    seen = {}
    for block, ids in zip(restored(batch).tolist(), batch.input_ids.tolist(), strict=True):
        seen.setdefault(tuple(block), []).append(tuple(ids))
    again = [masks for masks in seen.values() if len(masks) > 3]
    assert len(again) >= 7
    for masks in again:  # 3 of 10 tokens: a mask in 120 is drawn again
        assert len(set(masks)) > len(masks) - 3


# Names


def write_text(path, words="des mots"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{words}\n", encoding="utf-8")
    return str(path)


def test_names_of_languages_may_be_files_folders_globs_and_data_sets(tmp_path):
    write_text(tmp_path / "de" / "a.txt")
    for number in (1, 2):
        write_text(tmp_path / f"en_{number}.txt")
    french = write_text(tmp_path / "fr.txt")
    (tmp_path / "de" / "b.txt").symlink_to("a.txt")  # twice in one language: its own business
    check_languages([french, str(tmp_path / "de"), str(tmp_path / "en_*.txt"), "hub:wiki:fr", "hub:wiki:de"])


def test_a_language_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match="no_text does not exist"):
        check_languages([write_text(tmp_path / "fr.txt"), str(tmp_path / "no_text")])


@pytest.mark.parametrize("other", ["fr.txt", "../{name}/fr.txt", "*.txt", "", "link.txt"])
def test_two_languages_with_one_file_are_refused(tmp_path, other):
    french = write_text(tmp_path / "fr.txt")
    (tmp_path / "link.txt").symlink_to("fr.txt")
    with pytest.raises(DataError, match=r"both hold .*\.txt.*name its text once"):
        check_languages([french, str(tmp_path / other.format(name=tmp_path.name))])


def test_one_data_set_for_two_languages_is_refused():
    with pytest.raises(DataError, match="hub:wiki and hub:wiki::train both hold"):
        check_languages(["hub:wiki", "hub:wiki::train"])
