"""Masks: exactly k tokens a block, chosen by weight, never special ones, and by (seed, epoch, sample) alone."""

from collections import Counter

import numpy as np
import pytest

from distilcb.config import REPOSITORY, MaskingConfig
from distilcb.data import masking as masking_module
from distilcb.data.masking import Masking, masked_per_block
from distilcb.data.tokenizer import TextTokenizer, Vocabulary

BOS, PAD, UNUSED, UNK, EOS, MASK = 0, 1, 2, 3, 4, 49
SPECIAL = [BOS, PAD, UNUSED, UNK, EOS, MASK]
ORDINARY = [token for token in range(50) if token not in SPECIAL]
# Tokens that begin a word: the even ordinary ones; odd ones go on.
WORD_START = np.array([token in ORDINARY and token % 2 == 0 for token in range(50)])
VOCABULARY = Vocabulary(
    size=50,
    bos_id=BOS,
    eos_id=EOS,
    mask_id=MASK,
    special_ids=np.array(SPECIAL),
    word_start=WORD_START,
    fingerprint="fifty tokens",
)


def masker(seq_len=32, *, seed=0, counts=None, **settings):
    counts = np.full(50, 10) if counts is None else np.asarray(counts)
    return Masking(MaskingConfig(**settings), VOCABULARY, counts, seq_len=seq_len, seed=seed)


def text_blocks(number, seq_len=32, *, seed=0, special_share=0.0):
    """<s> tokens </s>, with some special tokens among them."""
    generator = np.random.default_rng(seed)
    blocks = generator.choice(ORDINARY, size=(number, seq_len))
    strange = generator.random(blocks.shape) < special_share
    blocks[strange] = generator.choice([UNK, EOS, UNUSED, PAD, MASK], size=int(strange.sum()))
    blocks[:, 0], blocks[:, -1] = BOS, EOS
    return blocks


def apply(masking, blocks, *, epoch=0, first_sample=0):
    samples = np.arange(first_sample, first_sample + len(blocks))
    return masking.apply(blocks, samples, np.full(len(blocks), epoch))


def chosen(masking, block, draws):
    """(draws, k) columns chosen in one block, over as many samples."""
    return apply(masking, np.tile(block, (draws, 1))).positions


def words_of(block):
    """The columns of each word, by the definition read aloud: special tokens are no words and end them."""
    words, open_word = [], False
    for column, token in enumerate(block.tolist()):
        if token in SPECIAL:
            open_word = False
        elif open_word and not WORD_START[token]:
            words[-1].append(column)
        else:
            words.append([column])
            open_word = True
    return words


@pytest.mark.parametrize(
    ("rate", "seq_len", "k"), [(0.15, 102, 15), (0.15, 128, 19), (0.15, 8, 1), (0.01, 12, 1), (0.5, 64, 31)]
)
def test_k_is_the_rounded_share_of_the_tokens_between_the_separators(rate, seq_len, k):
    assert masked_per_block(rate, seq_len) == k
    assert masker(seq_len, rate=rate).k == k


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("rate", [0.02, 0.15, 0.5])
def test_exactly_k_different_tokens_of_every_block_are_chosen(rate, smoothing, whole_word):
    masking = masker(rate=rate, smoothing=smoothing, whole_word=whole_word)
    masked = apply(masking, text_blocks(200, special_share=0.2))
    assert masked.positions.shape == masked.labels.shape == (200, masking.k)
    assert (np.diff(masked.positions, axis=1) > 0).all()


@pytest.mark.parametrize("whole_word", [False, True])
def test_labels_are_the_tokens_that_stood_there_and_all_others_stay(whole_word):
    blocks = text_blocks(100, special_share=0.1)
    before = blocks.copy()
    masked = apply(masker(whole_word=whole_word), blocks)
    assert np.array_equal(blocks, before)
    assert np.array_equal(masked.labels, np.take_along_axis(before, masked.positions, axis=1))
    restored = masked.input_ids.copy()
    np.put_along_axis(restored, masked.positions, masked.labels, axis=1)
    assert np.array_equal(restored, before)


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_mask_does_not_depend_on_the_rest_of_the_batch(whole_word):
    blocks, masking = text_blocks(60, special_share=0.1), masker(whole_word=whole_word)
    samples, epochs = np.arange(1000, 1060), np.arange(60) % 3
    whole = masking.apply(blocks, samples, epochs)
    lot = np.random.default_rng(1).permutation(60)
    for rows in [np.array([i]) for i in range(60)] + [lot, lot[:17], np.array([5, 5, 9])]:
        part = masking.apply(blocks[rows], samples[rows], epochs[rows])
        assert np.array_equal(part.input_ids, whole.input_ids[rows])
        assert np.array_equal(part.positions, whole.positions[rows])
        assert np.array_equal(part.labels, whole.labels[rows])


