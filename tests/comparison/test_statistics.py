import numpy as np
import pytest
from scipy.stats import permutation_test

from gn_transfer.comparison.statistics import MOST_ENUMERATED, holm, interval, sign_flip_test
from gn_transfer.report.predictions import RESAMPLES, PixelPredictions, Predictions, image_weights


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


def test_all_sign_patterns_of_sixteen_pairs_are_counted():
    test = sign_flip_test([0.1] * MOST_ENUMERATED)
    assert (test.exact, test.p) == (True, 2 / 2**MOST_ENUMERATED)
    assert not sign_flip_test([0.1] * (MOST_ENUMERATED + 1)).exact


def test_many_pairs_are_sampled_and_never_reach_zero():
    test = sign_flip_test([1.0] * 40)
    assert not test.exact
    assert test.p == test.smallest_p == 1 / (2**16 + 1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.8, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_an_interval_over_seeds_alone():
    low, high = interval([np.full(RESAMPLES, value) for value in (0.2, 0.4)])
    assert (low, high) == pytest.approx((0.2, 0.4))  # both seeds alike are drawn a quarter of the time each


def test_an_interval_over_many_seeds_is_that_of_their_mean():
    values = np.linspace(0, 1, 21)
    low, high = interval([np.full(RESAMPLES, value) for value in values])
    half = 1.96 * values.std() / len(values) ** 0.5
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
    assert interval([np.full(RESAMPLES, value) for value in values], level=0.5) == pytest.approx(
        (0.5 - half * 0.6745 / 1.96, 0.5 + half * 0.6745 / 1.96), abs=0.01
    )


def accuracies(correct: np.ndarray, number: int = 0) -> np.ndarray:
    """How accurate a run would have been on resampled images."""
    paths = [str(place) for place in range(len(correct))]
    names = ["a" if one else "b" for one in correct]
    return Predictions(paths, ["a"] * len(correct), names).measure(image_weights(len(correct), number))


def test_an_interval_over_images_alone_is_that_of_the_binomial():
    resampled = accuracies(np.repeat([1.0, 0.0], [80, 20]))
    assert resampled.mean() == pytest.approx(0.8, abs=0.005)
    assert resampled.std() == pytest.approx((0.8 * 0.2 / 100) ** 0.5, rel=0.1)
    low, high = interval([resampled])
    assert (low, high) == pytest.approx((0.72, 0.88), abs=0.015)


def test_a_list_of_images_has_samples_of_its_own():
    correct = np.random.default_rng(0).integers(0, 2, 50)
    assert np.array_equal(accuracies(correct), accuracies(correct))
    assert not np.array_equal(accuracies(correct), accuracies(correct, 1))


def test_seeds_and_images_vary_more_than_either():
    generator = np.random.default_rng(0)
    correct = [generator.random(100) < share for share in (0.6, 0.7, 0.8, 0.9)]
    both = interval([accuracies(part) for part in correct])
    seeds = interval([np.full(RESAMPLES, part.mean()) for part in correct])
    assert both[0] < seeds[0]
    assert both[1] > seeds[1]


def test_mean_iou_of_weighted_images_by_hand():
    """Two images: IoU of ground 2/4 and 4/4, of cat 1/3 and absent."""
    found = PixelPredictions(
        ["0.png", "1.png"],
        ["ground", "cat"],
        intersection=np.array([[2.0, 1], [4, 0]]),
        union=np.array([[4.0, 3], [4, 0]]),
        pixels=np.array([[3.0, 2], [4, 0]]),
    )
    weights = np.array([[1.0, 1], [0, 1], [1, 0]])
    assert found.measure(weights) == pytest.approx([(6 / 8 + 1 / 3) / 2, 1, (2 / 4 + 1 / 3) / 2])
    assert found.value == pytest.approx((6 / 8 + 1 / 3) / 2)
    assert found.guess == pytest.approx(7 / 9 / 2)  # ground everywhere: 7 of 9 labeled pixels, and nothing of cat
    assert found.image_ious == pytest.approx([(2 / 4 + 1 / 3) / 2, 1])
    assert found.by_class({"0.png"}) == pytest.approx({"ground": 2 / 4, "cat": 1 / 3})
    low, high = found.interval()
    assert (low, high) == pytest.approx(((2 / 4 + 1 / 3) / 2, 1))
