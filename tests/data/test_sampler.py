"""The order depends on (seed, epoch) alone; a resumed epoch is the rest of the whole one."""

from __future__ import annotations

import numpy as np
import pytest
from lightning.fabric.utilities.data import _set_sampler_epoch
from torch.utils.data import DataLoader

from gn_transfer.data.sampler import EpochSampler, epoch_order, sample_seed


def keys(sampler: EpochSampler, epoch: int) -> list[tuple[int, int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def test_every_index_once_and_the_epoch_in_the_key() -> None:
    sampler = EpochSampler(10, batch_size=3, seed=0, shuffle=True)
    for epoch in (0, 4):
        drawn = keys(sampler, epoch)
        assert {key[0] for key in drawn} == {epoch}
        assert sorted(index for _, index in drawn) == list(range(10))
    assert keys(sampler, 0) != [(0, index) for _, index in keys(sampler, 1)]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert epoch_order(50, 0, 3, True) == epoch_order(50, 0, 3, True)
    orders = {tuple(epoch_order(50, seed, epoch, True)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_without_shuffling_the_order_is_ascending() -> None:
    assert keys(EpochSampler(4, 2, seed=0, shuffle=False), 2) == [(2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 25])
def test_ranks_get_equal_counts_and_together_everything(world_size: int) -> None:
    samplers = [EpochSampler(10, 2, 0, True, rank, world_size) for rank in range(world_size)]
    drawn = [keys(sampler, 1) for sampler in samplers]
    assert {len(part) for part in drawn} == {len(samplers[0])}
    together = [index for turn in zip(*drawn, strict=True) for _, index in turn]
    assert together[:10] == epoch_order(10, 0, 1, True)
    assert len(together) < 10 + world_size


def test_resumed_epoch_is_the_rest_of_the_whole_one() -> None:
    whole = keys(EpochSampler(10, 3, 7, True), 2)
    sampler = EpochSampler(10, 3, 7, True)
    sampler.resume_at(2, 2)
    assert len(sampler) == 10
    assert list(sampler) == whole[6:]  # set_epoch was not called: Lightning makes the iterator before it
    assert keys(sampler, 3) == keys(EpochSampler(10, 3, 7, True), 3)


def test_the_skip_is_used_up_by_one_whole_iteration() -> None:
    sampler = EpochSampler(10, 3, 7, True)
    sampler.resume_at(2, 1)
    next(iter(sampler))  # made and dropped
    assert len(list(sampler)) == 7
    assert len(list(sampler)) == 10


def test_a_new_sampler_begins_with_the_first_epoch() -> None:
    assert next(iter(EpochSampler(4, 2, seed=0, shuffle=False))) == (0, 0)


def test_a_later_resume_is_not_used_up_by_an_iteration_before_it() -> None:
    sampler = EpochSampler(10, 3, 7, True)
    sampler.resume_at(1, 1)
    iteration = iter(sampler)
    next(iteration)
    sampler.resume_at(1, 2)
    list(iteration)
    assert len(keys(sampler, 1)) == 4
    sampler = EpochSampler(10, 3, 7, True)
    iteration = iter(sampler)
    next(iteration)
    sampler.resume_at(0, 2)
    list(iteration)
    assert len(keys(sampler, 0)) == 4


def test_resume_waits_for_its_epoch() -> None:
    sampler = EpochSampler(10, 3, 7, True)
    sampler.resume_at(2, 1)
    assert len(keys(sampler, 0)) == 10
    assert len(keys(sampler, 2)) == 7


def test_resume_at_the_end_of_an_epoch() -> None:
    sampler = EpochSampler(10, 3, 7, True)
    sampler.resume_at(0, 4)
    assert list(sampler) == []


def test_lightning_sets_the_epoch_of_our_loader() -> None:
    sampler = EpochSampler(4, 2, seed=0, shuffle=True)
    loader: DataLoader[int] = DataLoader(range(4), batch_size=2, sampler=sampler)  # type: ignore[arg-type]
    _set_sampler_epoch(loader, 5)
    assert sampler.epoch == 5


def test_samples_have_their_own_seeds_which_repeat() -> None:
    seeds = {sample_seed(s, e, i) for s in range(4) for e in range(10) for i in range(50)}
    assert len(seeds) == 2000
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)
    numbers = np.array([sample_seed(0, 0, index) for index in range(2000)]) / 2**32
    np.testing.assert_allclose([numbers.mean(), numbers.std()], [0.5, 12**-0.5], atol=0.03)
