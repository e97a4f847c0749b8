"""``gn-transfer report`` on made-up runs; that of a real run is in ``tests/commands/test_fit.py``."""

from __future__ import annotations

import base64
import json
import os
import re
import tracemalloc
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from fabricate import CLASSES, fabricate

from gn_transfer.__main__ import main
from gn_transfer.report.calibration import calibration, compare_confidence
from gn_transfer.report.evaluation import class_names, class_scores, confused_pairs, confusion, mistakes
from gn_transfer.report.images import find_image
from gn_transfer.report.page import choose_run_folder
from gn_transfer.report.predictions import Predictions
from gn_transfer.report.runs import read_run
from gn_transfer.report.sentences import MOST_IMAGES


def page_of(folder: Path) -> str:
    assert main(["report", str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


def failure(capsys, *arguments: str) -> str:
    assert main(["report", *arguments]) == 2
    [line] = capsys.readouterr().err.strip().splitlines()
    return line


def of_six_images() -> Predictions:
    return Predictions(
        [f"{number}.jpg" for number in range(6)],
        ["cat", "cat", "cat", "dog", "dog", "owl"],
        ["cat", "dog", "dog", "dog", "dog", "cat"],
        np.array([0.9, 0.2, 0.1, 0.6, 0.95, 0.3]),
        np.array([0.9, 0.7, 0.55, 0.6, 0.95, 0.65]),
    )


def test_scores_by_hand():
    owl, cat, dog = class_scores(of_six_images())  # the worst recall first
    assert (owl.name, owl.images, owl.recall, owl.precision, owl.f1, owl.taken_for) == ("owl", 1, 0, 0, 0, ("cat", 1))
    assert (cat.images, cat.taken_for) == (3, ("dog", 2))
    assert (cat.recall, cat.precision, cat.f1) == (pytest.approx(1 / 3), 1 / 2, pytest.approx(2 / 5))
    assert (dog.recall, dog.precision, dog.f1, dog.taken_for) == (1, 1 / 2, pytest.approx(2 / 3), None)
    assert confusion(of_six_images()).tolist() == [[1, 2, 0], [0, 2, 0], [1, 0, 0]]
    assert confused_pairs(of_six_images(), 10) == [("cat", "dog", 2), ("owl", "cat", 1)]


def test_calibration_by_hand():
    found = calibration(of_six_images())
    # (0.5, 0.6]: 0.55 wrong, 0.6 right; (0.6, 0.7]: 0.7 and 0.65 wrong; (0.8, 0.9]: 0.9 right; (0.9, 1]: 0.95 right
    assert [(part.images, part.accuracy) for part in found.bins] == [(2, 0.5), (2, 0), (1, 1), (1, 1)]
    assert [part.confidence for part in found.bins] == pytest.approx([0.575, 0.675, 0.9, 0.95])
    assert found.error == pytest.approx((2 * 0.075 + 2 * 0.675 + 0.1 + 0.05) / 6)
    assert (found.accuracy, found.confidence) == (0.5, pytest.approx(4.35 / 6))
    low, high = found.bins[1].low, found.bins[1].high
    assert (low, high) == (0, pytest.approx(3.8415 / (2 + 3.8415), abs=1e-4))  # Wilson: z^2 / (n + z^2)


def test_the_worst_error_is_the_least_probable_class():
    assert [(wrong.path, wrong.prob_target, wrong.prob_predicted) for wrong in mistakes(of_six_images())] == [
        ("2.jpg", 0.1, 0.55), ("1.jpg", 0.2, 0.7), ("5.jpg", 0.3, 0.65),
    ]  # fmt: skip


def test_the_page_stands_alone_and_holds_everything(tmp_path, write_image):
    folder = fabricate(tmp_path / "runs", accuracy=0.5, data_root=str(tmp_path / "photos"))
    for place in range(40):
        write_image(tmp_path / "photos" / f"val_{place}.jpg", (50, 60))
    write_image(folder / "training_images.jpg", (50, 60))
    (folder / "plan.json").write_text(
        json.dumps({"rows": [["images", "train 30, val 40"], ["", "& more"]], "warnings": ["a warning <of> the plan"]})
    )
    page = page_of(folder)
    for heading in (
        "Accuracy", "Loss", "Calibration", "Class by class", "Confusion matrix", "Most frequent confusions",
        "Worst errors", "Most confident errors", "Training images as the model saw them", "Plan", "Provenance",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in page, heading
    assert "train 30, val 40" in page
    assert "a warning &lt;of&gt; the plan" in page
    assert "50.0\u00a0% [35.2, 64.8] (20 of 40) of the validation images are right" in page  # Wilson's interval
    assert "50.0\u00a0% [35.2, 64.8] (20 of 40) of the test images" in page
    assert page.count("data:image/jpeg;base64,") == MOST_IMAGES + 8 + 1  # 20 errors, and the training images
    assert "not found" not in page
    assert "model.norm" in page  # a setting of config.yaml
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "<script" not in page
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        ET.fromstring(svg)
    assert "<title>epoch 2: training loss 0.5</title>" in page
    names, counts = class_names(found := read_run(folder).predictions("best/val/acc1")), confusion(found)
    said = f"{counts[0, 0]} of 10 images of {names[0]} ({counts[0, 0] / 10:.0%}) were recognized"
    assert f'title="{said}"' in page
    assert main(["report", str(folder)]) == 0  # replaces its own page


@pytest.mark.parametrize("tested", ["best.ckpt", "last.ckpt"])
def test_the_page_says_which_checkpoint_was_tested(tmp_path, tested):
    page = page_of(fabricate(tmp_path / "runs", **{"test/checkpoint": tested}))
    honest = "The test images give the honest figure" in page
    other = "The figure of the test images is that of last.ckpt" in page
    assert (honest, other) == (tested == "best.ckpt", tested == "last.ckpt")
    assert "test/checkpoint" in page


def test_a_test_without_any_label_leaves_the_run_usable(tmp_path):
    folder = fabricate(tmp_path / "runs")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"test/acc1": None}))
    assert "of the validation images are right" in page_of(folder)


