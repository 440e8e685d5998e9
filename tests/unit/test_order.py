"""The order of samples: a permutation of every epoch that looks drawn by lot and needs no state."""

import itertools

import numpy as np
import pytest

from distilcb.data.order import Order, key, mix, permute

SIZES = [*range(1, 70), 127, 128, 129, 255, 256, 257, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 65_535, 65_537]


def one_epoch(order, epoch=0):
    """The rows of one epoch, in the order in which they are shown."""
    return order.row(np.arange(epoch * order.size, (epoch + 1) * order.size))


def correlation(first, second):
    return float(np.corrcoef(first, second)[0, 1])


@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_each_epoch_shows_every_row_once(epoch):
    for size in SIZES:
        assert np.array_equal(np.sort(one_epoch(Order(size, seed=5), epoch)), np.arange(size)), size


def test_epochs_differ():
    # Two permutations drawn by lot agree in one place on average, and in 10 with a probability of 1e-7.
    order = Order(1000, seed=0)
    epochs = [one_epoch(order, epoch) for epoch in range(6)]
    for first, second in itertools.combinations(epochs, 2):
        assert (first == second).sum() < 10


def test_seeds_differ():
    orders = [one_epoch(Order(1000, seed=seed)) for seed in (0, 1, 2, 2**32, 2**63 - 1)]
    for first, second in itertools.combinations(orders, 2):
        assert (first == second).sum() < 10


def test_an_epoch_of_one_seed_is_not_another_epoch_of_the_next_seed():
    assert (one_epoch(Order(1000, seed=0), 1) == one_epoch(Order(1000, seed=1), 0)).sum() < 10


@pytest.mark.parametrize("size", [20_000, 16_384, 16_385])
def test_rows_are_not_correlated_with_positions_or_with_the_next_epoch(size):
    order = Order(size, seed=3)
    first, second = one_epoch(order, 0), one_epoch(order, 1)
    bound = 4 / size**0.5  # 4 standard deviations of the rank correlation of independent permutations
    assert abs(correlation(first, np.arange(size))) < bound
    assert abs(correlation(first, second)) < bound
    assert abs(correlation(first[:-1], first[1:])) < bound


@pytest.mark.parametrize("size", [20_000, 16_384, 16_385])
def test_neighbours_in_the_order_are_a_third_of_the_store_apart(size):
    # |x - y| of two uniform numbers has mean 1/3 and standard deviation 1/18^0.5 = 0.236.
    distances = np.abs(np.diff(one_epoch(Order(size, seed=11)))) / size
    assert distances.mean() == pytest.approx(1 / 3, abs=5 * 0.236 / size**0.5)
    assert (distances * size == 1).sum() < 12  # 2 are expected; rows written side by side are not shown so


def test_rows_of_one_part_of_the_store_are_spread_over_the_epoch():
    size, parts = 20_000, 10
    places = np.empty(size, dtype=np.int64)
    places[one_epoch(Order(size, seed=2))] = np.arange(size)
    table = np.histogram2d(np.arange(size), places, bins=parts)[0]
    expected = size / parts**2
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 150  # 81 degrees of freedom: mean 81, standard deviation 13


def test_every_row_is_as_likely_in_every_place():
    size, seeds = 5, 1000
    shown = np.stack([one_epoch(Order(size, seed=seed)) for seed in range(seeds)])
    expected, deviation = seeds / size, (seeds * 0.2 * 0.8) ** 0.5
    for place in range(size):
        counts = np.bincount(shown[:, place], minlength=size)
        assert np.abs(counts - expected).max() < 5 * deviation


def test_all_orders_of_four_rows_occur():
    shown = {tuple(one_epoch(Order(4, seed=seed)).tolist()) for seed in range(1000)}
    assert len(shown) == 24


@pytest.mark.parametrize("fraction", [1.0, 0.37])
def test_rows_do_not_depend_on_how_positions_are_cut(fraction):
    order = Order(301, seed=8, fraction=fraction)
    positions = np.arange(3 * order.size + 5)  # over three ends of epochs
    whole = order.row(positions)
    for chunk in (1, 7, 64, 300):
        parts = [order.row(positions[start : start + chunk]) for start in range(0, positions.size, chunk)]
        assert np.array_equal(np.concatenate(parts), whole)
    lot = np.random.default_rng(0).permutation(positions)
    assert np.array_equal(order.row(lot), whole[lot])
    assert np.array_equal(order.row(positions[:300].reshape(20, 15)), whole[:300].reshape(20, 15))


