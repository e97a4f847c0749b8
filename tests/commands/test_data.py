"""gn-transfer data check | sample | cache | show, through the command line."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from gn_transfer.__main__ import main


@pytest.fixture(autouse=True)
def in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["data", *words]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out if code == 0 or captured.out else captured.err


def pets(root: Path) -> list[str]:
    return ["--config", "pets_gnws.yaml", "--data.root", str(root)]


def test_check_prints_and_leaves_nothing(capsys: Any, pets_root: Path) -> None:
    printed = run(capsys, "check", *pets(pets_root))
    assert "trainval    30 images, 3 classes, 10 per class" in printed
    assert "ready to train" in printed
    assert not Path("runs").exists()


def test_check_exits_with_2_and_lists(capsys: Any, pets_root: Path) -> None:
    images = pets_root / "oxford-iiit-pet" / "images"
    (images / "Abyssinian_3.jpg").write_bytes(b"")
    (images / "Maine_Coon_11.jpg").write_bytes((images / "Maine_Coon_2.jpg").read_bytes())
    (images / "stray.jpg").write_bytes(b"")
    facts = json.loads(run(capsys, "check", *pets(pets_root), "--format", "json", code=2))
    assert [file["path"] for file in facts["unreadable"]] == [
        "oxford-iiit-pet/images/Abyssinian_3.jpg",
        "oxford-iiit-pet/images/stray.jpg",
    ]
    assert facts["problems"][0].startswith("1 file cannot be decoded")
    assert [file["split"] for file in facts["in_several_splits"][0]] == ["trainval", "test"]
    assert "trainval: 10 images of Abyssinian, officially 100" in facts["warnings"]
    printed = run(capsys, "check", *pets(pets_root), "--data.on_bad_image", "skip")
    assert "empty file" in printed


def hold_out(pets_root: Path, run: str, rows: list[tuple[str, str, str, float, float]]) -> None:
    """Write what a run on these images leaves of its predictions."""
    folder = Path("runs") / "pets" / run
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"root": str(pets_root)}}}))
    with (folder / "predictions_best_val.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "target", "predicted", "prob_target", "prob_predicted"])
        writer.writerows((f"oxford-iiit-pet/images/{name}", *values) for name, *values in rows)


def test_check_finds_likely_wrong_labels(capsys: Any, pets_root: Path) -> None:
    assert "labels are not checked: no run below runs/" in run(capsys, "check", *pets(pets_root))
    sound = [
        (f"{breed}_{number}.jpg", breed, breed, 0.8, 0.8)
        for breed in ("Abyssinian", "american_bulldog")
        for number in (1, 2)
    ]
    wrong = ("Abyssinian_3.jpg", "Abyssinian", "american_bulldog", 0.02, 0.97)
    hold_out(pets_root, "one", [*sound, wrong, ("american_bulldog_3.jpg", "american_bulldog", "Abyssinian", 0.3, 0.4)])
    hold_out(pets_root, "two", [*sound, wrong])
    facts = json.loads(run(capsys, "check", *pets(pets_root), "--format", "json"))
    [found] = facts["likely_wrong_labels"]  # of the other one the model was not certain enough
    assert found["path"] == "oxford-iiit-pet/images/Abyssinian_3.jpg"
    assert (found["label"], found["suggested"], found["runs"], found["agreeing"]) == (
        "Abyssinian",
        "american_bulldog",
        2,
        2,
    )
    assert found["prob_suggested"] == pytest.approx(0.97)
    assert "labels: 6 of " in " ".join(facts["notes"])

    images = pets_root / "oxford-iiit-pet" / "images"
    (images / "Maine_Coon_11.jpg").write_bytes((images / "Maine_Coon_2.jpg").read_bytes())
    printed = run(capsys, "check", *pets(pets_root), "--output", "report")
    said = "Abyssinian_3.jpg: labeled Abyssinian (2.0%), likely american_bulldog (97.0%), 2 of 2 runs"
    assert "".join(said.split()) in "".join(printed.split())
    page = Path("report/index.html").read_text()
    assert (
        page.index("Likely wrong labels") < page.index("The same image in two splits") < page.index("What was checked")
    )
    assert page.count("data:image/jpeg;base64,") == 3
    assert "likely american_bulldog (97.0\u00a0%)" in page
    assert said in page
    run(capsys, "check", *pets(pets_root), "--output", "report")  # replaces its own page
    Path("mine.html").write_text("mine")
    assert main(["data", "check", *pets(pets_root), "--output", "mine.html"]) == 2
    assert "mine.html exists and is no page of gn-transfer" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine"


def test_check_of_a_full_download(capsys: Any, tmp_path: Path, real_data: Path) -> None:
    base = tmp_path / "full" / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    (base / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one.jpg")
    with (real_data / "pets_official_split.csv").open() as file:
        rows = list(csv.DictReader(file))
    breeds = {breed: number for number, breed in enumerate(sorted({row["breed"] for row in rows}), 1)}
    for split in ("trainval", "test"):
        lines = [f"{row['image']} {breeds[row['breed']]} 1 1" for row in rows if row["split"] == split]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))
    for row in rows:
        os.link(tmp_path / "one.jpg", base / "images" / f"{row['image']}.jpg")
    facts = json.loads(run(capsys, "check", *pets(tmp_path / "full"), "--format", "json"))
    assert facts["notes"][:-1] == [
        "trainval: 3,680 images of all 37 breeds, as officially published",
        "test: 3,669 images of all 37 breeds, as officially published",
    ]


def test_cache_then_fit(capsys: Any, pets_root: Path) -> None:
    words = [*pets(pets_root), "--data.cache_dir", "cache", "--data.img_size", "64"]
    printed = run(capsys, "cache", *words)
    assert "train  24 of 24 there, 24 of them new" in printed
    assert "val    6 of 6 there, 6 of them new" in printed
    assert "24 of 24 there, 0 of them new" in run(capsys, "cache", *words)
    assert len(list(Path("cache").rglob("*.px"))) == 30
    fit = [*words, "--model.pretrained", "null", "--model.backbone", "resnet18", "--dry_run"]
    assert main(["fit", *fit]) == 0
    plan = " ".join(capsys.readouterr().out.split())
    assert "cache disk (auto: it has twice the room) in cache, complete" in plan


def test_cache_without_a_cache(capsys: Any, pets_root: Path) -> None:
    message = run(capsys, "cache", *pets(pets_root), "--data.cache", "none", code=2)
    assert "data.cache is none" in message
    Path("file").touch()
    message = run(capsys, "cache", *pets(pets_root), "--data.cache", "disk", "--data.cache_dir", "file/c", code=2)
    assert "train  0 of 24 there" in message


@pytest.mark.parametrize("mixing", [[], ["--regularization.mixup", "0.4", "--regularization.cutmix", "1"]])
def test_show(capsys: Any, pets_root: Path, mixing: list[str]) -> None:
    printed = run(capsys, "show", *pets(pets_root), "--output", "here/sheet.png", "--count", "8", *mixing)
    assert "8 training images, recipe crop_flip: here/sheet.png" in printed
    with Image.open("here/sheet.png") as sheet:
        assert sheet.width > 6 * 200
        assert len(set(sheet.convert("L").get_flattened_data())) > 50


def test_show_of_grey_digits(capsys: Any) -> None:
    run(
        capsys,
        "show",
        "--data",
        "Digits",
        "--model.backbone",
        "cnn_mnist",
        "--data.img_size",
        "28",
        "--output",
        "sheet.png",
    )
    with Image.open("sheet.png") as sheet:
        assert sheet.width == 6 * (4 * 28 + 6) + 6


def test_sample(capsys: Any) -> None:
    assert "the sample is in mine/oxford-iiit-pet" in run(capsys, "sample", "--root", "mine")
    assert len(list(Path("mine").rglob("*.jpg"))) == 750


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["chekc"], "data chekc: not a command; did you mean 'check'"),
        (["sample", "--rot", "x"], "--rot is not an option; there are --root and --seed"),
        (["check", "--format", "xml"], "invalid choice: 'xml'"),
        (["check", "--data.rot", "x"], "did you mean 'data.root'"),
        (["show", "--count", "0"], "0 is out of range"),
        (["cache", "--config", "sample_gnws.yaml", "--dry_run"], "data cache has no --dry_run"),
        (["check", "--data", "Folder", "--data.root", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(capsys: Any, words: list[str], message: str) -> None:
    said = run(capsys, *words, code=2)
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_help(capsys: Any) -> None:
    printed = run(capsys, "--help")
    assert all(command in printed for command in ("check", "sample", "cache", "show"))
    assert "--format" in run(capsys, "check", "--help")


def test_check_finds_what_fit_would_refuse(capsys: Any, tmp_path: Path) -> None:
    for name, number in (("cat", 4), ("dog", 1)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (70, 70), (60 * index, 9, 9)).save(tmp_path / "photos" / name / f"{index}.png")
    printed = run(capsys, "check", "--data", "Folder", "--data.root", "photos", code=2)
    assert "not ready: see the problems" in printed
    assert "has 1 image" in " ".join(printed.split())
    assert main(["fit", "photos", "--data.test_fraction", "0"]) == 2
    assert "has 1 image" in capsys.readouterr().err