def test_a_masker_made_anew_gives_the_same_masks():
    blocks = text_blocks(50)
    assert np.array_equal(apply(masker(seed=3), blocks).input_ids, apply(masker(seed=3), blocks).input_ids)


def overlap(first, second):
    """Mean share of the columns chosen by both."""
    return np.mean([np.intersect1d(a, b).size / a.size for a, b in zip(first, second, strict=True)])


def test_masks_differ_by_epoch_by_seed_and_by_sample_as_independent_draws_do():
    block = text_blocks(1, seq_len=102)[0]
    blocks = np.tile(block, (500, 1))
    masking = masker(102, smoothing=0.0)
    first = apply(masking, blocks).positions
    others = {
        "epoch": apply(masking, blocks, epoch=1).positions,
        "far epoch": apply(masking, blocks, epoch=1000).positions,
        "seed": apply(masker(102, smoothing=0.0, seed=1), blocks).positions,
        "sample": apply(masking, blocks, first_sample=500).positions,
        "shifted sample": np.roll(first, 1, axis=0),
        "epoch and sample swapped": masking.apply(blocks, np.zeros(500, int), np.arange(500)).positions,
    }
    for name, other in others.items():
        assert overlap(first[1:], other[1:]) == pytest.approx(0.15, abs=0.02), name


@pytest.mark.parametrize("whole_word", [False, True])
@pytest.mark.parametrize("special_share", [0.05, 0.3, 0.45])
def test_special_tokens_are_never_chosen(special_share, whole_word):
    blocks = text_blocks(2000, special_share=special_share, seed=7)
    masking = masker(rate=0.3, whole_word=whole_word, counts=np.arange(50) ** 3)
    usable = blocks[(~np.isin(blocks, SPECIAL)).sum(1) >= masking.k]
    assert len(usable) > 1000
    assert not np.isin(apply(masking, usable).labels, SPECIAL).any()


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_block_with_just_k_ordinary_tokens_has_them_all_chosen(whole_word):
    masking = masker(rate=0.5, whole_word=whole_word)
    blocks = np.full((50, 32), UNK)
    blocks[:, 0], blocks[:, -1] = BOS, EOS
    columns = np.stack([np.random.default_rng(i).permutation(np.arange(1, 31))[: masking.k] for i in range(50)])
    np.put_along_axis(blocks, columns, np.random.default_rng(0).choice(ORDINARY, columns.shape), axis=1)
    assert np.array_equal(apply(masking, blocks).positions, np.sort(columns, axis=1))


def test_a_word_that_a_block_begins_within_is_no_part_of_the_separator_before_it():
    block = np.full(32, UNK)
    block[[0, -1]] = BOS, EOS
    block[1:4] = 7, 9, 11  # odd: all of them go on with a word of the block before
    masking = masker(rate=0.1, whole_word=True)
    assert np.array_equal(chosen(masking, block, 200), np.tile([1, 2, 3], (200, 1)))


def test_eighty_percent_become_mask_ten_a_random_word_and_ten_stay():
    blocks = text_blocks(4000, seq_len=102)
    masked = apply(masker(102), blocks)
    treated = np.take_along_axis(masked.input_ids, masked.positions, axis=1)
    number = treated.size
    assert number == 60_000
    hidden, same = (treated == MASK).mean(), (treated == masked.labels).mean()
    by_chance = 0.1 / len(ORDINARY)  # a random word may be the word itself
    assert hidden == pytest.approx(0.8, abs=5 * (0.8 * 0.2 / number) ** 0.5)
    assert same == pytest.approx(0.1 + by_chance, abs=5 * (0.1 * 0.9 / number) ** 0.5)
    assert 1 - hidden - same == pytest.approx(0.1 - by_chance, abs=5 * (0.1 * 0.9 / number) ** 0.5)


def test_the_treatment_does_not_depend_on_the_place_in_the_block():
    masked = apply(masker(32, rate=0.5, smoothing=0.0), text_blocks(8000))
    hidden = np.take_along_axis(masked.input_ids, masked.positions, axis=1) == MASK
    for column in range(1, 31):
        here = hidden[masked.positions == column]
        assert here.mean() == pytest.approx(0.8, abs=5 * (0.16 / here.size) ** 0.5)


@pytest.mark.parametrize(
    ("mask_share", "random_share", "masks", "stays"), [(1.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.5, 0.0, 0.5, 0.5)]
)
def test_the_shares_are_those_of_the_configuration(mask_share, random_share, masks, stays):
    masked = apply(masker(mask_share=mask_share, random_share=random_share), text_blocks(2000))
    treated = np.take_along_axis(masked.input_ids, masked.positions, axis=1)
    five_deviations = 5 * (masks * (1 - masks) / treated.size) ** 0.5
    assert (treated == MASK).mean() == pytest.approx(masks, abs=five_deviations)
    assert (treated == masked.labels).mean() == pytest.approx(stays, abs=five_deviations)