def test_class_names_are_text_and_never_markup(tmp_path):
    folder = fabricate(tmp_path)
    for name in ("predictions_best_val.csv", "predictions_test.csv"):
        path = folder / name
        path.write_text(path.read_text().replace("pug", "<img src=x>&\"'"))
    page = page_of(folder)
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page


def test_what_a_stranger_wrote_into_a_run_is_shown_and_not_obeyed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("matplotlibrc").write_text("text.usetex: True\nfont.size: 99\n")
    folder = fabricate(tmp_path / "runs", device="\x1b]0;evil\x07 \ud800", samples_seen=10)
    (folder / "plan.json").write_text('{"rows": [["\\ud800", 5]], "warnings": ["\\u001b[31m"]}')
    (tmp_path / "secret").write_text("root:x:0")
    (folder / "training_images.jpg").symlink_to(tmp_path / "secret")
    page = page_of(folder)
    assert "\x1b" not in page
    assert base64.b64encode(b"root:x:0").decode() not in page
    assert main(["compare", str(tmp_path / "runs")]) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("epochs.csv", "step,val/acc1\n1,0.5\n"),
        ("epochs.csv", "epoch,train/loss\n1,0.5\n"),
        ("epochs.csv", "epoch,val/acc1,train/loss,val/loss\n1,0.5,1e308,1e308\n2,0.6,1,1\n"),
        ("epochs.csv", "epoch,val/acc1\n1e400,0.5\n"),
        ("epochs.csv", "epoch,val/acc1,train/loss,val/loss\n" + "".join(f"{n},0.5,1,1\n" for n in range(1, 5000))),
        ("training_images.jpg", "no image"),
        ("plan.json", '{"rows": 5, "warnings": {"a": 1}}'),
        ("transfer_report.json", '{"notes": [5, {}]}'),
    ],
)
def test_files_of_a_run_that_hold_something_else(tmp_path, name, text):
    folder = fabricate(tmp_path)
    (folder / name).write_text(text)
    page = page_of(folder)
    assert len(page) < 2_000_000


@pytest.mark.parametrize("name", ["wall_time_s", "samples_seen", "images_per_sec"])
def test_numbers_that_nothing_can_calculate_with(tmp_path, capsys, name):
    folder = fabricate(tmp_path)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(text.rstrip().rstrip("}") + f', "{name}": 1{"0" * 400}}}')
    assert main(["report", str(folder)]) == 2
    assert "holds a number of 401 digits" in capsys.readouterr().err


def test_a_record_that_is_nested_too_deeply(tmp_path, capsys):
    folder = fabricate(tmp_path)
    text = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(f'{text.rstrip().rstrip("}")}, "x": {"[" * 600}{"]" * 600}}}')
    assert main(["report", str(folder)]) == 2
    assert "nested too deeply" in capsys.readouterr().err


def test_an_image_whose_name_is_too_long_is_not_there(tmp_path):
    assert find_image("x" * 300, [tmp_path]) is None


def test_thousands_of_classes_take_no_square_of_memory(tmp_path):
    folder = fabricate(tmp_path)
    rows = "".join(f"{n}.jpg,c{n},c{n + 1},0.1,0.9\n" for n in range(20_000))
    for name in ("predictions_best_val.csv", "predictions_test.csv"):
        (folder / name).write_text("path,target,predicted,prob_target,prob_predicted\n" + rows)
    metrics = json.loads((folder / "metrics.json").read_text())
    changed = {key: 0.0 for key in metrics if key.endswith("acc1")}
    (folder / "metrics.json").write_text(json.dumps(metrics | changed))
    tracemalloc.start()
    page_of(folder)
    assert tracemalloc.get_traced_memory()[1] < 600 * 2**20  # a square of 20,000 would be 3.2 GB
    tracemalloc.stop()


def test_a_link_beside_the_page_is_not_written_through(tmp_path):
    folder = fabricate(tmp_path)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (folder / f".report.html.{os.getpid()}.part").symlink_to(victim)
    page_of(folder)
    assert victim.read_text() == "mine"
    assert not (folder / "report.html").is_symlink()


