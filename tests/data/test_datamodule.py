"""What all data modules promise: batches, determinism, bad images, the plan."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from gn_transfer.config import ConfigError
from gn_transfer.data import BadImageError, Folder, ImageDataModule, Pets
from gn_transfer.data.describe import describe_data
from gn_transfer.data.workers import choose_num_workers


def pets(root: Path, **options: Any) -> Pets:
    """Pets, set up for fit."""
    data = Pets(root, **{"img_size": 32, "batch_size": 4, "num_workers": 0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def epoch_batches(data: ImageDataModule, epoch: int = 0) -> list[tuple[Tensor, Tensor]]:
    """All training batches of one epoch."""
    data.train_sampler.set_epoch(epoch)
    return list(data.train_dataloader())


def assert_same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> None:
    for (images, targets), (other_images, other_targets) in zip(one, other, strict=True):
        torch.testing.assert_close(images, other_images, rtol=0, atol=0)
        torch.testing.assert_close(targets, other_targets, rtol=0, atol=0)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def spoil_inside(path: Path) -> None:
    """Keep both ends and lose the quantization tables: only decoding finds it."""
    data = path.read_bytes()
    start = data.index(b"\xff\xdb")
    path.write_bytes(data[:start] + data[data.index(b"\xff\xc0") :])


def test_batches(pets_root: Path) -> None:
    data = pets(pets_root)
    images, targets = next(iter(data.train_dataloader()))
    assert isinstance(next(iter(data.train_dataloader())), tuple)
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (4, 3, 32, 32))
    assert (targets.dtype, tuple(targets.shape)) == (torch.int64, (4,))
    assert images.is_contiguous()
    assert len(data.train_dataloader()) == 6  # 24 images
    assert sum(len(targets) for _, targets in data.val_dataloader()) == 6
    assert [len(targets) for _, targets in data.val_dataloader()] == [6]  # larger than the training batch


@pytest.mark.parametrize("recipe", ["none", "light", "crop_flip", "bit", "strong"])
def test_any_number_of_workers_gives_the_same_images(pets_root: Path, recipe: str) -> None:
    epochs = [
        [epoch_batches(pets(pets_root, recipe=recipe, num_workers=workers), epoch) for epoch in (0, 1)]
        for workers in (0, 1, 2)
    ]
    for with_workers in epochs[1:]:
        for epoch in (0, 1):
            assert_same(with_workers[epoch], epochs[0][epoch])


def test_persistent_workers_move_on_with_the_epochs(pets_root: Path) -> None:
    data = pets(pets_root, num_workers=2)
    loader, alone = data.train_dataloader(), pets(pets_root)
    for epoch in (0, 1, 2):
        data.train_sampler.set_epoch(epoch)
        assert_same(list(loader), epoch_batches(alone, epoch))


def test_workers_differ_and_epochs_differ(tmp_path: Path, write_image: Any) -> None:
    for name in ("a", "b"):
        for number in range(5):
            write_image(tmp_path / name / f"{number}.jpg", seed=1)  # one and the same image
    data = Folder(tmp_path, img_size=32, num_workers=2)
    data.setup("fit")
    drawn = [images.numpy().tobytes() for epoch in range(3) for images, _ in epoch_batches(data, epoch)]
    assert len(drawn) == 24
    assert len(set(drawn)) == 24  # two workers with the same state would repeat each other's crops


def test_another_seed_is_another_epoch(pets_root: Path) -> None:
    def flat(data: ImageDataModule) -> list[int]:
        return [int(target) for _, targets in epoch_batches(data) for target in targets]

    assert flat(pets(pets_root, seed=1)) == flat(pets(pets_root, seed=1))
    assert flat(pets(pets_root, seed=1)) != flat(pets(pets_root, seed=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_gives_the_rest_of_the_epoch(pets_root: Path, workers: int) -> None:
    whole = epoch_batches(pets(pets_root), epoch=3)
    data = pets(pets_root, num_workers=workers)
    data.train_sampler.resume_at(3, 2)
    iterator = iter(data.train_dataloader())  # before set_epoch, as Lightning does on a restart
    data.train_sampler.set_epoch(3)
    assert_same(list(iterator), whole[2:])


def test_ranks_share_an_epoch(pets_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Rank:
        def __init__(self, rank: int) -> None:
            self.global_rank, self.world_size = rank, 2

    seen = []
    for rank in range(2):
        data = Pets(pets_root, img_size=32, num_workers=0)
        monkeypatch.setattr(data, "trainer", Rank(rank))
        data.setup("fit")
        seen.append([index for _, index in data.train_sampler])
    assert len(seen[0]) == len(seen[1]) == 12
    assert sorted(seen[0] + seen[1]) == list(range(24))


def test_fit_never_opens_a_test_image(pets_root: Path) -> None:
    for path in (pets_root / "oxford-iiit-pet" / "images").glob("*_1[12].jpg"):
        path.unlink()
    data = pets(pets_root, on_bad_image="skip")
    assert len(epoch_batches(data)) == 6
    assert data.bad_images == []
    with pytest.raises(BadImageError, match=r"Abyssinian_11\.jpg: no such file \(5 more like it\)"):
        Pets(pets_root).setup("test")


def test_truncated_image_stops_setup_with_its_path(pets_root: Path) -> None:
    cut_short(pets_root / "oxford-iiit-pet" / "images" / "Abyssinian_3.jpg")
    with pytest.raises(BadImageError, match=r"Abyssinian_3\.jpg: truncated JPEG.*with on_bad_image skip \(--data"):
        pets(pets_root)


@pytest.mark.parametrize("workers", [0, 1])
def test_undecodable_image_stops_the_loader_with_one_clear_line(pets_root: Path, workers: int) -> None:
    data = pets(pets_root, num_workers=workers)
    path = pets_root / data.split()["train"][5]
    spoil_inside(path)
    loader: Any = data.train_dataloader()
    with pytest.raises(BadImageError) as raised:
        list(loader)
    message = str(raised.value)
    assert message.startswith(f"{path}: cannot be decoded")
    assert message.endswith("leave it out with on_bad_image skip (--data.on_bad_image skip).")
    assert "\n" not in message


def test_skip_leaves_out_counts_and_lists(pets_root: Path) -> None:
    images = pets_root / "oxford-iiit-pet" / "images"
    cut_short(images / "Abyssinian_3.jpg")
    spoil_inside(images / "Maine_Coon_2.jpg")
    data = pets(pets_root, on_bad_image="skip")
    assert [path for path, _ in data.bad_images] == [
        "oxford-iiit-pet/images/Abyssinian_3.jpg",
        "oxford-iiit-pet/images/Maine_Coon_2.jpg",
    ]
    assert len(data.train_dataset) + len(data.val_dataset) == 28
    assert sum(len(targets) for _, targets in epoch_batches(data)) == len(data.train_sampler) == len(data.train_dataset)
    data.setup("validate")  # finds them again: they are not listed twice
    assert len(data.bad_images) == 2
    skipped = dict(describe_data(data))["skipped"]
    assert skipped.startswith("2 that cannot be decoded: oxford-iiit-pet/images/Abyssinian_3.jpg (truncated JPEG")


def test_split_is_plain_disjoint_and_repeats(pets_root: Path) -> None:
    split = pets(pets_root).split()
    assert set(split) == {"train", "val"}
    assert len(split["train"]) == 24
    assert len(split["val"]) == 6
    assert not set(split["train"]) & set(split["val"])
    assert all((pets_root / path).is_file() for path in split["train"] + split["val"])
    assert pets(pets_root).split() == split
    assert pets(pets_root, seed=1).split() != split


def test_images_that_calibrate_follow_the_seed(pets_root: Path) -> None:
    every, few = pets(pets_root).training_images(100), pets(pets_root).training_images(5)
    assert (every.dtype, tuple(every.shape)) == (torch.uint8, (24, 3, 32, 32))
    assert torch.equal(few, every[:5])
    assert not torch.equal(pets(pets_root, seed=1, val_fraction=0.2).training_images(5), few)
    data = pets(pets_root)
    before, data.seed = data.training_images(5), 9  # the same split, other images of it
    assert not torch.equal(data.training_images(5), before)


def test_batches_that_evaluate_with_their_own_statistics_mix_the_classes(pets_root: Path) -> None:
    data = Pets(pets_root, img_size=32, batch_size=4, num_workers=0)
    data.evaluate_in_training_batches = True
    data.setup("fit")
    targets = [image.target for image in data.val_dataset.images]
    assert targets != sorted(targets)
    assert sorted(data.split()["val"]) == sorted(pets(pets_root).split()["val"])
    assert [len(batch) for batch, _ in data.val_dataloader()] == [4, 2]


def test_few_shots_leave_validation_as_it_is_and_are_stored(pets_root: Path) -> None:
    few, every = pets(pets_root, shots_per_class=2), pets(pets_root)
    assert few.split()["val"] == every.split()["val"]
    assert len(few.split()["train"]) == 6
    assert set(few.split()["train"]) < set(every.split()["train"])
    assert pets(pets_root, shots_per_class=2).split() == few.split()


def test_grey_batches(pets_root: Path) -> None:
    data = Pets(pets_root, img_size=32)
    data.channels = 1
    data.setup("fit")
    assert next(iter(data.train_dataloader()))[0].shape == (1, 1, 32, 32)


def test_a_dropped_iterator_stops_its_threads(pets_root: Path) -> None:
    data = pets(pets_root, num_workers=2, batch_size=1)
    iterator = iter(data.train_dataloader())
    next(iterator)
    assert any(thread.name.startswith("images") for thread in threading.enumerate())
    del iterator
    assert not any(thread.name.startswith("images") for thread in threading.enumerate())


def test_validate_sets_up_the_same_validation_images_only(pets_root: Path) -> None:
    data = Pets(pets_root)
    data.setup("validate")
    assert data.split() == {"val": pets(pets_root).split()["val"]}


def test_plan(pets_root: Path) -> None:
    rows = dict(describe_data(pets(pets_root, num_workers=None)))
    assert rows["images"] == "train 24, val 6, test 6 (held back); 32 px, recipe crop_flip"
    assert rows["classes"] == "3: Abyssinian, american_bulldog, Maine_Coon"
    assert rows["class balance"] == "8 images each; class weights none"
    assert "compute" in rows["threads"]


def test_class_weights(folder_root: Path) -> None:
    data = Folder(folder_root, val_fraction=0.25, class_weights="balanced")
    data.setup("fit")
    assert data.class_counts(data.train_dataset.images) == {"apple": 6, "pear": 3}
    assert data.class_counts(data.val_dataset.images) == {"apple": 2, "pear": 1}
    weights = data.class_weight_tensor
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor([9 / 12, 9 / 6]))
    assert dict(describe_data(data))["class balance"] == "from 3 (pear) to 6 (apple) (2.0 to 1); class weights balanced"
    assert Folder(folder_root).class_weight_tensor is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 0}, r"data\.img_size=0 is out of range"),
        ({"batch_size": -1}, r"data\.batch_size=-1 is out of range"),
        ({"seed": -1}, r"data\.seed=-1 is out of range"),
        ({"shots_per_class": 0}, r"data\.shots_per_class=0 is out of range"),
        ({"num_workers": -1}, r"data\.num_workers=-1 is out of range"),
    ],
)
def test_values_out_of_range(pets_root: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Pets(pets_root, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cores", "threads", "on_gpu", "processes", "workers"),
    [
        (2, 2, False, 1, 0),
        (2, 1, False, 1, 1),
        (8, 4, False, 1, 4),
        (8, 4, False, 2, 0),
        (2, 2, True, 1, 1),
        (1, 1, True, 1, 0),
        (64, 64, True, 4, 8),
    ],
)
def test_threads_and_workers_fit_the_cores(
    cores: int, threads: int, on_gpu: bool, processes: int, workers: int
) -> None:
    assert choose_num_workers(cores, threads, on_gpu=on_gpu, processes=processes) == workers


def test_the_base_is_abstract(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="abstract"):
        ImageDataModule(tmp_path)  # type: ignore[abstract]


def test_an_index_alone_means_epoch_0(pets_root: Path) -> None:
    dataset = pets(pets_root).train_dataset
    torch.testing.assert_close(dataset[3][0], dataset[0, 3][0])
    assert not torch.equal(dataset[3][0], dataset[1, 3][0])
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=2)
    assert next(iter(loader))[0].shape == (2, 3, 32, 32)
