"""Splits and weights on hand values."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gn_transfer.config import ConfigError
from gn_transfer.data.sampler import epoch_order
from gn_transfer.data.splits import (
    balanced_weights,
    few_shots,
    file_identities,
    find_copies,
    split_digest,
    stratified_split,
)

NAMES = [f"{breed}_{number}" for breed, count in (("a", 10), ("b", 4), ("c", 2)) for number in range(count)]
TARGETS = [0] * 10 + [1] * 4 + [2] * 2
PINNED = {0: [2, 4, 6, 13, 14], 7: [0, 7, 8, 12, 15]}
"""Held-out positions for seeds, as this code chose them when the test was written."""


def test_each_class_gives_its_share_and_at_least_one() -> None:
    train, val = stratified_split(NAMES, TARGETS, 0.2, seed=0)
    assert sorted(train + val) == list(range(16))
    assert [sum(TARGETS[position] == target for position in val) for target in range(3)] == [2, 1, 1]


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=6, max_size=40),
    st.integers(0, 50),
    st.floats(0.05, 0.95),
)
def test_what_stays_together_is_in_one_part_and_every_class_is_left(images, seed, fraction) -> None:
    targets = [target for target, _ in images] + [0, 0, 1, 1, 2, 2]
    together: dict[int, list[int]] = {}
    for position, (_, group) in enumerate(images):  # groups reach over classes
        together.setdefault(group, []).append(position)
    groups = [group for group in together.values() if len(group) > 1]
    names = [f"{position:03}" for position in range(len(targets))]
    first, second = stratified_split(names, targets, fraction, seed, together=groups)
    assert sorted([*first, *second]) == list(range(len(targets)))
    assert all(len({position in second for position in group}) == 1 for group in groups)
    assert {targets[position] for position in first} == {0, 1, 2}
    assert second


def test_each_class_keeps_at_least_one() -> None:
    train, _ = stratified_split(NAMES, TARGETS, 0.99, seed=0)
    assert [TARGETS[position] for position in train] == [0, 1, 2]


def test_the_order_of_the_listing_does_not_matter() -> None:
    _, val = stratified_split(NAMES, TARGETS, 0.3, seed=5)
    _, reversed_val = stratified_split(NAMES[::-1], TARGETS[::-1], 0.3, seed=5)
    assert {NAMES[position] for position in val} == {NAMES[::-1][position] for position in reversed_val}


def test_a_further_class_does_not_move_the_others() -> None:
    _, val = stratified_split(NAMES, TARGETS, 0.3, seed=5)
    _, val_of_two = stratified_split(NAMES[:14], TARGETS[:14], 0.3, seed=5)
    assert [position for position in val if position < 14] == val_of_two


def test_the_seed_matters() -> None:
    assert stratified_split(NAMES, TARGETS, 0.3, seed=0) != stratified_split(NAMES, TARGETS, 0.3, seed=1)
    assert stratified_split(NAMES, TARGETS, 0.3, seed=1) == stratified_split(NAMES, TARGETS, 0.3, seed=1)


def test_published_splits_stay() -> None:
    """Figures are about these lists: they may never change."""
    assert stratified_split(NAMES, TARGETS, 0.3, seed=0)[1] == PINNED[0]
    assert stratified_split(NAMES, TARGETS, 0.3, seed=7)[1] == PINNED[7]


def test_classes_are_shuffled_independently() -> None:
    names = [f"{name}{number}" for name in "abcd" for number in range(9)]
    _, second = stratified_split(names, [place // 9 for place in range(36)], 0.34, seed=0)
    assert len({tuple(place % 9 for place in second if place // 9 == target) for target in range(4)}) == 4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 2, float("nan")])
def test_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ConfigError, match=rf"data\.val_fraction={fraction} is out of range"):
        stratified_split(NAMES, TARGETS, fraction, seed=0)


def test_one_image_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match=r"class of c_0 has 1 image, data\.val_fraction=0\.2 needs at least 2"):
        stratified_split(NAMES[:15], TARGETS[:15], 0.2, seed=0)


def test_balanced_weights_by_hand() -> None:
    weights = balanced_weights(TARGETS, 3)
    assert weights == pytest.approx([16 / 30, 16 / 12, 16 / 6])
    assert sum(weights[target] for target in TARGETS) / 16 == pytest.approx(1.0)


def test_few_shots_are_seeded_nested_and_equal() -> None:
    names = [f"{number:03}" for number in range(40)]
    targets = [number % 4 for number in range(40)]
    few = {shots: few_shots(names, targets, shots, 3, names_of="abcd") for shots in (1, 4, 10)}
    assert few[10] == list(range(40))
    assert set(few[1]) < set(few[4])
    assert Counter(targets[position] for position in few[4]) == dict.fromkeys(range(4), 4)
    assert few_shots(names, targets, 4, 4, names_of="abcd") != few[4]
    shuffled = list(reversed(range(40)))
    again = few_shots([names[p] for p in shuffled], [targets[p] for p in shuffled], 4, 3, names_of="abcd")
    assert {shuffled[position] for position in again} == set(few[4])  # names count, not their order


def test_more_shots_than_images() -> None:
    with pytest.raises(ConfigError, match=r"data\.shots_per_class=3: 1 classes have fewer .*, b only 2; use at most 2"):
        few_shots(list("vwxyz"), [0, 0, 0, 1, 1], 3, 0, names_of="ab")


@st.composite
def labeled_names(draw: st.DrawFn) -> tuple[list[str], list[int]]:
    """Names that are all different, of two to five classes with two to nine images each, in any order."""
    counts = draw(st.lists(st.integers(2, 9), min_size=2, max_size=5))
    pairs = [(f"{target}/{number}", target) for target, count in enumerate(counts) for number in range(count)]
    shuffled = draw(st.permutations(pairs))
    return [name for name, _ in shuffled], [target for _, target in shuffled]


@given(labeled_names(), st.floats(0.01, 0.99), st.integers(0, 2**32 - 1))
def test_every_split_is_a_split(labeled: tuple[list[str], list[int]], fraction: float, seed: int) -> None:
    names, targets = labeled
    first, second = stratified_split(names, targets, fraction, seed)
    assert sorted([*first, *second]) == list(range(len(names)))
    of_class, held_out = Counter(targets), Counter(targets[position] for position in second)
    for target, count in of_class.items():
        assert held_out[target] == min(max(1, round(count * fraction)), count - 1)
    order = sorted(range(len(names)), key=names.__getitem__)  # the order of a listing does not matter
    _, again = stratified_split([names[p] for p in order], [targets[p] for p in order], fraction, seed)
    assert {names[position] for position in second} == {names[order[position]] for position in again}


@given(labeled_names(), st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_few_shots_of_any_data(labeled: tuple[list[str], list[int]], shots: int, seed: int) -> None:
    names, targets = labeled
    chosen = few_shots(names, targets, shots, seed, names_of="abcde")
    assert Counter(targets[position] for position in chosen) == dict.fromkeys(set(targets), shots)


@given(st.integers(1, 60), st.integers(0, 2**31), st.integers(0, 5), st.booleans(), st.integers(1, 5))
def test_every_image_is_seen_once_by_some_process(
    images: int, seed: int, epoch: int, shuffle: bool, world_size: int
) -> None:
    ranks = [epoch_order(images, seed, epoch, shuffle, rank, world_size) for rank in range(world_size)]
    assert len({len(indices) for indices in ranks}) == 1
    dealt = [indices[place] for place in range(len(ranks[0])) for indices in ranks]
    assert sorted(dealt[:images]) == list(range(images))
    assert dealt[images:] == dealt[: len(dealt) - images] or world_size > images


def test_files_are_told_apart_by_path_and_size(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345")
    assert file_identities(tmp_path, ["a", "missing"]) == {"a": 5, "missing": -1}


def test_copies_are_equal_bytes_whatever_their_names(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    contents = {
        here: {"a": b"first", "b": b"other", "c": b"", "d": b"longer than that", "e": b"first"},
        there: {"x": b"words", "y": b"first", "z": b"first", "empty": b""},
    }
    for folder, files in contents.items():
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
    found = find_copies(here, [*contents[here], "missing"], there, [*contents[there], "missing too"])
    assert found == {"a": "y", "e": "y"}


def test_published_shots_and_digests_stay() -> None:
    names, targets = [f"{number:02}" for number in range(20)], [number % 2 for number in range(20)]
    assert few_shots(names, targets, 3, 0, names_of="ab") == [1, 2, 5, 10, 12, 15]
    assert few_shots(names, targets, 3, 7, names_of="ab") == [3, 4, 5, 8, 15, 16]
    assert split_digest(["b.jpg", "a.jpg"]) == hashlib.sha256(b"a.jpg\0b.jpg").hexdigest()[:16]


def test_files_with_equal_ends_are_read_whole(tmp_path: Path) -> None:
    for name, content in (("a", b"1" + bytes(5000)), ("x", b"2" + bytes(5000)), ("b", b"1"), ("y", b"1")):
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, (1, 1))
    assert find_copies(tmp_path, ["a", "b"], tmp_path, ["x", "y"]) == {"b": "y"}


def test_files_with_other_ends_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gn_transfer.data.splits.filecmp.cmp", lambda *_, **__: pytest.fail("read whole"))
    for name, end in (("a", b"1"), ("x", b"2")):
        (tmp_path / name).write_bytes(bytes(5000) + end)
    assert find_copies(tmp_path, ["a"], tmp_path, ["x"]) == {}


def test_a_file_that_cannot_be_read_is_no_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> bool:
        raise OSError("gone")

    monkeypatch.setattr("gn_transfer.data.splits.filecmp.cmp", gone)
    for name in ("a", "x"):
        (tmp_path / name).write_bytes(b"equal")
    assert find_copies(tmp_path, ["a"], tmp_path, ["x"]) == {}
