import numpy as np
import pytest
from scipy.stats import permutation_test

from gn_transfer.comparison.statistics import RESAMPLES, holm, image_bootstrap, interval, sign_flip_test


def test_five_pairs_all_one_way():
    test = sign_flip_test([0.01, 0.02, 0.03, 0.01, 0.05])
    assert (test.pairs, test.p, test.smallest_p, test.exact) == (5, 2 / 32, 2 / 32, True)


def test_three_pairs_by_hand():
    # Sums of (+-1 +-2 +-4): 7, 5, 3, 1 and their negatives; |1 + 2 - 4| = 1 is reached by all 8, |-1 + 2 + 4| = 5 by 4.
    assert sign_flip_test([1, 2, -4]).p == 1.0
    assert sign_flip_test([-1, 2, 4]).p == 0.5


def test_ties_are_not_broken_by_rounding():
    assert sign_flip_test([0.1, 0.2, -0.3]).p == 1.0  # in floating point the sum is not zero
    assert sign_flip_test([0.0, 0.0]).p == 1.0


@pytest.mark.parametrize("pairs", [4, 8, 12])
def test_exact_p_is_that_of_scipy(pairs):
    values = np.random.default_rng(pairs).normal(0.4, 1.0, pairs)
    expected = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(list(values)).p == pytest.approx(expected.pvalue)


def test_many_pairs_are_sampled_and_never_reach_zero():
    test = sign_flip_test([1.0] * 40)
    assert not test.exact
    assert test.p == test.smallest_p == 1 / (2**16 + 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_over_seeds_alone():
    low, high = interval([np.full(RESAMPLES, value) for value in (0.2, 0.4)])
    assert (low, high) == pytest.approx((0.2, 0.4))  # both seeds alike are drawn a quarter of the time each


def test_an_interval_over_images_alone_is_that_of_the_binomial():
    correct = np.repeat([1.0, 0.0], [80, 20]).astype(np.float32)
    [resampled] = image_bootstrap({"one": [correct]})["one"]
    assert resampled.mean() == pytest.approx(0.8, abs=0.005)
    assert resampled.std() == pytest.approx((0.8 * 0.2 / 100) ** 0.5, rel=0.1)
    low, high = interval([resampled])
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)


def test_the_same_images_get_the_same_draws_in_every_run():
    correct = np.random.default_rng(0).integers(0, 2, 50).astype(np.float32)
    first, second = image_bootstrap({"one": [correct, correct], "other": [correct[::-1]]})["one"]
    assert np.array_equal(first, second)


def test_seeds_and_images_vary_more_than_either():
    generator = np.random.default_rng(0)
    correct = [(generator.random(100) < share).astype(np.float32) for share in (0.6, 0.7, 0.8, 0.9)]
    both = interval(image_bootstrap({"one": correct})["one"])
    seeds = interval([np.full(RESAMPLES, part.mean()) for part in correct])
    assert both[0] < seeds[0]
    assert both[1] > seeds[1]
