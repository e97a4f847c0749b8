"""``gn-transfer predict`` in process, on the tiny bundle of test_bundle."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_transfer.__main__ import main
from gn_transfer.commands.predict import find_images
from gn_transfer.config import ConfigError
from gn_transfer.data.dataset import ImageDataset, LabeledImage
from gn_transfer.inference.load import load_bundle

CLASSES = ["red", "green", "blue"]
COLOURS = dict(zip(CLASSES, [(200, 0, 0), (0, 200, 0), (0, 0, 200)], strict=True))


def flat(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((20, 30, 3), colour, np.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nested folders: one image of each colour, a corrupt one, and what is no image."""
    root = tmp_path / "images"
    for depth, (name, colour) in enumerate(COLOURS.items()):
        folder = root.joinpath(*["deep"] * depth)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(flat(colour)).save(folder / f"{name}.PNG")
    (root / "deep" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (root / "notes.txt").write_text("no image")
    (root / ".hidden.png").write_bytes(b"")
    return root


def test_a_folder_as_json(bundle_dir, images, capsys):
    assert main(["predict", str(bundle_dir), str(images), "--format", "json", "--top_k", "9"]) == 3
    captured = capsys.readouterr()
    entries = {Path(entry["path"]).stem: entry for entry in json.loads(captured.out)}
    assert list(entries) == ["red", "cut", "green", "blue"]
    for name in CLASSES:
        assert entries[name]["class"] == name
        assert len(entries[name]["top"]) == 3
        assert sum(one["prob"] for one in entries[name]["top"]) == pytest.approx(1.0)
    assert "corrupt JPEG" in entries["cut"]["error"]
    assert "1 of 4 images could not be read:" in captured.err
    assert f"{images / 'deep' / 'cut.jpg'}: corrupt JPEG" in captured.err


def test_csv(bundle_dir, images, capsys):
    assert main(["predict", str(bundle_dir), str(images), "--format", "csv", "--top_k", "2"]) == 3
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["path", "class", "prob", "class_2", "prob_2", "error"]
    assert [row["class"] for row in rows] == ["red", "", "green", "blue"]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False]


def test_a_table_of_sound_images_ends_with_zero(bundle_dir, images, capsys):
    assert main(["predict", str(bundle_dir), str(images / "red.PNG"), str(images / "deep" / "green.PNG")]) == 0
    captured = capsys.readouterr()
    assert [line.split()[-2:] for line in captured.out.splitlines()] == [["100.0%", "red"], ["100.0%", "green"]]
    assert captured.err == ""


