"""Temperature and threshold, on logits whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from gn_transfer.config import ConfigError
from gn_transfer.inference.confidence import FEWEST_IMAGES, choose_threshold, fit_temperature


def calibrated(images: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and random classes of the probabilities that the logits claim."""
    generator = np.random.default_rng(seed)
    logits = (2 * generator.standard_normal((images, 4))).astype(np.float32)
    targets = np.array([generator.choice(4, p=row) for row in softmax(logits.astype(np.float64), axis=1)])
    return logits, targets


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_a_factor(factor):
    logits, targets = calibrated(4000)
    fitted = fit_temperature(factor * logits, targets)
    assert fitted.value == pytest.approx(factor, rel=0.06)
    assert fitted.images == 4000
    assert fitted.ece_after < 0.03
    if factor != 1:
        assert fitted.ece_before > 2 * fitted.ece_after


def test_the_error_afterwards_is_measured_on_images_that_were_not_fitted():
    logits, targets = calibrated(300, seed=3)
    fitted = fit_temperature(logits, targets)
    folds = np.random.default_rng(0).permutation(300) % 5
    parts = []
    for k in range(5):
        value = fit_temperature(logits[folds != k], targets[folds != k]).value
        parts.append(softmax(logits[folds == k].astype(np.float64) / value, axis=1))
    probs = np.concatenate(parts)
    right = probs.argmax(1) == np.concatenate([targets[folds == k] for k in range(5)])
    numbers = np.clip(np.ceil(probs.max(1) * 10).astype(int) - 1, 0, 9)
    error = sum(
        (numbers == number).mean() * abs(probs.max(1)[numbers == number].mean() - right[numbers == number].mean())
        for number in np.unique(numbers)
    )
    assert fitted.ece_after == pytest.approx(error, abs=1e-6)


def test_nothing_to_fit_on():
    logits, targets = calibrated(FEWEST_IMAGES - 1)
    few = fit_temperature(logits, targets)
    assert (few.value, few.images, few.ece_before) == (1.0, 0, None)
    assert "too few" in few.summary()
    perfect = fit_temperature(np.eye(4, dtype=np.float32)[np.arange(200) % 4], np.arange(200) % 4)
    assert perfect.value == 1.0
    assert "no validation image is wrong" in perfect.summary()
    useless = fit_temperature(np.zeros((200, 4), np.float32), np.arange(200) % 4)
    assert 0.1 <= useless.value <= 10


def test_a_threshold_answers_as_much_as_it_may():
    logits, targets = calibrated(2000)
    probs = softmax(logits, axis=1)
    confidence, right = probs.max(1), probs.argmax(1) == targets
    before = 1.0
    for precision in (0.6, 0.8, 0.95):
        found = choose_threshold(probs, targets, precision)
        answered = confidence >= found.probability
        assert found.answered == pytest.approx(answered.mean())
        assert found.reached == pytest.approx(right[answered].mean())
        assert found.reached >= precision
        assert found.low < found.reached < found.high
        assert found.answered < before or before == 1.0
        before = found.answered
        next_lower = np.sort(confidence[~answered])[-1] if (~answered).any() else None
        if next_lower is not None:  # one image more, and the precision is missed, here or for good
            shares = [right[confidence >= least].mean() for least in np.sort(confidence[~answered])[::-1]]
            assert max(shares) < precision


def test_images_of_the_same_confidence_stay_together():
    probs = np.array([[0.9, 0.1]] * 3 + [[0.7, 0.3]], np.float32)
    with pytest.raises(ConfigError, match=r"--precision 1: no threshold reaches it on the 4 .* most is 0\.6667"):
        choose_threshold(probs, np.array([0, 0, 1, 1]), 1.0)
    found = choose_threshold(probs, np.array([0, 0, 1, 1]), 0.6)
    assert found.answered == 0.75
    assert 0.7 < found.probability < 0.9
    everything = choose_threshold(probs, np.array([0, 0, 0, 0]), 0.99)
    assert everything.answered == 1
    assert everything.probability < 0.7


def test_a_threshold_between_neighbours_excludes_the_lower_one():
    """Saturated confidences are neighbours in float32, and their mean would round onto the lower one."""
    high, low = np.nextafter(np.float32(1), np.float32(0)), np.float32(1 - 2.0**-23)
    probs = np.array([[high, 1 - high], [high, 1 - high], [low, 1 - low]], np.float32)
    found = choose_threshold(probs, np.array([0, 0, 1]), 1.0)
    assert (probs.max(1) >= found.probability).tolist() == [True, True, False]
