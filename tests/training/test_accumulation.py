import pytest

from gn_transfer.config import ConfigError
from gn_transfer.training.accumulation import micro_batch, micro_batches_per_step


def weights(num_samples: int, batch_size: int, micro_batches: int) -> list[float]:
    """Weight of each image in its optimizer step, as Lightning applies the scaled loss."""
    num_batches = -(-num_samples // batch_size)
    found = []
    for index in range(num_batches):
        images = min(batch_size, num_samples - index * batch_size)
        step = micro_batch(
            index,
            num_batches=num_batches,
            micro_batches=micro_batches,
            batch_size=batch_size,
            num_samples=num_samples,
        )
        # A mean loss gives each image 1 / images; Lightning divides by the full count of micro-batches.
        found += [step.loss_scale / micro_batches / images] * images
    return found


def test_every_image_of_a_step_weighs_alike():
    assert weights(5, 1, 4) == [0.25] * 4 + [1.0]


def test_a_smaller_last_batch_does_not_weigh_more():
    # steps of two batches of three: 6 images, then 3 + 1
    assert weights(10, 3, 2) == pytest.approx([1 / 6] * 6 + [1 / 4] * 4)


@pytest.mark.parametrize(("num_samples", "batch_size", "micro_batches"), [(7, 2, 3), (8, 2, 2), (1, 4, 4), (33, 1, 16)])
def test_weights_of_each_step_sum_to_one(num_samples, batch_size, micro_batches):
    size = batch_size * micro_batches
    found = weights(num_samples, batch_size, micro_batches)
    for start in range(0, num_samples, size):
        assert sum(found[start : start + size]) == pytest.approx(1.0)


def test_first_and_last():
    steps = [micro_batch(i, num_batches=5, micro_batches=2, batch_size=1, num_samples=5) for i in range(5)]
    assert [step.first for step in steps] == [True, False, True, False, True]
    assert [step.last for step in steps] == [False, True, False, True, True]


def test_micro_batches_per_step():
    assert micro_batches_per_step(None, 3, 2) == 1
    assert micro_batches_per_step(16, 2, 2) == 4


@pytest.mark.parametrize(("effective", "batch", "remedy"), [(10, 4, "use 8"), (2, 4, "use 4")])
def test_an_effective_batch_that_is_no_multiple_is_refused(effective, batch, remedy):
    with pytest.raises(ConfigError, match=f"effective_batch_size={effective} .*batch_size={batch}; {remedy}"):
        micro_batches_per_step(effective, batch, 1)