@pytest.mark.parametrize(
    ("name", "begins"), [("found.csv", "path,class,prob"), ("found.json", "[\n{"), ("found.txt", "/")]
)
def test_results_go_to_a_file_whose_ending_chooses_the_format(bundle_dir, images, tmp_path, capsys, name, begins):
    assert main(["predict", str(bundle_dir), str(images), "--output", str(tmp_path / name)]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"results {tmp_path / name}" in captured.err
    assert (tmp_path / name).read_text().startswith(begins)
    assert not list(tmp_path.glob(".*.part"))


def test_a_figure(bundle_dir, images, tmp_path, capsys):
    target = tmp_path / "figure.png"
    assert main(["predict", str(bundle_dir), str(images), "--figure", str(target)]) == 3
    with Image.open(target) as figure:
        assert figure.size[0] > 100


def test_patterns_and_repeats(images):
    everything = [str(images / "deep" / "deep" / "blue.PNG"), str(images / "deep" / "green.PNG")]
    everything.append(str(images / "red.PNG"))
    assert find_images([f"{images}/**/*.PNG"])[0] == everything
    assert find_images([everything[2], f"{images}/**/*.PNG", everything[2]])[0] == [everything[2], *everything[:2]]


def test_a_name_that_looks_like_a_pattern(tmp_path):
    path = tmp_path / "cat[1].jpg"
    path.write_bytes(b"x")
    assert find_images([str(path)]) == ([str(path)], {})


@pytest.mark.parametrize(("output", "code"), [(">&-", 0), ("> /dev/full", 2), ("| true", 0)])
def test_an_output_that_cannot_be_written(bundle_dir, images, output, code):
    words = f"{sys.executable} -m gn_transfer predict {bundle_dir} {images / 'red.PNG'} {output}"
    script = f"set -o pipefail; {words}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.returncode == code
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.getuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_read_is_named(bundle_dir, images, capsys):
    (images / "deep").chmod(0)
    try:
        assert main(["predict", str(bundle_dir), str(images)]) == 3
    finally:
        (images / "deep").chmod(0o755)
    assert "1 folders could not be read" in capsys.readouterr().err


def test_an_unreadable_folder_among_others(images, monkeypatch):
    def walk(top, onerror):
        onerror(PermissionError(13, "Permission denied", str(images / "deep")))
        yield str(images), [], ["red.PNG"]

    monkeypatch.setattr(os, "walk", walk)
    found = [str(images / "red.PNG")], {str(images / "deep"): "Permission denied"}
    assert find_images([str(images)]) == found


def test_linked_folders_are_looked_at_but_not_in_a_circle(images, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(flat((0, 0, 0))).save(tmp_path / "elsewhere" / "black.png")
    (images / "linked").symlink_to(tmp_path / "elsewhere")
    (images / "deep" / "circle").symlink_to(images)
    (images / "a").symlink_to(images / "deep")  # sorts first, and is no new folder
    (images / "up").symlink_to(tmp_path)
    (images / "@eaDir").mkdir()
    Image.fromarray(flat((0, 0, 0))).save(images / "@eaDir" / "thumbnail.png")
    found, unreadable = find_images([str(images)])
    assert not unreadable
    assert sorted(Path(path).name for path in found) == ["black.png", "blue.PNG", "cut.jpg", "green.PNG", "red.PNG"]
    assert str(images / "deep" / "green.PNG") in found


@pytest.mark.parametrize("option", ["--output", "--figure"])
def test_no_input_is_written_over(bundle_dir, images, tmp_path, capsys, option):
    image = tmp_path / "mine.png"
    Image.fromarray(flat((0, 0, 200))).save(image)
    content = image.read_bytes()
    assert main(["predict", str(bundle_dir), str(image), option, str(image)]) == 2
    assert "which would be changed; name another place" in capsys.readouterr().err
    assert image.read_bytes() == content
    assert main(["predict", str(bundle_dir), str(image), option, str(bundle_dir / "x.png")]) == 2
    assert "is in the bundle" in capsys.readouterr().err


def test_nothing_but_an_unreadable_folder(bundle_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gn_transfer.commands.predict.find_images", lambda _: ([], {"locked": "Permission denied"}))
    assert main(["predict", str(bundle_dir), str(tmp_path), "--format", "json"]) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == []
    assert "1 folders could not be read" in printed.err


def test_cells_that_a_spreadsheet_would_run():
    from gn_transfer.files import spreadsheet_cell

    texts = ["=1+1", "-2", "@x", "cat", 0.5, -0.5]
    assert list(map(spreadsheet_cell, texts)) == ["'=1+1", "'-2", "'@x", "cat", 0.5, -0.5]


@pytest.mark.parametrize(
    ("source", "message"),
    [("gone.jpg", "no such file or folder"), ("*.jpg", "no file or folder fits"), (".", "no image in there")],
)
def test_nothing_to_predict(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    Path("clip.mp4").write_bytes(b"\0\0\0\x20ftypisom")
    with pytest.raises(ConfigError, match=message):
        find_images([source])


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        (b"\0\0\0\x20ftypisom", "an MP4 video"),
        (b"RIFF\x10\0\0\0AVI LIST", "an AVI video"),
        (b"\x1a\x45\xdf\xa3" + b"\0" * 12, "a Matroska or WebM video"),
        (b"\0\0\x01\xba" + b"\0" * 12, "an MPEG video"),
    ],
)
def test_a_video_is_named_as_one(bundle_dir, tmp_path, capsys, head, kind):
    (tmp_path / "clip.jpg").write_bytes(head + b"\0" * 100)
    assert main(["predict", str(bundle_dir), str(tmp_path / "clip.jpg")]) == 3
    assert f"{kind}, not an image; extract its frames first" in capsys.readouterr().err


def test_a_decompression_bomb_is_not_decoded(bundle_dir, tmp_path, capsys):
    Image.new("1", (12_000, 10_000)).save(tmp_path / "bomb.png")
    assert main(["predict", str(bundle_dir), str(tmp_path / "bomb.png")]) == 3
    assert "12,000 x 10,000 = 120 megapixels; at most 89" in capsys.readouterr().err


def test_a_huge_file_is_not_read(bundle_dir, tmp_path, capsys):
    with (tmp_path / "huge.jpg").open("wb") as file:
        file.truncate(2**30 + 1)
    assert main(["predict", str(bundle_dir), str(tmp_path / "huge.jpg")]) == 3
    assert "larger than 1024 MiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k", "0"], "--top_k=0 is out of range"),
        (["--batch_size", "-1"], "--batch_size=-1 is out of range"),
        (["--threads", "0"], "--threads=0 is out of range"),
        (["--top_k", "two"], "argument --top_k: invalid int value: 'two'. See gn-transfer predict --help."),
        (["--format", "xml"], "invalid choice: 'xml'"),
        (["--output", "nowhere/found.csv"], "give the path of a file in an existing folder"),
        (["--figure", "figure.txt"], "give a path in an existing folder that ends in .png"),
        (["--figure", "nowhere/figure.png"], "give a path in an existing folder that ends in .png"),
        (["--top", "2"], "unrecognized arguments"),
    ],
)
def test_bad_options(bundle_dir, images, capsys, arguments, message):
    assert main(["predict", str(bundle_dir), str(images), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert message in line


def test_names_that_are_no_text(bundle_dir, tmp_path, capsys):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.png")
    Image.fromarray(flat(COLOURS["red"])).save(path, "PNG")
    assert main(["predict", str(bundle_dir), path]) == 0
    assert "/caf\\xe9\\n.png" in capsys.readouterr().out


def test_a_reader_that_leaves_early_is_no_fault(bundle_dir, tmp_path):
    Image.fromarray(flat(COLOURS["red"])).save(tmp_path / "red.png")
    for number in range(600):
        (tmp_path / f"{number:05}.png").hardlink_to(tmp_path / "red.png")
    command = f"{sys.executable} -m gn_transfer predict {bundle_dir} {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_predict_imports_no_trainer(bundle_dir, images):
    heavy = ["torch", "lightning", "timm", "albumentations", "matplotlib", "rich", "onnx"]
    code = (
        "import sys; from gn_transfer.__main__ import main; "
        f"assert main(['predict', {str(bundle_dir)!r}, {str(images / 'red.PNG')!r}]) == 0; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_pixels_equal_those_of_training_on_real_images(bundle_dir, real_data):
    paths = sorted((real_data / "pet_originals").rglob("*.jpg"))[:20]
    paths += sorted((real_data / "pet_originals" / "quirks").iterdir())
    bundle = load_bundle(bundle_dir)
    dataset = ImageDataset(
        real_data, [LabeledImage(p.relative_to(real_data).as_posix(), 0) for p in paths], bundle.img_size
    )
    assert len(paths) > 20
    for index, path in enumerate(paths):
        theirs, _ = dataset[index]
        assert np.array_equal(bundle.graph_input(path), theirs.permute(1, 2, 0).numpy())