@pytest.mark.parametrize(("mask_share", "random_share"), [(0.0, 1.0), (0.8, 0.1), (0.0, 0.1)])
def test_random_words_are_never_special_and_all_ordinary_ones_are_alike(mask_share, random_share):
    masked = apply(masker(mask_share=mask_share, random_share=random_share), text_blocks(20_000))
    treated = np.take_along_axis(masked.input_ids, masked.positions, axis=1)
    drawn = treated[(treated != masked.labels) & ((treated != MASK) | (mask_share == 0))]
    assert drawn.size > 0.9 * random_share * treated.size
    words = np.bincount(drawn, minlength=50)
    assert words[SPECIAL].sum() == 0
    expected = words.sum() / len(ORDINARY)
    assert np.abs(words[ORDINARY] - expected).max() < 5 * expected**0.5


@pytest.mark.parametrize("bits", [0, 2**64 - 1])
def test_the_smallest_and_the_largest_random_number_still_choose_words(monkeypatch, bits):
    masking = masker(mask_share=0.0, random_share=1.0)
    monkeypatch.setattr(masking_module, "mix", lambda values: np.full_like(values, bits))
    masked = apply(masking, text_blocks(10))
    assert not np.isin(masked.labels, SPECIAL).any()
    assert set(np.take_along_axis(masked.input_ids, masked.positions, axis=1).ravel()) == {
        ORDINARY[0 if not bits else -1]
    }


# Tokens of one block, and how often each occurs in the training text.
BLOCK = np.array([BOS, 10, 11, 12, 13, 14, 15, 16, UNK, EOS])
COUNTS = np.full(50, 5)
COUNTS[10:17] = [1, 2, 10, 100, 1000, 10_000, 100_000]
COUNTS[UNK] = 1


def assert_shares(positions, expected):
    """Columns are chosen as often as expected, within 5 standard deviations."""
    draws = len(positions)
    shares = np.bincount(positions.ravel(), minlength=expected.size) / draws
    assert (np.abs(shares - expected) <= 5 * (expected * (1 - expected) / draws) ** 0.5).all(), (shares, expected)


def weights_of(block, smoothing):
    weights = COUNTS[block] ** -smoothing
    weights[np.isin(block, SPECIAL)] = 0
    return weights / weights.sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.7, 1.0])
def test_one_token_is_drawn_in_proportion_to_its_count_to_minus_smoothing(smoothing):
    masking = masker(10, rate=0.1, smoothing=smoothing, counts=COUNTS)
    assert masking.k == 1
    assert_shares(chosen(masking, BLOCK, 100_000), weights_of(BLOCK, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 0.7])
def test_two_tokens_are_drawn_one_after_the_other_without_putting_back(smoothing):
    masking = masker(10, rate=0.25, smoothing=smoothing, counts=COUNTS)
    assert masking.k == 2
    first = weights_of(BLOCK, smoothing)
    second = np.array([sum(first[j] * first[i] / (1 - first[j]) for j in range(10) if j != i) for i in range(10)])
    assert_shares(chosen(masking, BLOCK, 100_000), first + second)


def test_three_tokens_are_drawn_as_in_a_direct_simulation():
    masking = masker(10, rate=0.4, smoothing=0.7, counts=COUNTS)
    assert masking.k == 3
    generator, draws = np.random.default_rng(0), 20_000
    weights = np.tile(weights_of(BLOCK, 0.7), (draws, 1))
    drawn = Counter()
    for _ in range(3):
        totals = np.cumsum(weights, axis=1)
        columns = (totals < generator.random((draws, 1)) * totals[:, -1:]).sum(1)
        drawn.update(columns.tolist())
        weights[np.arange(draws), columns] = 0
    simulated = np.array([drawn[column] / draws for column in range(10)])
    shares = np.bincount(chosen(masking, BLOCK, draws).ravel(), minlength=10) / draws
    assert np.abs(shares - simulated).max() < 5 * (2 * 0.25 / draws) ** 0.5


def test_without_smoothing_all_tokens_are_chosen_alike_however_frequent():
    masking = masker(32, rate=0.15, smoothing=0.0, counts=np.arange(50) ** 4)
    expected = np.full(32, masking.k / 30)
    expected[[0, -1]] = 0
    assert_shares(chosen(masking, text_blocks(1)[0], 40_000), expected)