def test_positions_are_not_changed_by_asking():
    positions = np.arange(100)
    Order(30, seed=0, fraction=0.5).row(positions)
    assert np.array_equal(positions, np.arange(100))


def test_an_epoch_is_as_long_as_the_rows_in_use():
    assert Order(10, seed=0).epoch(np.array([0, 9, 10, 19, 20])).tolist() == [0, 0, 1, 1, 2]
    assert Order(10, seed=0, fraction=0.5).epoch(np.array([0, 4, 5, 10])).tolist() == [0, 0, 1, 2]


def test_a_fraction_is_the_same_subset_in_every_epoch_in_another_order():
    order = Order(1000, seed=4, fraction=0.25)
    epochs = [one_epoch(order, epoch) for epoch in range(5)]
    subset = set(epochs[0].tolist())
    assert len(subset) == order.size == 250
    for rows in epochs[1:]:
        assert set(rows.tolist()) == subset
        assert (rows == epochs[0]).sum() < 10


def test_a_fraction_is_drawn_from_the_whole_store_and_by_the_seed():
    rows = np.sort(one_epoch(Order(10_000, seed=4, fraction=0.1)))
    tenths = np.bincount(rows // 1000, minlength=10)
    assert np.abs(tenths - 100).max() < 5 * 90**0.5
    others = one_epoch(Order(10_000, seed=5, fraction=0.1))
    assert np.intersect1d(rows, others).size == pytest.approx(100, abs=50)  # 10 % of 1,000, as by lot


def test_a_larger_fraction_contains_a_smaller_one():
    small, large = (set(one_epoch(Order(500, seed=1, fraction=f)).tolist()) for f in (0.1, 0.4))
    assert small < large


@pytest.mark.parametrize(("rows", "fraction", "size"), [(10, 1.0, 10), (10, 0.5, 5), (10, 0.01, 1), (1, 0.3, 1)])
def test_a_fraction_keeps_at_least_one_row(rows, fraction, size):
    assert Order(rows, seed=0, fraction=fraction).size == size
    assert one_epoch(Order(rows, seed=0, fraction=fraction)).size == size


def test_a_store_of_sixty_four_million_rows_is_ordered_without_a_table():
    size = 64_000_000
    rows = permute(np.arange(size - 100_000, size), size, key(1))
    assert np.unique(rows).size == 100_000
    assert rows.min() >= 0
    assert rows.max() < size
    assert rows.mean() / size == pytest.approx(0.5, abs=5 * 12**-0.5 / 100_000**0.5)


def test_mix_is_the_finaliser_of_splitmix64():
    # The first outputs of SplitMix64 seeded with 0, as its authors and Java's SplittableRandom give them.
    golden = np.uint64(0x9E3779B97F4A7C15)
    states = np.arange(1, 4, dtype=np.uint64) * golden
    assert [hex(value) for value in mix(states)] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


def test_mix_sends_no_two_inputs_to_one_output():
    inputs = np.concatenate([np.arange(200_000, dtype=np.uint64), np.arange(200_000, dtype=np.uint64) << np.uint64(44)])
    assert np.unique(mix(np.unique(inputs))).size == np.unique(inputs).size


def test_flipping_one_bit_of_the_input_flips_half_of_mixs_output():
    inputs = np.random.default_rng(0).integers(0, 2**63, 2000).astype(np.uint64)
    for bit in range(64):
        flipped = mix(inputs) ^ mix(inputs ^ np.uint64(1 << bit))
        assert np.unpackbits(flipped.view(np.uint8)).mean() == pytest.approx(0.5, abs=1 / 64)


def test_a_key_depends_on_every_part_and_on_their_order():
    parts = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 1), (2**63,), (2**64 - 1,)]
    assert len({int(key(*part)) for part in parts}) == len(parts)
