"""Likely wrong labels, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from gn_transfer.report.predictions import Predictions
from gn_transfer.report.wrong_labels import likely_wrong_labels


def evaluation(*rows: tuple[str, str, str, float, float]) -> Predictions:
    paths, targets, predicted, of_target, of_predicted = map(list, zip(*sorted(rows), strict=True))
    return Predictions(paths, targets, predicted, np.array(of_target), np.array(of_predicted))


CAT = ("a.jpg", "cat", "cat", 0.9, 0.9)
DOG = ("b.jpg", "dog", "dog", 0.7, 0.7)
LABELS = {"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "cat", "d.jpg": "dog"}


def test_the_mean_probability_of_a_class_is_the_bar():
    """Images labeled dog get dog with 0.7 in the mean: less is no contradiction, as much is one."""
    assert not likely_wrong_labels([evaluation(CAT, DOG, ("c.jpg", "cat", "dog", 0.31, 0.69))], LABELS)
    [found] = likely_wrong_labels([evaluation(CAT, DOG, ("c.jpg", "cat", "dog", 0.3, 0.7))], LABELS)
    assert (found.path, found.label, found.suggested, found.runs, found.agreeing) == ("c.jpg", "cat", "dog", 1, 1)
    assert (found.prob_label, found.prob_suggested) == pytest.approx((0.3, 0.7))


def test_doubtful_images_lower_the_bar_of_their_own_label():
    """The mean is over all images labeled so, the wrong ones included, as the paper has it."""
    rows = [CAT, DOG, ("c.jpg", "cat", "dog", 0.1, 0.9), ("d.jpg", "dog", "cat", 0.3, 0.6)]
    found = likely_wrong_labels([evaluation(*rows)], LABELS)
    assert [one.path for one in found] == ["c.jpg", "d.jpg"]  # 0.6 is above (0.9 + 0.1) / 2; the surest first


def test_more_than_half_of_the_runs_must_agree():
    doubt, trust = ("c.jpg", "cat", "dog", 0.1, 0.9), ("c.jpg", "cat", "cat", 0.8, 0.8)
    runs = [evaluation(CAT, DOG, doubt), evaluation(CAT, DOG, trust)]
    assert not likely_wrong_labels(runs, LABELS)
    [found] = likely_wrong_labels([*runs, evaluation(CAT, DOG, doubt)], LABELS)
    assert (found.runs, found.agreeing) == (3, 2)


def test_a_label_that_was_corrected_is_not_doubted_any_more():
    doubt = evaluation(CAT, DOG, ("c.jpg", "cat", "dog", 0.1, 0.9))
    assert likely_wrong_labels([doubt], LABELS)
    assert not likely_wrong_labels([doubt], {**LABELS, "c.jpg": "dog"})
    assert not likely_wrong_labels([doubt], {"a.jpg": "cat"})


def test_runs_of_before_a_correction_have_no_vote():
    before = evaluation(CAT, DOG, ("c.jpg", "dog", "dog", 0.9, 0.9))
    after = evaluation(CAT, DOG, ("c.jpg", "cat", "dog", 0.1, 0.9))
    [found] = likely_wrong_labels([before, before, after], LABELS)
    assert (found.runs, found.agreeing) == (1, 1)