def test_the_rate_does_not_depend_on_smoothing():
    blocks = text_blocks(10)
    assert apply(masker(smoothing=0.7), blocks).labels.shape == apply(masker(smoothing=0.0), blocks).labels.shape


def test_a_token_that_the_training_text_lacks_weighs_like_one_seen_once():
    zero, one = np.full(50, 7), np.full(50, 7)
    zero[10:20], one[10:20] = 0, 1
    blocks = text_blocks(300)
    assert np.array_equal(apply(masker(counts=zero), blocks).positions, apply(masker(counts=one), blocks).positions)


@pytest.mark.parametrize("smoothing", [0.0, 0.7])
@pytest.mark.parametrize("special_share", [0.0, 0.15])
def test_words_are_chosen_whole_except_at_most_one_a_block(special_share, smoothing):
    blocks = text_blocks(1000, special_share=special_share, seed=5)
    masking = masker(rate=0.3, smoothing=smoothing, whole_word=True, counts=np.arange(50) ** 2)
    blocks = blocks[(~np.isin(blocks, SPECIAL)).sum(1) >= masking.k]
    for block, positions in zip(blocks, apply(masking, blocks).positions, strict=True):
        touched = [word for word in words_of(block) if set(word) & set(positions.tolist())]
        cut = [word for word in touched if not set(word) <= set(positions.tolist())]
        assert sum(map(len, touched)) >= masking.k
        assert len(cut) <= 1


def test_single_tokens_are_not_kept_together_unless_whole_words_are_asked_for():
    blocks = text_blocks(300)
    cut = 0
    for block, positions in zip(blocks, apply(masker(rate=0.3), blocks).positions, strict=True):
        cut += sum(0 < len(set(word) & set(positions.tolist())) < len(word) for word in words_of(block))
    assert cut > 300


def test_without_smoothing_every_word_is_as_likely_however_long():
    block = np.array([BOS, 10, 12, 11, 14, 13, 15, 17, EOS, 16, 11, UNK, 13, EOS])
    assert words_of(block) == [[1], [2, 3], [4, 5, 6, 7], [9, 10], [12]]
    masking = masker(14, rate=0.08, smoothing=0.0, whole_word=True)
    assert masking.k == 1  # the first token of the first word drawn
    expected = np.zeros(14)
    expected[[1, 2, 4, 9, 12]] = 1 / 5
    assert_shares(chosen(masking, block, 50_000), expected)


def test_a_word_weighs_the_mean_of_its_tokens():
    block = np.array([BOS, 10, 12, 13, 14, 15, 11, 16, UNK, EOS])
    words = words_of(block)
    assert words == [[1], [2, 3], [4, 5, 6], [7]]
    weights = COUNTS[block] ** -0.7
    means = np.array([weights[word].mean() for word in words])
    expected = np.zeros(10)
    expected[[1, 2, 4, 7]] = means / means.sum()
    masking = masker(10, rate=0.1, smoothing=0.7, whole_word=True, counts=COUNTS)
    assert_shares(chosen(masking, block, 100_000), expected)


@pytest.mark.parametrize("whole_word", [False, True])
def test_french_text_is_masked_whole_word_by_whole_word(whole_word):
    tokenizer = TextTokenizer(str(REPOSITORY / "recipes/mini/teacher"))
    vocabulary = tokenizer.vocabulary
    lines = (REPOSITORY / "recipes/mini/text/train/nouvelles.txt").read_text(encoding="utf-8").splitlines()
    stream = np.concatenate([[*ids, vocabulary.eos_id] for ids in tokenizer.encode(lines)])
    blocks = stream[: stream.size // 62 * 62].reshape(-1, 62)  # blocks that begin within words, as packed ones do
    blocks = np.pad(blocks, ((0, 0), (1, 1)), constant_values=vocabulary.eos_id)
    blocks[:, 0] = vocabulary.bos_id
    counts = np.bincount(stream, minlength=vocabulary.size)
    settings = MaskingConfig(whole_word=whole_word, mask_share=1.0, random_share=0.0)
    masking = Masking(settings, vocabulary, counts, seq_len=64, seed=0)
    for epoch in range(20):
        masked = apply(masking, blocks, epoch=epoch)
        assert not np.isin(masked.labels, vocabulary.special_ids).any()
        assert (masked.input_ids == vocabulary.mask_id).sum(1).tolist() == [9] * len(blocks)
    if whole_word:
        is_masked = masked.input_ids == vocabulary.mask_id
        goes_on = ~vocabulary.word_start[blocks] & ~np.isin(blocks, vocabulary.special_ids)
        after_word = goes_on[:, 1:] & ~np.isin(blocks, vocabulary.special_ids)[:, :-1]
        cut = (after_word & (is_masked[:, 1:] != is_masked[:, :-1])).sum(1)
        assert cut.max() <= 1