def test_a_pipe_in_the_place_of_the_page_is_not_read(tmp_path, capsys):
    run = fabricate(tmp_path)
    os.mkfifo(run / "report.html")
    assert main(["report", str(run)]) == 2
    assert "exists and is no page of gn-transfer" in capsys.readouterr().err


def test_names_do_not_reach_the_terminal_as_commands(tmp_path, capsys):
    evil = "x\x1b]0;owned\x07"
    run = fabricate(tmp_path)
    run.rename(tmp_path / evil)
    assert main(["report", str(tmp_path)]) == 0
    too_long = tmp_path / evil / ("y\x1b[2J" * 60)
    assert main(["report", str(tmp_path / evil), "--output", str(too_long)]) == 2
    captured = capsys.readouterr()
    assert "x\\x1b]0;owned\\x07" in captured.out
    assert "\x1b" not in captured.out + captured.err


def test_predictions_without_probabilities_have_no_list_of_mistakes(tmp_path):
    run = fabricate(tmp_path)
    rows = [line.split(",")[:3] for line in (run / "predictions_best_val.csv").read_text().splitlines()]
    (run / "predictions_best_val.csv").write_text("\n".join(map(",".join, rows)) + "\n")
    assert main(["report", str(run)]) == 0


def test_images_that_are_gone_leave_their_place(tmp_path):
    page = page_of(fabricate(tmp_path, data_root=str(tmp_path / "gone")))
    assert "not found" in page


def test_a_run_of_before_the_confidence_was_stored_has_no_calibration(tmp_path):
    folder = fabricate(tmp_path)
    path = folder / "predictions_best_val.csv"
    path.write_text("\n".join(line.rpartition(",")[0] for line in path.read_text().splitlines()) + "\n")
    page = page_of(folder)
    assert "<h2>Calibration</h2>" not in page
    assert "<h2>Worst errors</h2>" in page


def test_a_run_without_predictions_still_has_a_page(tmp_path):
    page = page_of(fabricate(tmp_path, predictions=False, tested=False))
    assert "60.0\u00a0% of the validation images are right" in page
    assert "<h2>Worst errors</h2>" not in page


def test_many_classes_show_their_confusions_and_no_matrix(tmp_path):
    folder = fabricate(tmp_path, images=124, accuracy=0.5)
    path = folder / "predictions_best_val.csv"
    head, *rows = path.read_text().splitlines()
    renamed = []
    for place, row in enumerate(rows):
        name, target, predicted, *rest = row.split(",")
        renamed.append(",".join([name, f"{target}{place // 4}", f"{predicted}{place // 4}", *rest]))
    path.write_text("\n".join([head, *renamed]) + "\n")
    page = page_of(folder)
    assert "<h2>Confusion matrix</h2>" not in page
    assert "<h2>Most frequent confusions</h2>" in page


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_shown_with_a_warning(tmp_path, status):
    page = page_of(fabricate(tmp_path, status=status))
    assert "The run is not finished" in page
    assert status in page


def test_the_newest_of_several_runs(tmp_path, capsys):
    old, new = fabricate(tmp_path, seed=0), fabricate(tmp_path, seed=1)
    os.utime(old / "metrics.json", (1, 1))
    assert choose_run_folder(tmp_path) == new
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "deep" / "page.html")]) == 0
    assert str(new) in capsys.readouterr().out
    assert (tmp_path / "deep" / "page.html").is_file()


def test_bad_arguments(tmp_path, capsys):
    folder = fabricate(tmp_path / "runs")
    assert "no such folder" in failure(capsys, str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    assert "no run in there" in failure(capsys, str(tmp_path / "empty"))
    assert "is a folder; name a file" in failure(capsys, str(folder), "--output", str(tmp_path))
    foreign = tmp_path / "thesis.html"
    foreign.write_text("<html>mine</html>")
    assert "is no page of gn-transfer" in failure(capsys, str(folder), "--output", str(foreign))
    assert foreign.read_text() == "<html>mine</html>"
    (folder / "metrics.json").write_text(json.dumps({"format_version": 1, "norm": "bn", "status": "running"}))
    assert "metrics.json is not one of gn-transfer fit" in failure(capsys, str(folder))
    young = {"format_version": 1, "norm": "bn", "status": "running", "samples_seen": 0, "seed": 0}
    (folder / "metrics.json").write_text(json.dumps(young))
    assert "has no validation yet" in failure(capsys, str(folder))


def test_probabilities_stay_with_their_images(tmp_path):
    run = read_run(fabricate(tmp_path, accuracy=0.6))
    found = run.predictions("best/val/acc1", probabilities=True)
    assert set(found.prob_target[found.correct == 1]) == {0.8}
    assert set(found.prob_predicted[found.correct == 0]) == {0.7}
    assert set(found.targets) == set(CLASSES)
    assert run.predictions("best/val/acc1").prob_target is None


def test_confidence_falls_into_ten_bins():
    confidence = np.array([0.0, 0.05, 0.15, 0.41, 0.49, 0.51, 1.0, 1.0000001])  # a sum of floats may be above 1
    bins = compare_confidence(confidence, np.ones(8)).bins
    assert [part.images for part in bins] == [2, 1, 2, 1, 2]
